"""A pipeline: the stages of one YAML file, each a job that starts when those before it ended well."""

from __future__ import annotations

import glob
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.config import PipelineConfig, PipelineStage, Section, load_config, save_config
from dist_train.config.read import read_tree
from dist_train.errors import UserError
from dist_train.slurm.journal import PREFIX


def load_stage(name: str, section: PipelineStage, kind: type[Section]) -> Any:
    """The configuration of one stage. Raises UserError that names the section."""
    if isinstance(section.config, str):
        return load_config(kind, Path(section.config))
    return read_tree(kind, section.config, f"stages.{name}.config")


def check_wiring(config: PipelineConfig, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> None:
    """Raise UserError where a stage reads what neither exists nor is made by a stage that it waits for."""
    taken: dict[Path, str] = {}
    for name, folder in folders.items():
        if (other := taken.setdefault(folder.resolve(), name)) != name:
            raise UserError(f"stages.{name} and stages.{other} both write to {folder}")
    before: dict[str, set[str]] = {}
    for name, section in config.stages.items():
        before[name] = {earlier for other in section.after or [] for earlier in (other, *before[other])}
        made = [folders[earlier].resolve() for earlier in before[name]]
        for key, text in _inputs(configs[name]):
            found = glob.glob(text)  # noqa: PTH207, Path.glob takes no absolute pattern
            if found or any(Path(text).resolve().is_relative_to(folder) for folder in made):
                continue
            late = [other for other, folder in folders.items() if Path(text).resolve().is_relative_to(folder.resolve())]
            mend = f"; stages.{late[0]} makes it: name it in after" if late else ""
            raise UserError(f"stages.{name}.config: {key}: no {text} here, and no stage before makes it{mend}")


def _inputs(config: Any) -> list[tuple[str, str]]:
    """(key, path) of what a stage reads and another may have made; addresses of other file systems are left out."""
    found: list[tuple[str, Any]] = []
    if hasattr(config, "data"):
        found += [(f"data.sources.{i}.path", source.path) for i, source in enumerate(config.data.sources)]
        found += [("drafter.init_from", config.drafter.init_from)]
        found += [("held_out.path", config.held_out.path)] if config.held_out else []
    for key, section in (("inputs", config), ("seeds.inputs", getattr(config, "seeds", None))):
        inputs = getattr(section, "inputs", [])
        found += [(key, one) for one in ([inputs] if isinstance(inputs, str) else inputs)]
    found += [(f"drafters.{name}", path) for name, path in getattr(config, "drafters", {}).items()]
    return [(key, str(path)) for key, path in found if path is not None and "://" not in str(path)]


def keep_config(config: Section, folder: Path, stage: str, *, dry_run: bool) -> Path:
    """The resolved configuration as a file beside the stage's output: what is queued is what was submitted."""
    path = folder / f"{PREFIX}{stage}-{time.strftime('%Y%m%d-%H%M%S')}.yaml"
    if not dry_run:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path
