"""A progress bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts towards `total`; `update` also takes figures to show beside the count.

    Silent where `enabled` is false, so that callers need not ask which rank they are.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, first: int = 0, enabled: bool = True, scale: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.enabled = what, total, unit, enabled
        self.first = self.done = first
        self._began = self._printed = time.monotonic()
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = None
        if on_terminal:
            self._bar = tqdm(total=total, initial=first, desc=what, unit=unit, unit_scale=scale, leave=False)

    def update(self, done: int, **figures: float | str) -> None:
        """Set the count to `done`."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_postfix({name: _short(value) for name, value in figures.items()}, refresh=False)
            self._bar.update(step)
        elif self.enabled and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES and done < self.total:
            self._printed = time.monotonic()
            self._print(figures)

    def _print(self, figures: dict[str, float | str]) -> None:
        elapsed = time.monotonic() - self._began
        left = elapsed / max(self.done - self.first, 1) * (self.total - self.done)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
        print(
            f"{self.what}: {self.done / self.total:.0%} ({self.done:,}/{self.total:,} {self.unit}), "
            f"{elapsed:.0f} s, {left:.0f} s left{', ' + shown if shown else ''}",
            flush=True,
        )

    def __enter__(self) -> Progress:
        """Nothing to do: the bar is there from the start."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar off the screen; the caller prints what came out."""
        if self._bar is not None:
            self._bar.close()


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
