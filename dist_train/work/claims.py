"""Who makes which unit of an output folder, told by files in it.

A claim is a file that only one process can create. The process that holds it touches it while it lives; one that stands
still is its holder's last trace, and anybody may take the unit again. Files serve the ranks of one job and the elements
of a SLURM array alike, which have no process group in common, and a shared file system is what they all have. Claims
only keep two processes from doing the same work: that no outcome is lost or twice there is owed to each unit's being
one file, written whole. So a clock or a file system that misbehaves costs time, never data.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from data_shards.errors import DataError

PREFIX = "_claim-"
LEASE_SECONDS = 60.0


class Claims:
    """The claims in one folder, as one process sees and makes them; a thread keeps its own alive in the `with` block.

    Whether another's stands still is measured by this process's own clock, so that hosts need not agree on the time;
    of a process of this host that is gone it is known at once.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self._folder, self._lease = folder, lease_seconds
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._held: set[Path] = set()
        self._watched: dict[int, tuple[float, float]] = {}  # unit: when it was last touched, and when we saw that
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Claims:
        """Begin to keep claims alive."""
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give up what is held."""
        self._ended.set()
        self._beat.join()
        for path in list(self._held):
            path.unlink(missing_ok=True)

    def take(self, unit: int) -> bool:
        """Claim a unit; False when another process or thread has it. Raises DataError where nothing can be written."""
        path = self._path(unit)
        try:
            with path.open("x") as file:
                self._held.add(path)
                json.dump(self._me, file)
        except FileExistsError:
            return False
        except OSError as error:
            self.release(unit)
            raise DataError(
                f"{path}: cannot be written: {error.strerror}; free space or choose another folder"
            ) from error
        return True

    def release(self, unit: int) -> None:
        """Let go of a unit."""
        self._held.discard(self._path(unit))
        self._path(unit).unlink(missing_ok=True)

    def take_over(self, unit: int) -> None:
        """Remove another's claim if its holder is dead, or has not touched it for as long as the lease."""
        path = self._path(unit)
        try:
            touched = path.stat().st_mtime
            dead = self._is_dead(path)
        except OSError:
            return  # released meanwhile
        seen = self._watched.get(unit)
        if seen is None or seen[0] != touched:
            self._watched[unit] = seen = (touched, time.monotonic())
        if dead or time.monotonic() - seen[1] > self._lease:
            del self._watched[unit]
            path.unlink(missing_ok=True)

    def _is_dead(self, path: Path) -> bool:
        try:
            holder = json.loads(path.read_text())
            here = holder["host"] == self._me["host"]
            return here and holder["started"] is not None and _started(holder["pid"]) != holder["started"]
        except (ValueError, KeyError, TypeError):
            return False  # being written, or its holder died before it was

    def _path(self, unit: int) -> Path:
        return self._folder / f"{PREFIX}{unit:06d}"

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._lease / 6):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)


def _started(pid: int) -> str | None:
    """When a process of this host began, in the kernel's own count; None where there is none, or no /proc to say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc(5); the name in brackets may hold anything
