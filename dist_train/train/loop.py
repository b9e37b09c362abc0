"""The training loop: one for pretraining, pretraining with the target in the loop, and distillation."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_shards import Batch, DataError, TokenLoader
from dist_train.config import TrainConfig
from dist_train.errors import RankError, UserError
from dist_train.losses import STATISTICS
from dist_train.models.chains import lay_out, parallel_of
from dist_train.runtime.process_group import Runtime
from dist_train.train.batch import DeviceBatch, on_device
from dist_train.train.checkpoint import Checkpoints
from dist_train.train.engine import drafter_of, reducing
from dist_train.train.guard import StopSignal, Watchdog
from dist_train.train.held_out import HeldOut
from dist_train.train.left_out import LossGuard, StepControl
from dist_train.train.metrics import Metrics
from dist_train.train.objective import Objective
from dist_train.train.on_policy import OnPolicy
from dist_train.train.outcome import Outcome
from dist_train.train.schedule import learning_rate
from dist_train.train.state import DrafterState
from dist_train.train.timing import Phases

_SIGNS = ("stopping", "writers_done", "lost")
"""What ranks tell each other with the figures of a step: asked to stop, checkpoint written, run folder lost."""
_PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass
class Training:
    """Everything the loop uses; `step` counts finished optimizer steps. `tokenizer`: checksum of that of the data."""

    config: TrainConfig
    runtime: Runtime
    engine: Any
    drafter: DrafterState
    control: StepControl
    loader: TokenLoader
    objective: Objective
    tokenizer: str
    on_policy: OnPolicy | None
    held_out: HeldOut | None
    guard: LossGuard
    checkpoints: Checkpoints
    metrics: Metrics
    phases: Phases
    step: int = 0

    @property
    def module(self) -> Any:
        """The drafter itself."""
        return drafter_of(self.engine)

    @property
    def tokens(self) -> int:
        """How many have been gone through, over all ranks."""
        return self.step * self.config.train.global_batch * self.config.data.sequence_length

    def fit(self) -> bool:
        """Train to the last step, or to a step boundary soon after a stop signal; True when it is finished.

        What a step gave is read while the next one is under way, and at once where something is to be done with it.
        """
        last_step = self.config.train.steps
        with ExitStack() as stack:
            stop = stack.enter_context(StopSignal())
            watchdog = stack.enter_context(Watchdog(self.config.run.hang_timeout, self.runtime.rank))
            trace_step = stack.enter_context(self.metrics.profiler(self.step))
            gc.freeze()  # what was built until now is not looked through again and again
            stack.callback(gc.unfreeze)
            outcomes: deque[Outcome] = deque()
            stopping = False
            while self.step < last_step and not stopping:
                with self.phases("step"):
                    with self.phases("data_wait"):
                        batches = [self._on_device_with_chains(batch) for batch in self._next_batches()]
                    values = self._optimizer_step(batches, stop)
                self.step += 1
                known = {"progress/tokens": self.tokens, "train/lr": learning_rate(self.step - 1, self.config.train)}
                marks = self.phases.take()
                if self.held_out is not None and self.held_out.due(self.step, last_step):
                    known |= self.held_out.measure(self.module)
                outcomes.append(Outcome(self.step, known, values, marks))
                is_due = self.checkpoints.due(self.step, last_step)
                stopping = self._read(outcomes, keep=0 if is_due else 1)
                if stopping or is_due:
                    stopping |= self._read(outcomes, keep=0)
                    self.save()
                watchdog.beat(self.step)
                trace_step()
            self.checkpoints.commit()
        return self.step == last_step

    def _next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step. Raises RankError for a damaged sample; others do not read it."""
        try:
            return next(self.loader)
        except DataError as error:
            raise RankError(f"rank {self.runtime.rank}: {error}") from error

    def _on_device_with_chains(self, batch: Batch) -> DeviceBatch:
        """With what a drafter that drafts in one pass learns from besides."""
        parallel, section = parallel_of(self.module.model.config), self.config.drafter.parallel
        if parallel is None or section is None or self.objective.regresses(self.step):  # of the next token alone
            return on_device(batch, self.runtime.device)
        seed = (self.config.run.seed, self.step)
        chains = lay_out(batch.input_ids, batch.positions, batch.mask, parallel, section.keep, seed)
        return on_device(batch, self.runtime.device, chains)

    def _optimizer_step(self, batches: list[DeviceBatch], stop: StopSignal) -> dict[str, Tensor]:
        """One optimizer step over this rank's micro-batches: what came of it, on the device; see `_read`."""
        engine, objective, target = self.engine, self.objective, self.objective.target
        if self.on_policy is not None and self.on_policy.due(self.step):
            with self.phases("on_policy"):
                first = self.step * self.config.train.global_batch + self.runtime.rank * len(batches)
                batches = [self.on_policy.rewrite(self.module, b, first + i) for i, b in enumerate(batches)]
        regresses = objective.regresses(self.step)
        num_positions = self.runtime.sum(self._on_device([sum(batch.trained for batch in batches)]))[0]
        if objective.needs_batch_mu and objective.batch_mu is None and not regresses:
            objective.observe(self._measure_mu(batches, num_positions))
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.train)

        totals = torch.zeros(1 + len(STATISTICS), dtype=torch.float64, device=self.runtime.device)
        for batch in batches:
            with self.phases("target"):
                hidden = target(batch.input_ids, batch.positions, batch.documents) if target else None
            with self.phases("drafter"), reducing(engine, is_last=batch is batches[-1]):
                whole, hidden = batch.unrolled(hidden)
                if regresses and hidden is not None:
                    loss_function = objective.regression_loss(hidden)
                else:
                    loss_function = objective.loss(whole, hidden, num_positions)
                loss, statistics = engine(whole.input_ids, whole.positions, loss_function, whole.documents, whole.seen)
                # The engine averages over micro-batches and ranks; this loss is already its share of the global mean.
                engine.backward(loss * (len(batches) * self.runtime.world_size))
            totals += torch.cat([loss.detach().double()[None], statistics])
            if batch is not batches[-1]:
                engine.step()
        with self.phases("communication"):  # and the wait for the slowest rank
            signs = [stop.received, self.checkpoints.written, self.runtime.is_first and self.checkpoints.lease.lost]
            loss_sum, *sums = self.runtime.sum(torch.cat([totals, self._on_device(signs)]))
        leave_out, spike = self.guard.judge(loss_sum)
        self.control.begin(leave_out)
        with self.phases("optimizer"):
            engine.step()

        means = {name: value / num_positions.clamp_min(1) for name, value in zip(STATISTICS, sums, strict=False)}
        values = dict(zip(_SIGNS, sums[len(STATISTICS) :], strict=True))
        values |= {"train/loss": loss_sum, "spike": spike, "left_out": self.control.left_out}
        norm = engine.get_global_grad_norm() if self.control.norm is None else self.control.norm
        if norm is not None:
            values["train/grad_norm"] = torch.as_tensor(norm, dtype=torch.float64, device=self.runtime.device)
        if target and not regresses:
            objective.observe(means.pop("mu"))
            values |= {f"train/{name}": value for name, value in means.items()}
        return values

    def _read(self, outcomes: deque[Outcome], keep: int) -> bool:
        """Log what came of all steps but the newest `keep`; True when any rank was told to stop.

        Commits a checkpoint that all ranks have written. Raises UserError, on all ranks, when another process has taken
        over the run, and when too many steps on end were left out.
        """
        stopping = False
        while len(outcomes) > keep:
            outcome = outcomes.popleft()
            values = outcome.read()
            told, writers_done, lost = (values.pop(name) for name in _SIGNS)
            if lost:
                raise UserError(self.checkpoints.lease.complaint())
            if writers_done == self.runtime.world_size:
                self.checkpoints.commit()
            stopping |= told > 0
            left_out, spike = bool(values.pop("left_out")), bool(values.pop("spike"))
            loss, samples = values["train/loss"], self._samples(outcome.step)
            self.guard.count(applied=not left_out, spike=spike, loss=loss, step=outcome.step, samples=samples)
            counts = {"train/skipped": float(self.guard.skipped), "train/spikes": float(self.guard.spikes)}
            pace = self.metrics.pace(self.phases.seconds(outcome.marks))
            self.metrics.log(outcome.step, {**values, **outcome.known, **counts, **pace})
        return stopping

    def _samples(self, step: int) -> str:
        """Those of step `step`, counted from 1."""
        first = (step - 1) * self.config.train.global_batch
        return f"samples {first} to {first + self.config.train.global_batch - 1} of the order"

    def _on_device(self, numbers: Sequence[float]) -> Tensor:
        """A few numbers of the host, fp64; it does not wait for them to arrive."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.runtime.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.runtime.device, non_blocking=True)

    def _measure_mu(self, batches: list[DeviceBatch], num_positions: Tensor) -> Tensor:
        """TVD++'s mean reward over the global batch, before the first step, by a forward pass alone."""
        objective, target = self.objective, self.objective.target
        objective.observe(self._on_device([0.5])[0])  # any value: only the statistics of this pass are used
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        with self.module.evaluating():
            for batch in batches:
                hidden = target(batch.input_ids, batch.positions, batch.documents) if target else None
                whole, hidden = batch.unrolled(hidden)
                loss_function = objective.loss(whole, hidden, num_positions)
                _, statistics = self.module(
                    whole.input_ids, whole.positions, loss_function, whole.documents, whole.seen
                )
                total += statistics[STATISTICS.index("mu")]
        return self.runtime.sum(total) / num_positions.clamp_min(1)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write a checkpoint of where the run stands."""
        self.metrics.flush()
        self.checkpoints.save(self.step, self.module.model, self.drafter, self.state_dict())

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False when there is none. Raises UserError when the run has changed."""
        manifest = self.checkpoints.load(self.drafter)
        if manifest is None:
            return False
        self.load_state_dict(manifest["state"])
        return True

    def state_dict(self) -> dict[str, Any]:
        """What is not in the engine, and a figure by which a restored engine is known to be right."""
        return {
            "loader": self.loader.state_dict(),
            "objective": self.objective.state_dict(),
            "guard": self.guard.state_dict(),
            "target": self.objective.target.identity if self.objective.target else None,
            "tokenizer": self.tokenizer,
            "drafter": self.module.shape(),
            "probe_loss": self.probe(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises UserError when drafter, data or target are not those of the save."""
        shape = self.module.shape()
        for key, saved_value in state["drafter"].items():
            if shape.get(key) != saved_value:
                raise UserError(
                    f"{self.config.run.dir}: the drafter's {key} is {shape.get(key)}, it was {saved_value} when it was "
                    "saved; restore drafter.*, or start a new run with drafter.init_from"
                )
        target = self.objective.target
        if target and state["target"] and not target.is_same(state["target"]):
            raise UserError(
                f"the target {target.identity['path']} is not the one this run was begun with "
                f"({state['target']['path']}, or its weights or configuration changed); restore it or start a new run"
            )
        self.loader.load_state_dict(state["loader"])
        self.objective.load_state_dict(state["objective"])
        self.guard.load_state_dict(state["guard"])
        self.step = state["loader"]["step"]
        found, saved = self.probe(), state["probe_loss"]
        if abs(found - saved) > _PROBE_TOLERANCE[self.config.train.precision] * max(1.0, abs(saved)):
            raise UserError(
                f"the drafter restored from step {self.step} has a loss of {found:.4f} on the run's first sequence, it "
                f"had {saved:.4f} when it was saved; {self.config.run.dir} was begun with another precision or shape?"
            )

    def probe(self) -> float:
        """Cross-entropy of the drafter on the first sequence of the run, the same one on every rank."""
        batch = on_device(self.loader.first(), self.runtime.device)
        loss_function = self.objective.cross_entropy(batch)
        with self.module.evaluating():
            return float(self.module(batch.input_ids, batch.positions, loss_function, batch.documents))
