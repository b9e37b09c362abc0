"""The training loop: one for pretraining, pretraining with the target in the loop, and distillation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_shards import Batch, TokenLoader
from dist_train.config import TrainConfig
from dist_train.errors import UserError
from dist_train.losses import STATISTICS
from dist_train.runtime import Runtime
from dist_train.train.checkpoint import Checkpoints
from dist_train.train.guard import StopSignal, check_finite
from dist_train.train.metrics import Metrics
from dist_train.train.objective import Objective
from dist_train.train.schedule import learning_rate


class DeviceBatch(NamedTuple):
    """A micro-batch on the device, each [B, T]: ids and labels int64, mask bool, positions int64."""

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor


@dataclass
class Training:
    """Everything the loop uses; `step` counts finished optimizer steps."""

    config: TrainConfig
    runtime: Runtime
    engine: Any
    loader: TokenLoader
    objective: Objective
    checkpoints: Checkpoints
    metrics: Metrics
    step: int = 0
    tokens: int = 0

    def fit(self) -> bool:
        """Train to the last step, or to the first step boundary after a stop signal; True when it is finished."""
        with StopSignal() as stop:
            while self.step < self.config.train.steps:
                began = time.monotonic()
                batches = [self._on_device(batch) for batch in next(self.loader)]
                data_wait = time.monotonic() - began
                figures, stopping = self._optimizer_step(batches, stop)
                self.step += 1
                seconds = time.monotonic() - began
                tokens = self.config.train.global_batch * self.config.data.sequence_length
                self.tokens += tokens
                figures |= {
                    "perf/tokens_per_s": tokens / seconds,
                    "perf/data_wait": data_wait / seconds,
                    "progress/tokens": self.tokens,
                }
                self.metrics.log(self.step, figures)
                if stopping or self.checkpoints.due(self.step, self.config.train.steps):
                    self.save()
                if stopping:
                    return self.step == self.config.train.steps
        return True

    def _optimizer_step(self, batches: list[DeviceBatch], stop: StopSignal) -> tuple[dict[str, float], bool]:
        """One optimizer step over this rank's micro-batches: its figures, and whether any rank was asked to stop."""
        engine, objective, target = self.engine, self.objective, self.objective.target
        num_positions = int(self.runtime.sum(torch.stack([batch.mask.sum() for batch in batches]).sum()))
        if objective.needs_batch_mu and objective.batch_mu is None:
            objective.observe(self._measure_mu(batches, num_positions))
        rate = learning_rate(self.step, self.config.train)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate

        total = torch.zeros(1 + len(STATISTICS) + 1, dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            hidden = target(batch.input_ids, batch.positions) if target else None
            loss_function = objective.loss(batch.labels, batch.mask, hidden, num_positions)
            loss, statistics = engine(batch.input_ids, batch.positions, loss_function)
            # The engine averages over micro-batches and ranks; this loss is already its share of the global mean.
            engine.backward(loss * (len(batches) * self.runtime.world_size))
            total[:-1] += torch.cat([loss.detach().double()[None], statistics])
            if batch is batches[-1]:
                total[-1] = stop.received
                self.runtime.sum(total)
                check_finite(float(total[0]), None, self.step + 1)
            engine.step()

        loss_sum, *sums, stopping = total.tolist()
        gradient_norm = engine.get_global_grad_norm()
        gradient_norm = None if gradient_norm is None else float(gradient_norm)
        check_finite(loss_sum, gradient_norm, self.step + 1)
        figures = {"train/loss": loss_sum, "train/lr": rate}
        if gradient_norm is not None:
            figures["train/grad_norm"] = gradient_norm
        if target:
            means = {name: value / max(num_positions, 1) for name, value in zip(STATISTICS, sums, strict=True)}
            objective.observe(means.pop("mu"))
            figures |= {f"train/{name}": value for name, value in means.items()}
        return figures, stopping > 0

    @torch.no_grad()
    def _measure_mu(self, batches: list[DeviceBatch], num_positions: int) -> float:
        """TVD++'s mean reward over the global batch, before the first step, by a forward pass alone."""
        objective = self.objective
        objective.batch_mu = 0.5  # any value: only the statistics of this pass are used
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            hidden = objective.target(batch.input_ids, batch.positions) if objective.target else None
            loss_function = objective.loss(batch.labels, batch.mask, hidden, num_positions)
            _, statistics = self.engine.module(batch.input_ids, batch.positions, loss_function)
            total += statistics[STATISTICS.index("mu")]
        return float(self.runtime.sum(total)) / max(num_positions, 1)

    def _on_device(self, batch: Batch) -> DeviceBatch:
        tensors = (torch.from_numpy(array) for array in batch)
        if self.runtime.device.type == "cuda":
            tensors = (tensor.pin_memory() for tensor in tensors)
        ids, labels, mask, positions = (tensor.to(self.runtime.device, non_blocking=True) for tensor in tensors)
        return DeviceBatch(ids, labels, mask.bool(), positions)

    def save(self) -> None:
        """Commit a checkpoint of where the run stands."""
        self.metrics.flush()
        self.checkpoints.save(self.step, self.engine, self.state_dict())

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False when there is none. Raises UserError when the run has changed."""
        manifest = self.checkpoints.load(self.engine)
        if manifest is None:
            return False
        self.load_state_dict(manifest["state"])
        return True

    # -- what a checkpoint holds beside the engine --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is not in the engine."""
        return {
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "objective": self.objective.state_dict(),
            "target": self.objective.target.identity if self.objective.target else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises UserError when data or target are not those of the save."""
        target = self.objective.target
        if target and state["target"] and target.identity != state["target"]:
            raise UserError(
                f"the target {target.identity['path']} is not the one this run was begun with "
                f"({state['target']['path']}, or its weights or configuration changed); restore it or start a new run"
            )
        self.loader.load_state_dict(state["loader"])
        self.objective.load_state_dict(state["objective"])
        self.tokens = state["tokens"]
        self.step = state["loader"]["step"]
