"""From the blocks of each prompt to block efficiency, its uncertainty, and speed-ups."""

from __future__ import annotations

import statistics
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

    @property
    def verdict(self) -> str:
        """What the sign of a difference is known to be: higher, lower, or not told apart where 0 is possible."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not told apart"


class Counts(NamedTuple):
    """One training run under one condition: of each prompt the tokens that its blocks gave, and the blocks."""

    tokens: Sequence[int]
    calls: Sequence[int]


def count(blocks: Blocks) -> Counts:
    """Tokens and target calls of each prompt."""
    return Counts([sum(lengths) for lengths in blocks], [len(lengths) for lengths in blocks])


def block_efficiency(blocks: Blocks) -> float:
    """Tokens emitted per call of the target, over all prompts: sums before ratios. `blocks`: tokens of each call."""
    return sum(map(sum, blocks)) / sum(map(len, blocks))


def bootstrap(blocks: Blocks, seed: int = 0) -> Estimate:
    """Block efficiency with its percentile interval; prompts are what is drawn again, not tokens or blocks."""
    return bootstrap_runs([count(blocks)], seed=seed)


def bootstrap_difference(blocks: Blocks, base: Blocks, seed: int = 0) -> Estimate:
    """Block efficiency of one drafter minus that of another on the same prompts, which are drawn in pairs."""
    return bootstrap_runs([count(blocks)], [count(base)], seed)


def bootstrap_runs(runs: Sequence[Counts], base: Sequence[Counts] = (), seed: int = 0) -> Estimate:
    """Mean block efficiency of the training runs of one method, minus that of another's, on the same prompts.

    Two levels vary. Prompts are drawn with replacement, the same for all runs of both methods. Runs are too few to be
    drawn: three resampled numbers spread too little, and their ends are hit too seldom. A method's mean over R > 1 runs
    is moved instead by its standard error times a draw from Student's t with R - 1 degrees of freedom. With one run
    each this is the paired bootstrap over prompts, which knows nothing of what another training seed would give.
    """
    generator = np.random.default_rng(seed)
    prompts = len(runs[0].tokens)
    draws = generator.integers(0, prompts, (RESAMPLES, prompts))
    value, moved = _mean_of_runs(runs, draws, generator)
    if base:
        base_value, base_moved = _mean_of_runs(base, draws, generator)
        value, moved = value - base_value, moved - base_moved
    low, high = np.quantile(moved, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def _mean_of_runs(
    runs: Sequence[Counts], draws: npt.NDArray[Any], generator: np.random.Generator
) -> tuple[float, npt.NDArray[Any]]:
    tokens, calls = (np.array([run[part] for run in runs]) for part in (0, 1))
    of_runs = tokens.sum(1) / calls.sum(1)
    moved = np.mean([t[draws].sum(1) / c[draws].sum(1) for t, c in zip(tokens, calls, strict=True)], axis=0)
    if len(runs) > 1:
        error = of_runs.std(ddof=1) / len(runs) ** 0.5
        moved = moved + error * generator.standard_t(len(runs) - 1, len(moved))
    return float(of_runs.mean()), moved


def memory_bound_speed_up(efficiency: float, ratio: float, passes: int) -> float:
    """MBSU = tau / (c gamma + 1): the speed-up where reading weights is all that takes time.

    `ratio` c: parameters of the drafter over those of the target (Goel et al., 2024); `passes` of the drafter a block,
    gamma or, of one that drafts a block in one pass, 1.
    """
    return efficiency / (ratio * passes + 1)


def accepted_histogram(blocks: Blocks, gamma: int) -> list[int]:
    """How many blocks accepted 0, 1, ..., gamma drafted tokens."""
    accepted = np.array([length - 1 for lengths in blocks for length in lengths])
    return np.bincount(accepted, minlength=gamma + 1).tolist()


def position_acceptance(histogram: Sequence[int]) -> list[float]:
    """Probability that the k-th draft is accepted, given that those before it were; k = 1 to gamma."""
    reached = np.cumsum(histogram[::-1])[::-1]  # blocks that accepted at least k drafts
    return [float(now / before) if before else 0.0 for now, before in zip(reached[1:], reached[:-1], strict=True)]


def accepted_shares(histogram: Sequence[int]) -> list[float]:
    """Share of all blocks whose k-th draft was accepted, k = 1 to gamma: what servers count per position."""
    reached = np.cumsum(histogram[::-1])[::-1]
    return [float(now / reached[0]) for now in reached[1:]]


def token_rates(rounds: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Tokens/s of each case and its ratio to the first, plain decoding, from seconds per token: [rounds, cases].

    The ratio is the median over rounds of the two times of a round, which what slowed that round slowed alike; the rate
    is that ratio times the plain rate's median. So rates rank as ratios do; medians of each alone need not.
    """
    plain = statistics.median(1 / seconds[0] for seconds in rounds)
    ratios = [statistics.median(seconds[0] / seconds[case] for seconds in rounds) for case in range(len(rounds[0]))]
    return [{"tokens_per_s": plain * ratio, "speed_up": ratio} for ratio in ratios]
