"""Ctrl-C that is never lost: heard by whichever thread, and once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

_SECONDS_BETWEEN_LOOKS = 0.5

Result = TypeVar("Result")


@contextmanager
def one_interrupt(stop: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C call `stop` and raise KeyboardInterrupt, once.

    No second one: --nproc passes on what its terminal sends to all, and what was begun is yet to be cleaned up. Where
    the first is lost, as within a callback of C++ or of the garbage collector, `stop` ends the work, and it is raised
    then, whatever else the end of the work raises.
    """
    is_main = threading.current_thread() is threading.main_thread()  # signals are its own
    # A shell starts what it puts into the background with SIGINT ignored: Ctrl-C is meant for others there.
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    came = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if came:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, before)


def results(futures: Iterable[Future[Result]]) -> Iterator[Result]:
    """The results of threads, in order.

    Python runs a signal's handler in the main thread alone, but the kernel may give the signal to any: a main thread
    that waits for a lock without end is then not woken, and Ctrl-C is lost. So it wakes by itself now and then.
    """
    for future in futures:
        while not future.done():
            wait([future], timeout=_SECONDS_BETWEEN_LOOKS)
        yield future.result()
