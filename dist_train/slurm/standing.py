"""How far the work of a stage has come, read from what it has committed. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_shards.format import INDEX
from dist_train.run_folder import CHECKPOINTS, committed

TRAINING = ("pretrain", "distill")
_UNITS = {"prepare": "shard", "generate": "batch", "evaluate": "batch"}
_PIECES = {"prepare": "shard-*.json", "generate": "unit-*.parquet", "evaluate": "units/unit-*.json"}
_LAST = {"prepare": INDEX, "generate": "_statistics.json", "evaluate": "results.json"}  # each written last


@dataclass(frozen=True)
class Standing:
    """`done` of `total` pieces are committed; `total` is None where it is not known without reading all inputs."""

    done: int
    total: int | None
    unit: str
    finished: bool

    def __str__(self) -> str:
        """As a line of a log has it."""
        plural = {"batch": "batches"}.get(self.unit, f"{self.unit}s")
        of = f" of {self.total:,}" if self.total is not None else ""
        return f"{self.done:,}{of} {plural if (self.total or self.done) != 1 else self.unit}"


def standing(stage: str, folder: Path, steps: int | None = None) -> Standing:
    """Where the stage that writes to `folder` stands; `steps` are those of a training's configuration."""
    if stage in TRAINING:
        newest = committed(folder / CHECKPOINTS)[-1:]
        done = max((int(checkpoint.name.removeprefix("step-")) for checkpoint in newest), default=0)
        return Standing(done, steps, "step", steps is not None and done >= steps)
    finished = (folder / _LAST[stage]).exists()
    done = sum(1 for _ in folder.glob(_PIECES[stage]))
    return Standing(done, done if finished else None, _UNITS[stage], finished)
