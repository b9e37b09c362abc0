"""Who may write into a run folder: the process that began last.

A rank 0 left over from a node that SLURM took for dead may come back and go on. Its successor has taken the lease, so
it sees that at its next look, and ends before it commits anything.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from data_shards.files import read_json, write_json
from dist_train.errors import UserError

_SECONDS_BETWEEN_LOOKS = 1.0


class Lease:
    """`RUN/lease.json`: taken by rank 0 of a run that begins, asked by it before it writes."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lease.json"
        self._id = uuid.uuid4().hex
        self._looked, self._lost = time.monotonic(), False

    def take(self) -> None:
        """From now on this process writes here, and whoever did before does not. Raises DataError on a full disk."""
        job, start = _slurm()
        held = self._read()
        if job is not None and held.get("job") == job and held["start"] > start:
            raise UserError(f"{self.path.parent}: a later start of this job ({held['start']}) has begun already")
        holder = {"id": self._id, "job": job, "start": start, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.path, holder)

    @property
    def lost(self) -> bool:
        """Whether another process has taken it; looks at the disk at most once a second."""
        if not self._lost and time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            self._lost = self._is_anothers(self._read())
        return self._lost

    def check(self) -> None:
        """Raise UserError when another process has taken it."""
        held = self._read()
        if self._is_anothers(held):
            raise UserError(self.complaint(held))

    def complaint(self, held: dict[str, Any] | None = None) -> str:
        """What to say when it is lost."""
        held = held or self._read()
        job = f"job {held.get('job')}, start {held.get('start')}, " if held.get("job") else ""
        who = f"{job}process {held['pid']} on {held['host']}" if "pid" in held else "another process"
        return f"{self.path.parent}: now written by {who}; this process ends without writing more"

    def _is_anothers(self, held: dict[str, Any]) -> bool:
        """Only an id that was read tells that: a look that fails (ESTALE, EIO, a file server's bad moment) does not."""
        return held.get("id", self._id) != self._id

    def _read(self) -> dict[str, Any]:
        """Who holds it; empty where the look failed."""
        try:
            return read_json(self.path)
        except DataError:
            return {}


def _slurm() -> tuple[str | None, int]:
    """The job and how many times it was started, under SLURM."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
