"""Noticing what must end a run, or be left out of it, so that all ranks do the same at the same step."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

import torch

from dist_train.errors import UserError
from dist_train.train.state import EMA, inner_optimizer

HUNG = 75
"""Exit code of a process that its watchdog ended."""
_WINDOW = 128  # losses that a spike is judged by
_LEAST_LOSSES = 32
_DEVIATIONS = 6.0
_LEAST_DEVIATION = 0.01  # of the mean: where the loss hardly moves any more, nothing is a spike


class StopSignal:
    """Set by SIGTERM or SIGUSR1 (SLURM's notice before a time limit); asked at step boundaries, agreed by all ranks.

    A second signal ends the process as it would have without this.
    """

    def __init__(self) -> None:
        self.received = False
        self._numbers = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> StopSignal:
        """Listen."""
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received = True
        signal.signal(number, self._before[signal.Signals(number)])


class Watchdog:
    """Ends this process, with the stack of every thread, when no step has been finished for too long.

    A collective that waits for a rank which will not come has no other way out where the backend's own time-out is
    longer or not there. A thread watches, because the main one is inside of the collective.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._step, self._beaten = 0, time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        """Watch from now on."""
        self._beaten = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop watching."""
        self._over.set()

    def beat(self, step: int) -> None:
        """`step` steps are finished."""
        self._step, self._beaten = step, time.monotonic()

    def _watch(self) -> None:
        period, looked = min(1.0, self._seconds / 10), time.monotonic()
        while not self._over.wait(period):
            # A process that was stopped as a whole (SIGSTOP, SLURM's suspend) has not hung: that time does not count.
            late = time.monotonic() - looked - period
            looked = time.monotonic()
            if late > period:
                self._beaten += late
            if time.monotonic() - self._beaten > self._seconds:
                print(
                    f"rank {self._rank}: no step finished for {self._seconds:g} s after step {self._step} "
                    "(run.hang_timeout): a rank or the network hangs; ending, the same command goes on from the newest "
                    "checkpoint. Where every thread stands:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)


class StepControl:
    """Hooks on AdamW's step, which every ZeRO stage goes through: leaves a step out, and averages the weights.

    Set `skip` before the engine's step; `applied` tells afterwards whether the weights moved. DeepSpeed leaves a step
    of non-finite gradients out by itself, save for fp32 without ZeRO, where every rank has the same whole gradients.
    """

    def __init__(self, engine: Any, ema_decay: float | None) -> None:
        self.skip = self.applied = False
        self._ema_decay = ema_decay
        self._put_aside: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        optimizer = inner_optimizer(engine)
        self._checks = engine.optimizer is optimizer
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        if self._checks and not self.skip:
            norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
            self.skip = not bool(norm.isfinite())
        if self.skip:  # a tensor without a gradient is left as it is, its moments too
            self._put_aside = [(tensor, tensor.grad) for tensor in tensors]
            for tensor in tensors:
                tensor.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tensor, gradient in self._put_aside:  # DeepSpeed clears them its own way
            tensor.grad = gradient
        self._put_aside = []
        self.applied = not self.skip
        if self._ema_decay is not None and self.applied:
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    optimizer.state[tensor][EMA].lerp_(tensor.detach(), 1 - self._ema_decay)


class LossGuard:
    """Judges the loss of each global step: all ranks see the same loss, so they judge alike.

    A step whose loss or gradient is not finite is left out; too many on end stop the run. A spike, a loss further above
    the last ones than chance brings, is told, and with `skip_spikes` left out too.
    """

    def __init__(self, max_skipped: int, *, skip_spikes: bool) -> None:
        self._max_skipped, self._skip_spikes = max_skipped, skip_spikes
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._skipped_on_end = 0
        self.skipped = 0
        self.spikes = 0

    def must_skip(self, loss: float) -> bool:
        """Whether the optimizer must leave this step out."""
        if not math.isfinite(loss):
            return True
        spike = self._is_spike(loss)
        self.spikes += spike
        self._losses.append(loss)
        return spike and self._skip_spikes

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < _LEAST_LOSSES:
            return False
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        return loss > mean + _DEVIATIONS * max(deviation, _LEAST_DEVIATION * abs(mean))

    def count(self, *, applied: bool, loss: float, step: int, samples: str) -> None:
        """Take note of how a step went; `step` counts from 1. Raises UserError after too many were left out."""
        if applied:
            self._skipped_on_end = 0
            return
        self.skipped += 1
        self._skipped_on_end += 1
        if self._skipped_on_end >= self._max_skipped:
            raise UserError(
                f"step {step}: the {'loss is ' + str(loss) if not math.isfinite(loss) else 'gradient is not finite'}, "
                f"as the {self._skipped_on_end}th step on end ({samples}); no step of them was taken, the newest "
                "checkpoint is from before or among them; lower train.learning_rate, or look at these samples"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the next judgement depends on."""
        return {
            "losses": list(self._losses),
            "skipped_on_end": self._skipped_on_end,
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._skipped_on_end, self.skipped, self.spikes = state["skipped_on_end"], state["skipped"], state["spikes"]
