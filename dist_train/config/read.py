"""From YAML and `section.key=value` overrides to a typed tree, and back."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_shards.files import write_atomically
from dist_train.config.base import ConfigType, Section, suggest
from dist_train.config.yaml_text import parse_yaml
from dist_train.errors import UserError


def load_config(kind: type[ConfigType], path: Path | str | None = None, overrides: Sequence[str] = ()) -> ConfigType:
    """Read `path` (YAML; None: nothing), apply `section.key=value` overrides in order, and validate.

    Values are YAML, so `train.steps=100`, `objective={kld: 1}` and `data.sources=[{path: shards}]` work; a number
    selects an entry of a list. Raises UserError with one line that names each key at fault and the nearest known one.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    return read_tree(kind, tree, str(path) if path else "arguments")


def read_tree(kind: type[ConfigType], tree: dict[str, Any], origin: str) -> ConfigType:
    """Validate a tree of plain values. Raises UserError with one line that begins with `origin`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(kind, error, origin)) from None


def save_config(config: Section, path: Path) -> None:
    """Write the resolved tree as YAML; `load_config` reads it back to an equal one.

    A link at `path` is replaced, and never written through: where it leads is not ours.
    """
    write_atomically(path, [dump_config(config).encode()])


def dump_config(config: Section) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def describe(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, help) of every leaf below `kind`, in the order of the code; a required key has the default ''."""
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        section = _section_of(field.annotation)
        if section is not None and not _is_collection(field.annotation):
            yield from describe(section, f"{key}.")
        else:
            default = "" if field.is_required() else yaml.safe_dump(field.get_default(call_default_factory=True))
            yield key, default.removesuffix("...\n").strip().replace("\n", " "), field.description or ""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises UserError where there is none."""
    try:
        tree = parse_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path}: not YAML: {error}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys, this is a {type(tree).__name__}")
    return tree or {}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise UserError(f"{override[:200]!r}: the value is not YAML; quote it") from None
    *sections, leaf = key.split(".")
    node: Any = tree
    try:
        for section in sections:
            if isinstance(node, list):
                node = node[int(section)]
                continue
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
        node[int(leaf) if isinstance(node, list) else leaf] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(f"{override!r}: {key} lies below something that has no keys") from None


def _explain(kind: type[Section], error: ValidationError, origin: str) -> str:
    """One line for all faults; of mistyped keys alone where there are any, because they often cause the others."""
    faults = error.errors()
    faults = [fault for fault in faults if fault["type"] == "extra_forbidden"] or faults
    lines = []
    for fault in faults[:3]:
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known, word = _keys_at(kind, fault["loc"][:-1]), str(fault["loc"][-1])
            lines.append(f"unknown key {key}{suggest(word, known, key.removesuffix(word))}")
        elif fault["type"] == "missing":
            lines.append(f"{key} is required")
        else:
            lines.append(f"{key}{': ' if key else ''}{fault['msg'].removeprefix('Value error, ')}")
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"{origin}: {'; '.join(lines)}{more}"


def _keys_at(kind: type[Section], location: Sequence[int | str]) -> list[str]:
    """The keys of the section at a location of the tree."""
    section: type[Section] | None = kind
    for part in location:
        if section is not None and part in section.model_fields:
            section = _section_of(section.model_fields[str(part)].annotation)
    return list(section.model_fields) if section else []


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as `X`, `X | None`, `list[X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Section) else None
    return next((found for part in typing.get_args(annotation) if (found := _section_of(part))), None)


def _is_collection(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, dict)
