"""How a drafter came to be, as its run folders tell it; without paths of the machine it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.config.read import read_yaml
from dist_train.errors import UserError
from dist_train.models.drafter import find_model
from dist_train.models.gguf import gguf_name
from dist_train.runtime.run_folder import CONFIG, read_manifest, run_of


def training_provenance(drafter: Path) -> list[dict[str, Any]]:
    """One entry for each run that made the drafter, the first one first; empty where it came from no run of ours.

    A run that was warm-started names the run before it. Raises UserError on a torn configuration, DataError on a
    torn manifest.
    """
    found: list[dict[str, Any]] = []
    at: Path | None = drafter
    while at is not None:
        try:
            model = find_model(at)
        except UserError:  # the run before is gone, or on another machine
            break
        run = run_of(model)
        if run is None:
            break
        config = read_yaml(run / CONFIG)
        manifest = read_manifest(model.parent)
        try:
            found.insert(0, _entry(config, manifest))
            before = config["drafter"].get("init_from")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{run / CONFIG}: torn or changed; restore it") from error
        at = Path(before) if before else None
    return found


def public_name(path: str) -> str:
    """A hub id as it is, of a path the last part, and of what was unpacked from a GGUF file that file's name."""
    return path if is_hub_id(path) else gguf_name(path) or Path(path).name


def is_hub_id(path: str) -> bool:
    """Whether `path` is `owner/name`, and no folder here."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _entry(config: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    train, data, steps = config["train"], config["data"], manifest["step"]
    entry: dict[str, Any] = {
        "objective": config["objective"],
        "data": [_source(source) for source in data["sources"]],
        "sequence_length": data["sequence_length"],
        "steps": steps,
        "tokens": steps * train["global_batch"] * data["sequence_length"],
        "global_batch": train["global_batch"],
        "learning_rate": train["learning_rate"],
        "precision": train["precision"],
        "ranks": manifest["world_size"],
    }
    if target := manifest["state"]["target"]:
        entry["target"] = {**target, "path": public_name(target["path"])}
    return entry


def _source(source: dict[str, Any]) -> dict[str, Any]:
    share = {key: source[key] for key in ("weight", "epochs") if source.get(key)}
    return {"name": public_name(source["path"]), **share}
