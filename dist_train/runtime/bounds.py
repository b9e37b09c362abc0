"""Bounds of time and memory for what code of others does in this process."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_STATM = Path("/proc/self/statm")
_REPEAT_SECONDS = 1.0  # the first exception may be lost in a callback of the interpreter, which prints and drops it


class TooSlowError(Exception):
    """A block took more processor time than it may."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise TooSlowError or MemoryError within the block once it takes `seconds` of CPU time, or `memory` more bytes.

    CPU time, so that neither other work nor a stopped process counts; the memory is this process's address space. In
    the main thread alone, where Python handles signals; in any other the block runs without bounds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    tighter = min(_limits(_address_space() + memory, soft, hard)) if _STATM.exists() else soft
    handler = signal.signal(signal.SIGVTALRM, _interrupt)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _REPEAT_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


def _limits(*limits: int) -> list[int]:
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise TooSlowError


def _address_space() -> int:
    """Bytes of it that this process has."""
    return int(_STATM.read_bytes().split(maxsplit=1)[0]) * resource.getpagesize()
