"""Noticing what must end a run, so that all ranks do the same at the same step."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from types import TracebackType

HUNG = 75
"""Exit code of a process that its watchdog ended."""


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
