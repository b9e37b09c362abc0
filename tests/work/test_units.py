"""Units shared out over processes that have only a folder in common, some of which are slow, dead or asleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.errors import UserError
from dist_train.work.claims import Claims
from dist_train.work.units import Units, refuse_partial

WORKER = """
import sys, time
from pathlib import Path
from dist_train.work import claims, units
claims.LEASE_SECONDS = float(sys.argv[4])
claims.Claims.__init__.__defaults__ = (float(sys.argv[4]),)
class Alone:
    rank, world_size = 0, 1
    agree = staticmethod(lambda action: action())
    barrier = staticmethod(lambda: None)
folder, seconds, count = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
def make(unit, path):
    print(unit, flush=True)
    time.sleep(seconds)
    path.write_text(str(unit))
all_of_them = units.Units(folder, {}, count, ".txt", Alone)
all_of_them.begin({})
all_of_them.run(make)
"""


def worker(folder, seconds, count=40, lease=60.0):
    command = [sys.executable, "-c", WORKER, str(folder), str(seconds), str(count), str(lease)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def made(process):
    out, _ = process.communicate(timeout=60)
    return [int(line) for line in out.split()]


def is_whole(folder: Path, count=40):
    files = {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(("_plan", "_begun"))}
    return files == {f"unit-{unit:06d}.txt": str(unit) for unit in range(count)}


def test_a_slow_process_does_not_hold_the_rest_and_no_unit_is_made_twice(tmp_path):
    slow, fast = worker(tmp_path, 1.5), worker(tmp_path, 0.02)
    by_fast, by_slow = made(fast), made(slow)
    assert sorted(by_fast + by_slow) == list(range(40))
    assert 1 <= len(by_slow) <= 5
    assert is_whole(tmp_path)


def test_units_of_a_killed_process_are_made_at_once(tmp_path):
    victim = worker(tmp_path, 60)
    victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(list(tmp_path.glob("_claim-*"))) == 1
    began = time.monotonic()
    assert sorted(made(worker(tmp_path, 0))) == list(range(40))
    assert time.monotonic() - began < 20  # not after the lease
    assert is_whole(tmp_path)


def test_units_of_a_process_that_stands_still_are_made_after_its_lease(tmp_path):
    asleep = worker(tmp_path, 1, count=2, lease=1.0)
    asleep.stdout.readline()
    asleep.send_signal(signal.SIGSTOP)
    try:
        assert sorted(made(worker(tmp_path, 0, count=2, lease=1.0))) == [0, 1]
    finally:
        asleep.send_signal(signal.SIGCONT)
    asleep.communicate(timeout=60)
    assert is_whole(tmp_path, count=2)


def test_a_claim_that_is_touched_stays(tmp_path):
    with Claims(tmp_path, lease_seconds=0.6) as holder:
        assert holder.take(0)
        other = Claims(tmp_path, lease_seconds=0.6)
        assert not other.take(0)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            other.take_over(0)
            time.sleep(0.05)
        assert not other.take(0)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_of_another_host_does_not_matter(tmp_path):
    """A claim from a host whose clock is a day behind is no older than what we saw of it."""
    (tmp_path / "_claim-000000").write_text('{"host": "elsewhere", "pid": 1, "started": "1"}')
    os.utime(tmp_path / "_claim-000000", (1, 1))
    here = Claims(tmp_path, lease_seconds=0.3)
    here.take_over(0)
    assert not here.take(0)
    time.sleep(0.4)
    here.take_over(0)
    assert here.take(0)


class Alone:
    rank, world_size = 0, 1
    agree = staticmethod(lambda action: action())
    barrier = staticmethod(lambda: None)


def test_an_error_in_one_thread_ends_the_others_and_leaves_no_claim(tmp_path):
    def make(unit, path):
        if unit == 3:
            raise UserError("no")
        time.sleep(0.01)
        path.write_text("")

    units = Units(tmp_path, {}, 200, ".txt", Alone)
    units.begin({})
    with pytest.raises(UserError):
        units.run(make, workers=4)
    assert len(units.missing()) > 100
    assert not list(tmp_path.glob("_claim-*"))
    with pytest.raises(UserError, match="not all there yet"):
        refuse_partial(tmp_path)
    units.conclude({})
    refuse_partial(tmp_path)


def test_progress_counts_what_all_ranks_have_done(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_train.work.units._SECONDS_BETWEEN_COUNTS", 0.0)
    units = Units(tmp_path, {}, 10, ".txt", Alone)
    units.begin({})

    def make(unit, path):
        path.write_text("")
        units.path(unit + 5).write_text("")  # meanwhile, by another rank

    counts = []
    units.run(make, counts.append)
    assert counts == [2, 4, 6, 8, 10]
    assert units.done() == 10


def test_a_large_folder_is_listed_not_looked_up_file_by_file(tmp_path, monkeypatch):
    units = Units(tmp_path, {}, 20_000, ".txt", Alone)
    for unit in range(0, 20_000, 2):
        units.path(unit).touch()
    looked = []
    monkeypatch.setattr(Path, "exists", lambda path: looked.append(path))
    assert units.missing() == list(range(1, 20_000, 2))
    assert not looked
