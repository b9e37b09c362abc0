"""What is minimised: a weighted sum of losses, and the statistics that come with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_train.config import LossSection
from dist_train.losses import STATISTICS, Compile, Head, linear_divergence
from dist_train.models.target import Target
from dist_train.train.batch import DeviceBatch
from dist_train.train.beginning import Regression

LossFunction = Callable[[Tensor, Head], tuple[Tensor, Tensor]]


class Objective:
    """Loss names and weights, the options of each, and TVD++'s memory of the batch before.

    With `tvdpp_normalize: batch` sigma is a statistic of the global accumulated batch, which no micro-batch knows. It
    is taken from the step before (and for the first step from a forward pass over its own micro-batches), so that the
    loss depends neither on the number of ranks nor on the micro-batch size.
    """

    def __init__(
        self,
        terms: dict[str, float],
        loss: LossSection,
        target: Target | None,
        compile: Compile = False,
        regression: Regression | None = None,
    ) -> None:
        self.terms, self.target, self.compile = terms, target, compile
        self.regression = regression
        self.needs_batch_mu = "tvdpp" in terms and loss.tvdpp_normalize == "batch"
        self.batch_mu: Tensor | None = None
        self._chunk_size = loss.chunk_size
        self._options: dict[str, Any] = {
            "normalize": loss.tvdpp_normalize,
            "clamp": loss.tvdpp_clamp,
            "beta": loss.jsd_beta,
            "decay": loss.lk_decay,
            "z_loss": loss.z_loss,
            "drafter_temperature": loss.drafter_temperature,
            "target_temperature": loss.target_temperature,
        }

    def loss(self, batch: DeviceBatch, target_hidden: Tensor | None, num_positions: int | Tensor) -> LossFunction:
        """The loss of one micro-batch as a function of the drafter's hidden states and head.

        `target_hidden` [B, T, E]; `num_positions` counts the unmasked positions of the whole global batch, so that the
        sum over micro-batches and ranks is the mean over it. The function returns the loss and, for logging, sums of
        STATISTICS over this rank's unmasked positions, [len(STATISTICS)].
        """

        def loss_function(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            output = linear_divergence(
                self.terms,
                hidden,
                head,
                target_hidden,
                self.target.head if self.target else None,
                batch.mask,
                self._chunk_size,
                labels=batch.labels,
                num_positions=num_positions,
                unmasked=batch.unmasked,
                compile=self.compile,
                batch_mu=self.batch_mu,
                **self._options,
            )
            means = torch.stack([getattr(output, name).detach().double() for name in STATISTICS])
            return output.loss, means * output.positions

        return loss_function

    def regresses(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 0, learns hidden states in place of the losses."""
        return self.regression is not None and step < self.regression.steps

    def regression_loss(self, target_hidden: Tensor) -> LossFunction:
        """The regression on `target_hidden` [B, T, E], called like `loss`; its statistics are 0."""
        assert self.regression is not None
        regression = self.regression

        def loss_function(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            nothing = torch.zeros(len(STATISTICS), dtype=torch.float64, device=hidden.device)
            return regression.loss(hidden, head, target_hidden), nothing

        return loss_function

    def cross_entropy(self, batch: DeviceBatch) -> Callable[[Tensor, Head], Tensor]:
        """The mean cross-entropy of a batch alone, whatever the objective."""

        def loss_function(hidden: Tensor, head: Head) -> Tensor:
            return linear_divergence(
                "ce", hidden, head, None, None, batch.mask, self._chunk_size, labels=batch.labels
            ).loss

        return loss_function

    def observe(self, mu: Tensor) -> None:
        """Remember the mean reward of the global batch that was just stepped on."""
        if self.needs_batch_mu:
            self.batch_mu = mu

    def state_dict(self) -> dict[str, Any]:
        """What the next step's loss depends on."""
        return {"batch_mu": None if self.batch_mu is None else float(self.batch_mu)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved memory."""
        mu = state["batch_mu"]
        self.batch_mu = None if mu is None else torch.tensor(mu, dtype=torch.float64)
