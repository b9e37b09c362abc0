"""What a user sees while a command is at work: a bar on a terminal, a plain line at least every 15 s elsewhere.

One thread of the process speaks. It says where the innermost phase stands: a `Progress`, which counts, or a `phase`,
which has a name alone; so no phase is silent, however long it takes, and none has to speak by itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol

from dist_train.runtime.world import is_spokesman

SECONDS_BETWEEN_LINES = 15.0


class _Phase(Protocol):
    """Something that takes its time."""

    def stand(self) -> str:
        """Where it stands, in one line; empty where a bar shows it."""


_lock = threading.RLock()
_commands: list[str] = []  # innermost last, as are the phases
_phases: list[_Phase] = []
_told: dict[str, float] = {}  # what was said last, and when: time.monotonic()
_spoken = 0.0


class _Named:
    """A phase that does not count."""

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()

    def stand(self) -> str:
        return _by_command(f"{self._what}, {time.monotonic() - self._began:.0f} s")


class _Silence:
    """A phase in which others speak: the processes that this one has started."""

    def stand(self) -> str:
        return ""


@contextmanager
def heartbeat(command: str) -> Iterator[None]:
    """Say every 15 s of the `with` block where `command` stands; on one rank, and once where blocks are nested."""
    with _within(command, _commands), _within(_Named("at work"), _phases):
        if len(_commands) > 1 or not is_spokesman():
            yield
            return
        ended = threading.Event()
        threading.Thread(target=_beat, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Name what the `with` block does, such as `loading the target`, for the lines of `heartbeat`."""
    with _within(_Named(what), _phases):
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Have `heartbeat` say nothing: processes that were started here speak for themselves."""
    with _within(_Silence(), _phases):
        yield


def tell_at_intervals(subject: str, line: str) -> None:
    """Print a line at once, and of the same subject again only after 15 s; from any thread."""
    with _lock:
        now = time.monotonic()
        if is_spokesman() and now - _told.get(subject, -SECONDS_BETWEEN_LINES) >= SECONDS_BETWEEN_LINES:
            _told[subject] = now
            _say(_by_command(line))


@contextmanager
def _within(inner: Any, outer: list[Any]) -> Iterator[None]:
    with _lock:
        outer.append(inner)
    try:
        yield
    finally:
        with _lock:
            outer.remove(inner)


def _by_command(line: str) -> str:
    return f"{_commands[-1]}: {line}" if _commands else line


def _beat(ended: threading.Event) -> None:
    global _spoken
    _spoken = time.monotonic()
    while not ended.wait(max(0.01, _spoken + SECONDS_BETWEEN_LINES - time.monotonic())):
        with _lock:
            innermost = _phases[-1] if _phases else _Silence()
            is_time = time.monotonic() - _spoken >= SECONDS_BETWEEN_LINES
        line = innermost.stand() if is_time else ""  # without the lock: it may look at a folder
        with _lock:
            if is_time:
                _spoken = time.monotonic()
            if line and not ended.is_set():
                _say(line)


def _say(line: str) -> None:
    global _spoken
    _spoken = time.monotonic()
    print(line, flush=True)


class Progress:
    """Counts towards `total`; `update` also takes figures to show beside the count.

    `first`: what was done before this start; time left is told by what was done since. `look`: the count, where others
    work on it as well; asked for each line. Silent where `enabled` is false, so that callers need not ask which rank
    they are.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        first: int = 0,
        enabled: bool = True,
        scale: bool = False,
        look: Callable[[], int] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.enabled = what, total, unit, enabled
        self.first = self.done = first
        self._look = look
        self._began = time.monotonic()
        self._figures: dict[str, float | str] = {}
        self._bar: Any = None
        self._block = _within(self, _phases)
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, desc=what, unit=unit, unit_scale=scale, leave=False)

    def update(self, done: int, **figures: float | str) -> None:
        """Set the count to `done`."""
        with _lock:
            self.done, self._figures = max(self.done, done), figures  # a look may have found more
            if self._bar is not None:
                self._bar.set_postfix({name: _short(value) for name, value in figures.items()}, refresh=False)
                self._bar.update(self.done - self._bar.n)

    def stand(self) -> str:
        """Count, time since this start, and what is left at the speed since then."""
        if self._look is not None:
            with suppress(OSError):  # a file system's moment of weakness
                self.update(self._look(), **self._figures)
        with _lock:
            if self._bar is not None:
                self._bar.refresh()
                return ""
        if not self.enabled:
            return ""
        elapsed, made = time.monotonic() - self._began, self.done - self.first
        left = f", {elapsed / made * (self.total - self.done):.0f} s left" if made > 0 else ""
        shown = "".join(f", {name} {_short(value)}" for name, value in self._figures.items())
        share = self.done / self.total if self.total else 1.0
        return f"{self.what}: {share:.0%} ({self.done:,}/{self.total:,} {self.unit}), {elapsed:.0f} s{left}{shown}"

    def __enter__(self) -> Progress:
        """From here on it is what the process does."""
        self._block.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar off the screen; the caller prints what came out."""
        self._block.__exit__(kind, error, at)
        with _lock:
            if self._bar is not None:
                self._bar.close()
            self._bar, self.enabled = None, False


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
