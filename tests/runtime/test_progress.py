"""What a user sees of a command that is at work."""

from __future__ import annotations

import threading
import time

import pytest

from dist_train.runtime import progress
from dist_train.runtime.progress import Progress, heartbeat, phase, silence, tell_at_intervals


@pytest.fixture
def quick(monkeypatch):
    """Lines come every 50 ms."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)


def test_no_phase_is_silent_and_each_is_named(quick, capsys):
    with heartbeat("evaluate"):
        time.sleep(0.3)
        with heartbeat("evaluate"), phase("loading the target"):  # nested: one speaks
            time.sleep(0.3)
        with silence():
            time.sleep(0.02)
            capsys_before = capsys.readouterr().out
            time.sleep(0.3)
            assert capsys.readouterr().out == ""
        with Progress("evaluate", 8, "unit", first=2):
            time.sleep(0.3)
    counted = capsys.readouterr().out.splitlines()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # it is over
    named = capsys_before.splitlines()
    assert {line.rsplit(",", 1)[0] for line in named} == {"evaluate: at work", "evaluate: loading the target"}
    assert 4 <= len(named) <= 14
    assert counted and set(counted) == {"evaluate: 25% (2/8 unit), 0 s"}  # no time left is made up of nothing


def test_one_rank_speaks(quick, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with heartbeat("evaluate"):
        tell_at_intervals("a server", "a server does not answer")
        time.sleep(0.2)
    assert capsys.readouterr().out == ""


def test_time_left_is_by_what_all_ranks_did_since_this_start():
    """50 of 100 units were there, ten more came in 10 s, one of them from here: 40 are left, for 40 s."""
    bar = Progress("generate", 100, "batch", first=50, look=lambda: 60)
    bar._began -= 10
    bar.update(51, loss=0.5)
    assert bar.stand() == "generate: 60% (60/100 batch), 10 s, 40 s left, loss 0.5"
    bar.update(52)
    assert bar.done == 60  # what others made is not forgotten


def test_a_folder_that_cannot_be_listed_for_a_moment_does_not_end_the_lines():
    def look():
        raise OSError("stale file handle")

    assert Progress("generate", 10, "batch", look=look).stand() == "generate: 0% (0/10 batch), 0 s"


def test_a_subject_is_told_at_once_and_then_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_told", {})
    threads = [threading.Thread(target=tell_at_intervals, args=("a server", "it is gone")) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().out == "it is gone\n"
    monkeypatch.setitem(progress._told, "a server", time.monotonic() - 16)
    with heartbeat("generate"):
        tell_at_intervals("a server", "it is gone")
    assert capsys.readouterr().out == "generate: it is gone\n"
