"""The folder itself: written beside its place and moved there whole, in one dtype, with the target's special ids."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_shards.files import file_xxh64, fsync, read_json, write_json
from dist_train.errors import UserError
from dist_train.export.reference import Reference
from dist_train.models.drafter import load_drafter
from dist_train.models.load import DTYPES

MARKER = "dist_train_export.json"
"""written last: what was exported, and every file with size and checksum; a folder with it may be replaced"""
_STALE_SECONDS = 3600.0  # a younger temporary folder may be another export's, at work


def write_model(source: Path, folder: Path, reference: Reference, dtype: str) -> None:
    """Write weights cast to `dtype`, config, generation config and the reference's tokenizer into `folder`."""
    model: Any = load_drafter(source, {**DTYPES, "fp16": torch.float16}[dtype])
    from transformers import GenerationConfig

    for name, value in reference.special.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**reference.generation)
    model.save_pretrained(folder)
    _tell_older_readers(folder / "config.json")
    for path in folder.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
        path.chmod((folder / "config.json").stat().st_mode)
    try:
        reference.tokenizer.save(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower for a full disk
        raise OSError(str(error)) from error


def _tell_older_readers(path: Path) -> None:
    """Name RoPE as transformers did before version 5, too: servers with that read it nowhere else."""
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def refuse_foreign(out: Path) -> None:
    """Raise UserError when there is something at `out` that `dist-train export` did not write, or not as it is now."""
    mend = "choose another out, or remove it"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; {mend}")
    present = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()} - {MARKER}
    written = read_json(out / MARKER)["files"] if (out / MARKER).exists() else {}
    if foreign := sorted(present - written.keys()):
        raise UserError(f"{out}: dist-train export did not write {foreign[0]}, which is in there; {mend}")
    if changed := next((name for name in sorted(present) if file_xxh64(out / name) != written[name]["xxh64"]), None):
        raise UserError(f"{out}: {changed} was changed since it was exported; move it away, or choose another out")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary neighbour of `out` to write into; it takes the place of `out` when the block is left well.

    Raises UserError where `out` is not ours to replace, and when the disk is full; then `out` is as it was.
    """
    out = out.resolve()
    refuse_foreign(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    replaced = temporary.with_suffix(".old.tmp")
    try:
        temporary.mkdir(parents=True)
        _remove_stale(out)
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        if out.exists():
            out.replace(replaced)
        temporary.replace(out)
        fsync(out.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{out}: cannot be written: {reason}; free space or choose another out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` and the record of every file in the folder; the last thing that is written there."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh64": file_xxh64(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MARKER, {**content, "files": files})


def _remove_stale(out: Path) -> None:
    """What a killed export left behind, unless it is all that is left of a folder that was being replaced."""
    for path in out.parent.glob(f".{out.name}.*.tmp"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS and (out.exists() or path.suffixes[-2:-1] != [".old"]):
            shutil.rmtree(path, ignore_errors=True)
