"""A pipeline: the stages of one YAML file, each a job that starts when those before it ended well."""

from __future__ import annotations

import glob
import time
from collections.abc import Collection, Mapping
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


def check_wiring(
    config: PipelineConfig, configs: Mapping[str, Any], folders: Mapping[str, Path]
) -> dict[str, set[str]]:
    """The keys of each stage's inputs that stages which it waits for will make.

    Raises UserError where a stage reads what neither exists nor is made by one of those.
    """
    taken: dict[Path, str] = {}
    for name, folder in folders.items():
        if (other := taken.setdefault(folder.resolve(), name)) != name:
            raise UserError(f"stages.{name} and stages.{other} both write to {folder}")
    before: dict[str, set[str]] = {}
    awaited: dict[str, set[str]] = {}
    for name, section in config.stages.items():
        before[name] = {earlier for other in section.after or [] for earlier in (other, *before[other])}
        made = [folders[earlier] for earlier in before[name]]
        inputs = _inputs(configs[name])
        awaited[name] = {key for key, text in [*inputs, *_models(configs[name])] if _is_below(text, made)}
        for key, text in inputs:
            if _is_below(text, made) or glob.glob(text):  # noqa: PTH207, Path.glob takes no absolute pattern
                continue
            late = [other for other, folder in folders.items() if _is_below(text, [folder])]
            mend = f"; stages.{late[0]} makes it: name it in after" if late else ""
            raise UserError(f"stages.{name}.config: {key}: no {text} here, and no stage before makes it{mend}")
    return awaited


def check_rest(config: Any, awaited: Collection[str]) -> None:
    """What a stage reads, save the `awaited` keys, as its own check would. Raises UserError or DataError."""
    from dist_train.evaluate.tasks import load_prompts
    from dist_train.models.load import read_target_config
    from dist_train.models.pairing import check_drafter
    from dist_train.models.target_tokenizer import load_target_tokenizer
    from dist_train.prompts.seeds import read_all_seeds
    from dist_train.train.stage import check_corpus

    given = {key: text for key, text in [*_inputs(config), *_models(config)] if key not in awaited}
    target = config.target if "target.path" in given else None
    size = read_target_config(target).vocab_size if target else None
    tokenizer, trains = None, hasattr(config, "data")
    if "tokenizer" in given:
        template = getattr(config, "chat_template", None)
        tokenizer = load_target_tokenizer(target, given["tokenizer"], template, strict=not trains)
    for key, text in given.items():
        if key.startswith("drafter"):
            check_drafter(Path(text), key, size, tokenizer)
        elif key.startswith(("data.", "held_out.")) and tokenizer is not None:
            check_corpus(Path(text), tokenizer, config)
    if tokenizer is None:
        return
    renders = target is not None or bool(tokenizer.chat_template)  # else it may come with the target
    if seeds := [section for key, section in _seeds(config) if f"{key}.inputs" not in awaited]:
        unlimited = [section.model_copy(update={"min_tokens": 0, "max_tokens": None}) for section in seeds]
        read_all_seeds(seeds if renders else unlimited, tokenizer if renders else None)
    if renders and hasattr(config, "tasks"):
        tasks = [task for i, task in enumerate(config.tasks) if f"tasks.{i}.inputs" not in awaited]
        load_prompts(config.model_copy(update={"tasks": tasks}), tokenizer)


def _inputs(config: Any) -> list[tuple[str, str]]:
    """(key, path) of what a stage reads and another may have made; addresses of other file systems are left out."""
    found: list[tuple[str, Any]] = []
    if hasattr(config, "data"):
        found += [(f"data.sources.{i}.path", source.path) for i, source in enumerate(config.data.sources)]
        found += [("drafter.init_from", config.drafter.init_from)]
        found += [("held_out.path", config.held_out.path)] if config.held_out else []
    tasks = [(f"tasks.{i}.inputs", task) for i, task in enumerate(getattr(config, "tasks", []))]
    for key, section in [("inputs", config), *((f"{key}.inputs", section) for key, section in _seeds(config)), *tasks]:
        inputs = getattr(section, "inputs", None) or []
        found += [(key, one) for one in ([inputs] if isinstance(inputs, str) else inputs)]
    found += [(f"drafters.{name}", path) for name, path in getattr(config, "drafters", {}).items()]
    return [(key, str(path)) for key, path in found if path is not None and "://" not in str(path)]


def _seeds(config: Any) -> list[tuple[str, Any]]:
    """(key, section) of all seeds of a configuration of generate."""
    if not hasattr(config, "seeds"):
        return []
    return [("seeds", config.seeds), *((f"more_seeds.{i}", section) for i, section in enumerate(config.more_seeds))]


def _models(config: Any) -> list[tuple[str, str]]:
    """(key, path or hub id) of tokenizer and target."""
    target = getattr(config, "target", None)
    source = config.tokenizer or (target.path if target else "")
    return [("tokenizer", source), *([("target.path", target.path)] if target else [])]


def _is_below(text: str, folders: Collection[Path]) -> bool:
    return any(Path(text).resolve().is_relative_to(folder.resolve()) for folder in folders)


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
