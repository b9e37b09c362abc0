"""Ctrl-C, in whichever thread the kernel leaves it."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from dist_train.errors import UserError
from dist_train.runtime.interrupts import one_interrupt, results


@pytest.fixture(autouse=True)
def _handler_as_before():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_another_thread_takes_wakes_the_main_thread():
    """The main thread waits for a lock, from which only a signal of its own would wake it."""
    over, workers = threading.Event(), ThreadPoolExecutor(2)

    def disturb(victim):
        time.sleep(0.3)
        signal.pthread_kill(victim.ident, signal.SIGINT)

    work = [workers.submit(over.wait, 20) for _ in range(2)]
    began = time.monotonic()
    try:
        victim = next(iter(workers._threads))
        threading.Thread(target=disturb, args=(victim,), daemon=True).start()
        with pytest.raises(KeyboardInterrupt), one_interrupt(lambda: None):
            list(results(work))
    finally:
        over.set()
    assert time.monotonic() - began < 10


def test_results_come_in_order_and_with_their_errors():
    with ThreadPoolExecutor(4) as workers:
        assert list(results([workers.submit(pow, 2, i) for i in range(20)])) == [2**i for i in range(20)]
        with pytest.raises(TimeoutError, match="its own"):
            list(results([workers.submit(_fail)]))


def _fail():
    raise TimeoutError("its own")


def test_an_interrupt_that_is_swallowed_is_raised_when_the_work_ends_whatever_that_raises():
    stopped = []
    with pytest.raises(KeyboardInterrupt), one_interrupt(lambda: stopped.append(True)):
        with suppress(KeyboardInterrupt):  # as in a callback whose exceptions are printed and forgotten
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a second one changes nothing
        raise UserError("hung up")
    assert stopped == [True]


def test_what_is_ignored_in_the_background_of_a_shell_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with one_interrupt(lambda: pytest.fail("Ctrl-C was meant for another process")):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
