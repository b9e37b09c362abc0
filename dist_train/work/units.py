"""Independent pieces of work, one file each, shared out over ranks; a rerun makes those that are missing."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from data_shards.files import read_json, remove_stale, write_json
from dist_train.errors import RankError, UserError
from dist_train.runtime.interrupts import one_interrupt, results
from dist_train.runtime.process_group import Runtime
from dist_train.work.claims import LEASE_SECONDS, PREFIX, Claims

PLAN = "_plan.json"  # readers of a folder of answers pass over names that begin with an underscore
BEGUN = "_begun.json"
COMPLETE = "_complete.json"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_COUNTS = 5.0  # listing a large folder of a parallel file system takes a moment


class Units:
    """The units of one output folder: numbers 0 to `count` - 1, each done when its file is there.

    What a unit holds is decided by `plan` and its number, never by the rank that makes it, so the outcome is the same
    for any number of ranks. Raises UserError, on all ranks, when the folder holds the outcome of another plan.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], count: int, suffix: str, runtime: Runtime) -> None:
        self.folder, self.count, self.suffix, self.runtime = folder, count, suffix, runtime
        self._plan = plan
        runtime.agree(self._open)

    def begin(self, facts: dict[str, Any]) -> None:
        """Write the plan down, and `facts`, what is known only to those who work; before the first `run`. Collective.

        Only from here on is the folder bound to them, so what may fail before a unit can be made comes first. Raises
        UserError, on all ranks, where either was another when work began.
        """
        self.runtime.agree(partial(self._bind, facts))

    def path(self, unit: int) -> Path:
        """Where the outcome of a unit is."""
        return self.folder / f"unit-{unit:06d}{self.suffix}"

    def missing(self) -> list[int]:
        """The units that are not done, found by listing the folder once."""
        return self._look()[0]

    def done(self) -> int:
        """How many are done, by all ranks and jobs, found likewise."""
        return self.count - len(self.missing())

    def run(
        self, make: Callable[[int, Path], None], progress: Callable[[int], None] | None = None, workers: int = 1
    ) -> None:
        """Have `make(unit, path)` called for every missing unit, by whichever rank is free; return when all are done.

        A rank takes the next unit that nobody has, so that a slow one does not hold the rest; ranks of other jobs that
        work on the same folder share it too, and units of ranks that died are made again. Collective. `workers`:
        threads that call `make`; 1: this one. `progress` gets the number of finished units, of all ranks and jobs by
        the last look at the folder. Ctrl-C drops the units under way; where threads make them, these go on until the
        process ends.
        """
        with Claims(self.folder) as claims:
            queue = _Queue(self, claims)
            work = partial(self._work, queue, make, progress)
            try:
                with one_interrupt(queue.close):
                    if workers == 1:
                        work()
                    else:
                        _in_threads(work, workers)
            except (UserError, DataError) as error:
                if self.runtime.world_size == 1:
                    raise
                raise RankError(f"rank {self.runtime.rank}: {error}") from error
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on with what is missing") from None
        self.runtime.barrier()

    def conclude(self, facts: dict[str, Any]) -> None:
        """Mark the folder as whole, with what is to be known of it; the last thing that is written."""
        for claim in self.folder.glob(f"{PREFIX}*"):
            claim.unlink(missing_ok=True)  # of a process that was killed when its unit was there, before it let go
        remove_stale(self.folder, LEASE_SECONDS)
        write_json(self.folder / COMPLETE, {"units": self.count, **facts})

    def _open(self) -> None:
        refuse_other_plan(self.folder, self._plan)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made: {error.strerror}; choose another folder") from error

    def _bind(self, facts: dict[str, Any]) -> None:
        _adopt(self.folder / PLAN, self._plan)
        _adopt(self.folder / BEGUN, facts)

    def _work(
        self, queue: _Queue, make: Callable[[int, Path], None], progress: Callable[[int], None] | None = None
    ) -> None:
        try:
            while (unit := queue.take()) is not None:
                make(unit, self.path(unit))
                done = queue.finish(unit)
                if progress:
                    progress(done)
        finally:
            queue.close()  # no more for anybody: all is done, or this thread ends with an error

    def _look(self) -> tuple[list[int], set[int]]:
        """The missing units, and those that somebody has claimed."""
        done, claimed = set(), set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith("unit-") and entry.name.endswith(self.suffix):
                    done.add(entry.name[len("unit-") : -len(self.suffix)])
                elif entry.name.startswith(PREFIX):
                    claimed.add(entry.name[len(PREFIX) :])
        missing = [unit for unit in range(self.count) if f"{unit:06d}" not in done]
        return missing, {unit for unit in missing if f"{unit:06d}" in claimed}


