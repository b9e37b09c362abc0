"""What is done for a block of rows: from raw logits to the losses, their statistics and the gradient at the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_train.losses.distributions import Distributions
from dist_train.losses.head import Finish
from dist_train.losses.output import statistics
from dist_train.losses.terms import TERMS, Options, z_loss


@dataclass(frozen=True)
class Block:
    """The work of one block, without its numbers: two that are equal take the same steps.

    `options` without `batch_mu` and `vocab_size`, which are given or already heeded when a block is worked on; `target`
    is None where no loss compares.
    """

    terms: tuple[tuple[str, float], ...]
    options: Options
    drafter: Finish
    target: Finish | None

    def __call__(
        self,
        z: Tensor,
        y: Tensor | None,
        labels: Tensor | None,
        scale: Tensor,
        batch_mu: Tensor | None,
        out: Tensor,
        *,
        traced: bool = False,
    ) -> list[Tensor]:
        """At each row the sum of the weighted losses and, with a target, the statistics: each [R], fp64.

        `z`, `y` [R, V]: raw logits of drafter and target; `out` [R, V], which may be `z`, becomes the gradient of the
        losses times `scale` at the drafter's. `labels` [R]; `scale`, `batch_mu` scalars, fp64, on the device. `traced`:
        for torch.compile.
        """
        options = replace(self.options, batch_mu=batch_mu)
        logits = self.drafter.finished(z)
        heated = _heated(logits, options.drafter_temperature)
        target_logits = None
        if self.target is not None and y is not None:
            target_logits = _heated(self.target.finished(y).to(logits.dtype), options.target_temperature)
        d = Distributions(heated, target_logits, labels, traced=traced)
        loss, gradient = self._weighted_sum(d, options)
        columns = [loss, *statistics(d)] if d.has_target else [loss]
        gradient.mul_((scale / options.drafter_temperature).to(gradient.dtype))
        out.copy_(self.drafter.raw_gradient(gradient, logits))
        return columns

    def _weighted_sum(self, d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
        """The losses added up, [R], and their gradient at the logits after their temperature, [R, V]."""
        weighted = [(TERMS[term], weight) for term, weight in self.terms]
        if options.z_loss:
            weighted.append((z_loss, options.z_loss))
        loss, total = torch.zeros_like(d.drafter.log_sum), None
        for term, weight in weighted:
            value, gradient = term(d, options)
            loss = loss + weight * value
            gradient.mul_(weight)
            total = gradient if total is None else total.add_(gradient)
        assert total is not None
        return loss, total


def _heated(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature
