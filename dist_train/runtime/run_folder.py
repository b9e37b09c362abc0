"""The layout of a run folder, readable without torch.

RUN/config.yaml         the resolved configuration
RUN/metrics.jsonl       one line of figures for each step
RUN/tensorboard/        the same as curves
RUN/checkpoints/        see train/checkpoint.py
RUN/lease.json          which process writes here, see train/lease.py
RUN/logs/               what each rank did
RUN/profile/            traces of torch's profiler, with log.profile
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from data_shards.errors import DataError
from data_shards.files import FileRecord, Form, file_xxh64, inside, read_json
from dist_train.errors import UserError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOGS = "logs"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"
LATEST = "latest"  # in a run's checkpoint folder: the name of the newest one
MANIFEST = "manifest.json"
MODEL = "model"  # in a checkpoint: the drafter as a Hugging Face folder


class Target(Form):
    """What a run was aligned with, as its manifests have it."""

    path: str


class Loader(Form):
    """Where a run's data stand."""

    step: NonNegativeInt


class State(Form):
    """What a training loop goes on from."""

    loader: Loader
    objective: dict[str, Any]
    guard: dict[str, Any]
    drafter: dict[str, Any]
    probe_loss: float
    tokenizer: str
    target: Target | None


class Manifest(Form):
    """What is in a checkpoint."""

    step: NonNegativeInt
    world_size: PositiveInt
    updates: NonNegativeInt
    files: dict[str, FileRecord]
    state: State


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DataError where it is torn, changed, or not of this version."""
    return read_json(checkpoint / MANIFEST, Manifest)


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a run's checkpoint folder, oldest first; what else is there does not count."""
    found = (path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def run_of(model: Path) -> Path | None:
    """The run folder whose checkpoint has `model` as its drafter; None where it is no run's."""
    checkpoint = model.parent
    run = checkpoint.parent.parent
    return run if (checkpoint / MANIFEST).exists() and (run / CONFIG).exists() else None


def list_checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first, whole or not."""
    return committed(run / CHECKPOINTS)


def verify(folder: Path, below: str = "") -> list[str]:
    """What is wrong with a checkpoint, or with its files whose names begin with `below`, one line each; reads every
    byte of them. Raises UserError where this user may not read it: that says nothing of its state.
    """
    try:
        files = read_manifest(folder)["files"]
        named = {name: (inside(folder, name), record) for name, record in files.items() if name.startswith(below)}
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(str(error)) from error
        return [str(error)]
    found = []
    for name, (path, record) in named.items():
        try:
            if not path.exists():
                found.append(f"{name} is missing")
            elif path.stat().st_size != record["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {record['bytes']}")
            elif file_xxh64(path) != record["xxh64"]:
                found.append(f"{name} has another checksum")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The figures of every step of a run, in order, up to the first line that is none: the half-written last one."""
    if not (run / METRICS).exists():
        return []
    figures = []
    for line in (run / METRICS).read_text(errors="replace").splitlines():
        try:
            figure = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_figure(figure):
            break
        figures.append(figure)
    return figures


def _is_figure(line: Any) -> bool:
    """A loss may be NaN; what is counted may not."""
    if not isinstance(line, dict) or not all(isinstance(value, int | float) for value in line.values()):
        return False
    counted = (line.get("step"), line.get("time"), line.get("progress/tokens", 0))
    return all(value is not None and 0 <= value < 2**60 for value in counted)
