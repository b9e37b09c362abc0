"""Independent pieces of work, one file each, shared out over ranks; a rerun makes those that are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_shards.files import read_json, write_json
from dist_train.errors import UserError
from dist_train.runtime import Runtime

PLAN = "_plan.json"  # readers of a folder of answers pass over names that begin with an underscore


class Units:
    """The units of one output folder: numbers 0 to `count` - 1, each done when its file is there.

    What a unit holds is decided by `plan` and its number, never by the rank that makes it, so the outcome is the same
    for any number of ranks. Raises UserError, on all ranks, when the folder holds the outcome of another plan.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], count: int, suffix: str, runtime: Runtime) -> None:
        self.folder, self.count, self.suffix, self.runtime = folder, count, suffix, runtime
        runtime.agree(lambda: _adopt(folder, plan))

    def path(self, unit: int) -> Path:
        """Where the outcome of a unit is."""
        return self.folder / f"unit-{unit:06d}{self.suffix}"

    def mine(self) -> Iterator[int]:
        """This rank's units that are not done yet."""
        for unit in range(self.runtime.rank, self.count, self.runtime.world_size):
            if not self.path(unit).exists():
                yield unit

    def run(self, make: Callable[[int, Path], None], progress: Callable[[int], None] | None = None) -> None:
        """Call `make(unit, path)` for each of this rank's units, then wait for the other ranks. Collective.

        `progress` gets the number of this rank's finished units, those found finished included.
        """
        share = len(range(self.runtime.rank, self.count, self.runtime.world_size))
        missing = list(self.mine())
        for done, unit in enumerate(missing, start=share - len(missing)):
            make(unit, self.path(unit))
            if progress:
                progress(done + 1)
        self.runtime.barrier()


def unit_seed(seed: int, *what: object) -> int:
    """A random seed for one piece of work, from the run's seed and the names of the piece; below 2^63."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _adopt(folder: Path, plan: dict[str, Any]) -> None:
    if (folder / PLAN).exists():
        found = read_json(folder / PLAN)
        changed = sorted(key for key in plan.keys() | found.keys() if plan.get(key) != found.get(key))
        if changed:
            raise UserError(
                f"{folder}: holds work begun with another {', '.join(changed)}; remove it or write elsewhere"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another folder") from error
    write_json(folder / PLAN, plan)
