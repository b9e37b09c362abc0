"""Noticing what must end a run, so that all ranks end it at the same step."""

from __future__ import annotations

import math
import signal
from types import TracebackType

from dist_train.errors import UserError


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


def check_finite(loss: float, gradient_norm: float | None, step: int) -> None:
    """Raise UserError on a loss or gradient that is not finite; `step` counts from 1.

    Called with the loss before the optimizer moves, and the run's newest checkpoint is from before this step.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"step {step}: the loss is {loss}; nothing was saved from this step on; lower train.learning_rate, "
            "or look at the data of this step"
        )
    if gradient_norm is not None and not math.isfinite(gradient_norm):
        raise UserError(f"step {step}: the gradient norm is {gradient_norm}; lower train.learning_rate")
