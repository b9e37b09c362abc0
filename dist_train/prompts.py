"""Seed instructions and evaluation prompts: read, cleaned of duplicates, rendered as chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data_shards.inputs import find_files, plan_units, read_records
from dist_train.config import SeedsSection
from dist_train.errors import UserError
from dist_train.tokenizer import Message, Tokenizer

ROLES = ("system", "user", "assistant")


def read_seeds(section: SeedsSection) -> list[list[Message]]:
    """The conversations of a source in file order, each up to where the answer begins; repeated ones once.

    The prompt field holds a text or a list of `{"role", "content"}` messages. Raises UserError when it is missing, and
    when nothing is left.
    """
    seen: set[str] = set()
    found: list[list[Message]] = []
    for unit in plan_units(find_files(section.inputs)):
        for record in read_records(unit):
            messages = _messages(record, section.prompt_field, unit.path)
            key = json.dumps(messages)
            if messages and key not in seen:
                seen.add(key)
                found.append(messages)
            if len(found) == section.limit:
                return found
    if not found:
        raise UserError(f"{section.inputs}: no prompts in it")
    return found


def encode_seeds(seeds: Sequence[Sequence[Message]], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each conversation, up to where the answer begins."""
    return [tokenizer.encode_prompt(messages) for messages in seeds]


def _messages(record: dict[str, Any], field: str, path: str) -> list[Message]:
    value = record.get(field)
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if isinstance(value, list) and all(isinstance(m, dict) and m.get("role") in ROLES for m in value):
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # the answer is what is wanted
        return messages
    raise UserError(
        f"{path}: a record has no prompt in {field!r} (a text or chat messages); its fields are {', '.join(record)}"
    )
