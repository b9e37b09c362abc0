"""Prompt sets: known datasets in their own columns, from the hub or a local copy, and any file of prompts.

The sampling settings of the presets are those of Goel et al. (2024) as recollected, not quoted from the paper: greedy
for summarisation and translation, temperature 0.6 and top-p 0.9 for open-ended text, gamma 3 and 5 for all. The
prompts' wording is ours. German-English translation is out of distribution for a drafter distilled on English
instructions.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_shards.errors import listed
from data_shards.inputs import Record, dataset_files
from dist_train.config import EvaluateConfig, SeedsSection, TaskSection
from dist_train.errors import UserError
from dist_train.prompts.formats import placed_records, refuse_half_characters
from dist_train.prompts.seeds import Seed, because, encode_at, encoded, is_on_side, read_with_ids, refuse_long
from dist_train.tokenizer import Message, Tokenizer
from dist_train.work.units import unit_seed


@dataclass(frozen=True)
class Known:
    """A dataset: the prompt made of a record's fields, where the hub has it, and how its answers are sampled.

    `template`: None where `generate` knows the records, too, under the preset's name, and reads the same prompts.
    """

    template: str | None
    hub: tuple[str, str | None, str] | None = None
    """id, configuration, split"""
    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0


PRESETS = {
    "dolly": Known(None, ("databricks/databricks-dolly-15k", None, "train"), temperatures=(0.6,), top_p=0.9),
    "xsum": Known(
        "Summarize the following article in one sentence.\n\n{document}", ("EdinburghNLP/xsum", None, "test")
    ),
    "cnn_dailymail": Known(
        "Summarize the following article in a few sentences.\n\n{article}", ("abisee/cnn_dailymail", "3.0.0", "test")
    ),
    "wmt18-de-en": Known(
        "Translate the following German text to English.\n\n{translation[de]}", ("wmt/wmt18", "de-en", "test")
    ),
    # A second turn follows the target's answer to the first, which no file has.
    "questions": Known("{turns[0]}"),
}


class Sampling(NamedTuple):
    """How a task is decoded."""

    temperatures: tuple[float, ...]
    top_p: float
    max_new_tokens: int


class Prompts(NamedTuple):
    """A task made ready: token ids of each prompt, and how to decode them."""

    ids: list[list[int]]
    sampling: Sampling
    identity: int = 0
    """equal for equal conversations and templates, whatever date a template writes into them"""


def load_prompts(config: EvaluateConfig, tokenizer: Tokenizer) -> dict[str, Prompts]:
    """Each task by name. Raises UserError or DataError when prompts are missing or two tasks have one name."""
    names = [task.name for task in config.tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"tasks: two are named {min(twice)}; give each a name of its own")
    found = {}
    for task in config.tasks:
        messages, ids, _ = encoded(_read(task, tokenizer), tokenizer.source)
        found[task.name] = Prompts(ids, sampling(task, config), unit_seed(0, messages, tokenizer.chat_template))
    return found


def refuse_long_prompts(tasks: Mapping[str, Prompts], source: str, model: Any, gamma: int = 0) -> None:
    """Raise UserError where a prompt, its answer and the drafts beyond do not fit the positions of a model."""
    for name, prompts in tasks.items():
        more = prompts.sampling.max_new_tokens + gamma
        refuse_long(prompts.ids, more, source, model, "max_tokens", f" in task {name}")


def sampling(task: TaskSection, config: EvaluateConfig) -> Sampling:
    """The task's own settings, else its preset's, else the evaluation's."""
    known = PRESETS[task.preset] if task.preset else None
    temperatures = task.temperatures or (known.temperatures if known else config.temperatures)
    top_p = task.top_p or (known.top_p if known else config.top_p)
    return Sampling(tuple(temperatures), top_p, task.max_new_tokens or config.max_new_tokens)


def read_task(task: TaskSection, tokenizer: Tokenizer) -> list[list[Message]]:
    """The conversations of a task in file order; repeated prompts once.

    Raises UserError where a field of the template is missing or nothing is left, DataError where files are.
    """
    return [seed.messages for seed in _read(task, tokenizer)]


def _read(task: TaskSection, tokenizer: Tokenizer) -> list[Seed]:
    template = task.template or (PRESETS[task.preset].template if task.preset else None)
    if template is None:
        same = task.model_dump(include={"prompt_field", "split", "held_out", "max_tokens", "limit"})
        seeds = SeedsSection(inputs=_inputs(task), format=task.preset or "prompt", turns="last", **same)
        return read_with_ids(seeds, tokenizer, key="")
    found: dict[str, Seed] = {}
    for record, where in placed_records(_inputs(task)):
        prompt = _fill(template, record, where)
        refuse_half_characters(prompt, where)
        messages: list[Message] = [{"role": "user", "content": prompt}]
        if prompt and prompt not in found and is_on_side(messages, task):
            chat = encode_at(messages, where, tokenizer)
            if task.max_tokens is None or len(chat.ids) <= task.max_tokens:
                found[prompt] = Seed(messages, chat, [])
        if len(found) == task.limit:
            break
    if not found:
        raise UserError(f"task {task.name}: no prompts in it{because(task)}")
    return list(found.values())


def _inputs(task: TaskSection) -> str | list[str]:
    if task.inputs is not None:
        return task.inputs
    hub = PRESETS[task.preset].hub if task.preset else None
    assert hub is not None
    return dataset_files(*hub)


_FIELD = re.compile(r"[^\[\]]+(\[[^\[\]]+\])*")


class _Template(string.Formatter):
    """Fields of a record and what lies in them, `{turns[0]}`: texts and numbers, no attributes of Python's objects."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of a field.

        Raises ValueError where that is no field's name, LookupError where the record has none, or something else there.
        """
        if not _FIELD.fullmatch(field_name):
            raise ValueError(f"{field_name!r} is no field")
        name, *keys = field_name.replace("]", "").split("[")
        value = kwargs[name]
        for key in keys:
            if isinstance(value, list) and key.isdecimal():
                value = value[int(key)]
            elif isinstance(value, dict):
                value = value[key]
            else:
                raise LookupError(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # NaN
            raise LookupError(name)
        return value, name


def _fill(template: str, record: Record, where: Callable[[], str]) -> str:
    try:
        return _Template().vformat(template, (), record).strip()
    except LookupError:
        raise UserError(
            f"{where()}: the record does not have what the prompt {template!r} is made of, texts or numbers; its "
            f"fields are {listed(record)}; mend it, take it out, or name another template or preset"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{where()}: template {template!r}: {error}; a field is {{name}} alone, a brace that is meant as such is "
            "doubled"
        ) from None
