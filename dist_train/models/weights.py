"""The files of a model's weights, as far as can be told without reading them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_shards.errors import first_line
from dist_train.errors import UserError

INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LFS = b"version https://git-lfs"


def weight_files(folder: Path) -> list[str]:
    """The files that the index of a Hugging Face folder names, or the only one. Raises UserError on a torn index."""
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        outside = next((name for name in names if Path(name).name != name or "\0" in name), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: torn, no index of weights; fetch it again") from error
    if outside is not None:
        raise UserError(f"{folder / INDEX}: names {outside!r}, a file of another folder; fetch it again")
    return names


def refuse_unreadable_weights(folder: Path) -> None:
    """Raise UserError naming the file of a Hugging Face folder that is missing, cut, no safetensors, or pickled.

    Of what is no folder here nothing is known.
    """
    if not folder.is_dir():
        return
    names = weight_files(folder)
    if not any((folder / name).exists() for name in names):
        if pickled := next((path.name for kind in _PICKLED for path in sorted(folder.glob(kind))), None):
            raise UserError(
                f"{folder}: its weights are pickled ({pickled}), which can run code when read; convert them where that "
                "does no harm: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) writes safetensors"
            )
        raise UserError(f"{folder}: a configuration without weights; fetch the rest (hf download)")
    for name in names:
        _refuse_unreadable(folder / name)


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"{path}: a pointer of git-lfs, not the file; fetch that (git lfs pull, hf download)")
        with safe_open(path, framework="pt"):  # compares the file's size with its header, and reads no more
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; fetch it again (hf download)") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {first_line(error)}; fetch it again (hf download)") from error