class _Queue:
    """What a process may still take, for its threads."""

    def __init__(self, units: Units, claims: Claims) -> None:
        self._units, self._claims = units, claims
        self._lock = threading.Lock()
        self._free: deque[int] = deque()
        self._looked = self._closed = False
        self._done, self._looked_at = 0, 0.0

    def take(self) -> int | None:
        """A unit that nobody else has, now claimed; None when all are done. Waits while the last are with others."""
        while not self._closed:
            with self._lock:
                while self._free:
                    unit = self._free.popleft()
                    if self._claims.take(unit):
                        if not self._units.path(unit).exists():
                            return unit
                        self._claims.release(unit)
                    self._free.clear()  # somebody else is at work from here on: look again, and begin elsewhere
                missing, claimed = self._look()
                if not missing:
                    return None
                free = [unit for unit in missing if unit not in claimed]
                self._free.extend(self._rotated(free))
                for unit in claimed if not free else ():
                    self._claims.take_over(unit)
            if not free:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        return None

    def finish(self, unit: int) -> int:
        """Let go of a unit whose file is there; how many are done, of others' those that were there a moment ago."""
        self._claims.release(unit)
        with self._lock:
            self._done += 1
            if time.monotonic() - self._looked_at > _SECONDS_BETWEEN_COUNTS:
                self._look()
            return min(self._done, self._units.count)

    def close(self) -> None:
        """Hand out nothing more."""
        self._closed = True

    def _look(self) -> tuple[list[int], set[int]]:
        missing, claimed = self._units._look()
        self._done, self._looked_at = self._units.count - len(missing), time.monotonic()
        return missing, claimed

    def _rotated(self, free: list[int]) -> list[int]:
        """Begin apart: ranks each at their share, at a later look anywhere, so that jobs that met do not meet again."""
        runtime = self._units.runtime
        first = random.randrange(max(1, len(free))) if self._looked else runtime.rank * len(free) // runtime.world_size
        self._looked = True
        return free[first:] + free[:first]


def refuse_partial(folder: Path) -> None:
    """Raise UserError when `folder` holds units of a run that has not ended."""
    if (folder / PLAN).exists() and not (folder / COMPLETE).exists():
        raise UserError(
            f"{folder}: its answers are not all there yet; start generate again to go on, or name the files "
            f"('{folder}/unit-*.parquet') to take what there is"
        )


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Call `work` in `count` threads, and wait for them all; unless by Ctrl-C, for they may be long."""
    threads, is_patient = ThreadPoolExecutor(count), True
    try:
        for _ in results([threads.submit(work) for _ in range(count)]):
            pass
    except KeyboardInterrupt:
        is_patient = False
        raise
    finally:
        threads.shutdown(is_patient)


def unit_seed(seed: int, *what: object) -> int:
    """A random seed for one piece of work, from the run's seed and the names of the piece; below 2^63."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def refuse_other_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raise UserError where `folder` holds units of another plan; before anything starts, and without writing."""
    _refuse_other(folder / PLAN, plan)


def _refuse_other(path: Path, facts: dict[str, Any]) -> None:
    try:
        found = read_json(path) if path.exists() else facts
    except DataError as error:
        raise UserError(
            f"{error}; nothing else tells what {path.parent} holds: restore it, or write elsewhere"
        ) from error
    if changed := _changed(facts, found):
        done = "" if any(path.parent.glob("unit-*")) else ", of which no unit is done"
        raise UserError(
            f"{path.parent}: holds work that was begun otherwise: {', '.join(changed)}{done}; start it as it was, "
            "remove it, or write elsewhere"
        )


def _changed(facts: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The keys whose values differ, with what differs within them."""
    names = []
    for key in sorted(facts.keys() | found.keys()):
        mine, theirs = facts.get(key), found.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            within = _changed(mine, theirs)
            names += [f"{key} ({', '.join(within)})"] if within else []
        elif mine != theirs:
            names.append(key)
    return names


def _adopt(path: Path, facts: dict[str, Any]) -> None:
    if path.exists():
        _refuse_other(path, facts)
    else:
        write_json(path, facts)
