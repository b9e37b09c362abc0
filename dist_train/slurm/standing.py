"""How far the work of a stage has come, read from what it has committed. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import NonNegativeInt, PositiveInt, Strict

from data_shards.files import Form, read_json
from data_shards.format import INDEX
from data_shards.inputs import InputFile, count_units
from data_shards.prepare import PLAN
from dist_train.runtime.run_folder import CHECKPOINTS, committed

TRAINING = ("pretrain", "distill")
_UNITS = {"prepare": "shard", "generate": "batch", "evaluate": "batch"}
_PIECES = {"prepare": "shard-*.json", "generate": "unit-*.parquet", "evaluate": "units/unit-*.json"}
_LAST = {"prepare": INDEX, "generate": "_complete.json", "evaluate": "units/_complete.json"}  # each written last
STAGES = (*TRAINING, *_UNITS)


class _Index(Form):
    shards: list[dict[str, Any]]


class _Complete(Form):
    units: NonNegativeInt


class _Plan(Form):
    inputs: list[Annotated[tuple[str, NonNegativeInt], Strict(False)]]
    unit_bytes: PositiveInt


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
    done, last = sum(1 for _ in folder.glob(_PIECES[stage])), folder / _LAST[stage]
    if not last.exists():
        return Standing(done, _planned(folder) if stage == "prepare" else None, _UNITS[stage], False)
    if stage == "prepare":  # the index took the place of the pieces' own records
        done = total = len(read_json(last, _Index)["shards"])
    else:
        total = read_json(last, _Complete)["units"]
    return Standing(done, total, _UNITS[stage], done >= total)


def _planned(folder: Path) -> int | None:
    """Shards that a corpus which was begun will have; None where only the files themselves tell how they are cut."""
    if not (folder / PLAN).exists():
        return None
    plan = read_json(folder / PLAN, _Plan)
    return count_units([InputFile(*file) for file in plan["inputs"]], plan["unit_bytes"])
