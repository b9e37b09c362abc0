"""From the blocks of each prompt to block efficiency, its uncertainty, and speed-ups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000
Blocks = Sequence[Sequence[int]]


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def block_efficiency(blocks: Blocks) -> float:
    """Tokens emitted per call of the target, over all prompts: sums before ratios. `blocks`: tokens of each call."""
    return sum(map(sum, blocks)) / sum(map(len, blocks))


def bootstrap(blocks: Blocks, seed: int = 0) -> Estimate:
    """Block efficiency with its percentile interval; prompts are what is drawn again, not tokens or blocks."""
    tokens, calls = _totals(blocks)
    draws = _draws(len(blocks), seed)
    return _estimate(block_efficiency(blocks), tokens[draws].sum(1) / calls[draws].sum(1))


def bootstrap_difference(blocks: Blocks, base: Blocks, seed: int = 0) -> Estimate:
    """Block efficiency of one drafter minus that of another on the same prompts, which are drawn in pairs."""
    (tokens, calls), (base_tokens, base_calls) = _totals(blocks), _totals(base)
    draws = _draws(len(blocks), seed)
    differences = tokens[draws].sum(1) / calls[draws].sum(1) - base_tokens[draws].sum(1) / base_calls[draws].sum(1)
    return _estimate(block_efficiency(blocks) - block_efficiency(base), differences)


def memory_bound_speed_up(efficiency: float, ratio: float, gamma: int) -> float:
    """MBSU = tau / (c gamma + 1): the speed-up where reading weights is all that takes time.

    `ratio` c: parameters of the drafter over those of the target (Goel et al., 2024).
    """
    return efficiency / (ratio * gamma + 1)


def accepted_histogram(blocks: Blocks, gamma: int) -> list[int]:
    """How many blocks accepted 0, 1, ..., gamma drafted tokens. A block cut short by the end of the text counts too."""
    accepted = np.array([length - 1 for lengths in blocks for length in lengths])
    return np.bincount(accepted, minlength=gamma + 1).tolist()


def position_acceptance(histogram: Sequence[int]) -> list[float]:
    """Probability that the k-th draft is accepted, given that those before it were; k = 1 to gamma."""
    reached = np.cumsum(histogram[::-1])[::-1]  # blocks that accepted at least k drafts
    return [float(now / before) if before else 0.0 for now, before in zip(reached[1:], reached[:-1], strict=True)]


def _totals(blocks: Blocks) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return np.array([sum(lengths) for lengths in blocks]), np.array([len(lengths) for lengths in blocks])


def _draws(prompts: int, seed: int) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, prompts, (RESAMPLES, prompts))


def _estimate(value: float, draws: npt.NDArray[Any]) -> Estimate:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))
