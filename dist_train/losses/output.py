"""What a loss returns, and the statistics that are taken in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.losses.distributions import Distributions

STATISTICS = (
    "acceptance",
    "greedy_acceptance",
    "top1_agreement",
    "mu",
    "tvd",
    "drafter_entropy",
    "target_entropy",
)


@dataclass(frozen=True)
class DivergenceOutput:
    """A loss and what was seen on the way, each a scalar.

    `loss`: sum over unmasked positions / `num_positions` as the caller gave it, differentiable. The others are means
    over the unmasked positions at hand, without gradient, and nan where there is no target: `acceptance` =
    sum min(p, q); `greedy_acceptance` = q(argmax p), what a server that drafts greedily accepts; `top1_agreement`;
    `mu`, TVD++'s mean reward; `tvd`; the entropies in nats. All are of the distributions that the loss saw, after
    their temperatures. `positions`: how many are unmasked.
    """

    loss: Tensor
    acceptance: Tensor
    greedy_acceptance: Tensor
    top1_agreement: Tensor
    mu: Tensor
    tvd: Tensor
    drafter_entropy: Tensor
    target_entropy: Tensor
    positions: int


def statistics(d: Distributions) -> list[Tensor]:
    """What STATISTICS names, each [N], fp64: half a million terms of fp32 would lose digits when they are added up."""
    drafted = d.drafter.top
    return [
        d.acceptance,
        d.q.gather(1, drafted)[:, 0].double(),
        (drafted == d.target.top)[:, 0].double(),
        d.mu,
        d.tvd,
        d.entropy(d.drafter),
        d.entropy(d.target),
    ]


def make_output(loss: Tensor, sums: Tensor | None, positions: int) -> DivergenceOutput:
    """From the sums of the statistics (None: no target) to their means."""
    means = loss.new_full((len(STATISTICS),), torch.nan) if sums is None else sums / max(positions, 1)
    named = dict(zip(STATISTICS, means.detach().to(loss.dtype).unbind(), strict=True))
    return DivergenceOutput(loss=loss, positions=positions, **named)
