"""From the records of well-known instruction sets to conversations that end where an answer is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_shards.inputs import Record
from dist_train.config import SeedsSection
from dist_train.errors import UserError
from dist_train.tokenizer import Message

Conversation = list[Message]

_ROLES = {
    **{"system": "system", "user": "user", "assistant": "assistant"},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}


def conversations(records: Iterable[Record], section: SeedsSection) -> Iterator[Conversation]:
    """The conversations in `records`, in their order. Raises UserError naming the fields of one that has none."""
    turns = section.turns or ("first" if section.format == "openassistant" else "last")
    if section.format == "openassistant":
        yield from _trees(records, turns, section)
        return
    read = _READERS[section.format]
    for record in records:
        messages = read(record, section)
        if messages is None:
            raise UserError(
                f"{section.source}: a record has no prompt {_WANTED[section.format].format(section.prompt_field)}; "
                f"its fields are {', '.join(record)}"
            )
        yield from _cut(messages, turns)


def _cut(messages: Conversation, turns: str) -> Iterator[Conversation]:
    """What goes up to the first, the last or each user message that says something."""
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "user" and message["content"].strip()]
    if turns != "each":
        ends = ends[:1] if turns == "first" else ends[-1:]
    for end in ends:
        yield messages[:end]


# -- one record, one conversation: None where the record is not of the format ---------------------------------------


def _prompt(record: Record, section: SeedsSection) -> Conversation | None:
    value = record.get(section.prompt_field)
    return _user(value) if isinstance(value, str) else _messages(value)


def _chat(record: Record, section: SeedsSection) -> Conversation | None:
    return next((_messages(record[name]) for name in ("messages", "conversations") if name in record), None)


def _oig(record: Record, section: SeedsSection) -> Conversation | None:
    """OIG-small-chip2: `user` and `chip2`, or one text of `<human>: ... <bot>: ...`."""
    if isinstance(record.get("user"), str):
        return _user(record["user"])
    text = record.get("text")
    if not isinstance(text, str) or not text.lstrip().startswith("<human>:"):
        return None
    _, *parts = re.split(r"<(human|bot)>:", text)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _instruction(context_field: str) -> Callable[[Record, SeedsSection], Conversation | None]:
    def read(record: Record, section: SeedsSection) -> Conversation | None:
        instruction, context = record.get("instruction"), record.get(context_field) or ""
        if not isinstance(instruction, str) or not isinstance(context, str):
            return None
        return _user("\n\n".join(part.strip() for part in (instruction, context) if part.strip()))

    return read


_READERS: dict[str, Callable[[Record, SeedsSection], Conversation | None]] = {
    "prompt": _prompt,
    "chat": _chat,
    "oig": _oig,
    "dolly": _instruction("context"),
    "alpaca": _instruction("input"),
}
_WANTED = {
    "prompt": "in {!r} (a text or chat messages)",
    "chat": "in 'messages' or 'conversations'",
    "oig": "in 'user', or in 'text' as <human>: ... <bot>: ...",
    "dolly": "in 'instruction' and 'context'",
    "alpaca": "in 'instruction' and 'input'",
}


def _user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def _messages(value: Any) -> Conversation | None:
    """Messages with `role` and `content`, or ShareGPT's `from` and `value`; None where it is anything else."""
    if not isinstance(value, list):
        return None
    found = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role = _ROLES.get(str(message.get("role") or message.get("from")))
        content = message.get("content", message.get("value"))
        if role is None or not isinstance(content, str):
            return None
        found.append({"role": role, "content": content})
    return found


# -- OpenAssistant: one record a message, which names its parent ----------------------------------------------------


def _trees(records: Iterable[Record], turns: str, section: SeedsSection) -> Iterator[Conversation]:
    """Roots ("first"), every prompter's message with its path ("each"), or those that no prompter follows ("last")."""
    messages: dict[str, Record] = {}
    for record in records:
        if not {"message_id", "parent_id", "text", "role"} <= record.keys():
            raise UserError(
                f"{section.source}: a record is no message of a tree (message_id, parent_id, text, role); "
                f"its fields are {', '.join(record)}"
            )
        messages[record["message_id"]] = record
    prompts = [record for record in messages.values() if _ROLES.get(record["role"]) == "user"]
    if turns == "first":
        prompts = [record for record in prompts if not record["parent_id"]]
    elif turns == "last":
        followed = {_grandparent(record, messages) for record in prompts}
        prompts = [record for record in prompts if record["message_id"] not in followed]
    for record in prompts:
        path = _path(record, messages)
        if path and all(message["content"].strip() for message in path):
            yield path


def _grandparent(record: Record, messages: dict[str, Record]) -> str | None:
    parent = messages.get(record["parent_id"] or "")
    return parent["parent_id"] if parent else None


def _path(record: Record, messages: dict[str, Record]) -> Conversation:
    """From the root to `record`; nothing where a message between them is not there (deleted, or left out)."""
    path: Conversation = []
    at: Record | None = record
    while at is not None:
        path.append({"role": _ROLES[at["role"]], "content": at["text"]})
        if not at["parent_id"]:
            return path[::-1]
        at = messages.get(at["parent_id"])
    return []
