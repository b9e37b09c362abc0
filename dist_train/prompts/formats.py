"""From the records of well-known instruction sets to conversations that end where an answer is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from data_shards.faults import STRICT
from data_shards.inputs import Record, find_files, place, plan_units, read_located
from dist_train.config import SeedsSection
from dist_train.errors import UserError
from dist_train.tokenizer import Message

Conversation = list[Message]


class Placed(NamedTuple):
    """A record, and what tells its file and line, which is not known without reading the file again."""

    record: Record
    where: Callable[[], str]


class PlacedConversation(NamedTuple):
    """A conversation, and what tells the place of the record that it is of, or that has its last message."""

    messages: Conversation
    where: Callable[[], str]


_ROLES = {
    **{"system": "system", "user": "user", "assistant": "assistant"},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
}


def placed_records(inputs: str | list[str]) -> Iterator[Placed]:
    """The records of files, folders or globs in file order. Raises DataError naming file and line of a fault."""
    for unit in plan_units(find_files(inputs)):
        for where, record in read_located(unit, STRICT):
            yield Placed(record, partial(place, unit, where))


def conversations(records: Iterable[Placed], section: SeedsSection) -> Iterator[PlacedConversation]:
    """The conversations in `records`, in their order. Raises UserError naming the place of a record that has none."""
    turns = section.turns or ("first" if section.format == "openassistant" else "last")
    if section.format == "openassistant":
        yield from _trees(records, turns)
        return
    read = _READERS[section.format]
    for record, where in records:
        messages = read(record, section)
        if messages is None:
            raise UserError(
                f"{where()}: the record has no prompt {_WANTED[section.format].format(section.prompt_field)}; "
                f"its fields are {', '.join(record)}"
            )
        for message in messages:
            refuse_half_characters(message["content"], where)
        for conversation in _cut(messages, turns):
            yield PlacedConversation(conversation, where)


def refuse_half_characters(text: str, where: Callable[[], str]) -> None:
    """Half a surrogate pair, which JSON can hold, is no text that can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where()}: not Unicode: half a surrogate pair at character {error.start} of a text; "
            "mend it, or take it out"
        ) from error


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


def _trees(records: Iterable[Placed], turns: str) -> Iterator[PlacedConversation]:
    """Roots ("first"), every prompter's message with its path ("each"), or those that no prompter follows ("last")."""
    messages: dict[Any, Placed] = {}  # ids are texts, or numbers, of which a parent's may have become a float
    for record, where in records:
        _refuse_foreign(record, where)
        refuse_half_characters(record["text"], where)
        before = messages.setdefault(record["message_id"], Placed(record, where))
        if _as_told(before.record) != _as_told(record):
            raise UserError(
                f"{where()}: message_id {record['message_id']!r} is another message's at {before.where()}; "
                "take one of them out"
            )
    prompts = [record for record, _ in messages.values() if _ROLES[record["role"]] == "user"]
    if turns == "first":
        prompts = [record for record in prompts if _is_root(record)]
    followed = {_grandparent(record, messages) for record in prompts} if turns == "last" else set()
    for record in prompts:
        path = _path(record["message_id"], messages)
        if path and record["message_id"] not in followed and all(message["content"].strip() for message in path):
            yield PlacedConversation(path, messages[record["message_id"]].where)


def _as_told(record: Record) -> tuple[Any, ...]:
    """Equal for a message that is there once more."""
    return None if _is_root(record) else record["parent_id"], record["text"], record["role"]


def _refuse_foreign(record: Record, where: Callable[[], str]) -> None:
    name, parent, text, role = (record.get(field) for field in ("message_id", "parent_id", "text", "role"))
    is_text, is_number = isinstance(name, str), isinstance(name, int | float) and not isinstance(name, bool)
    if "parent_id" not in record or not (is_text or is_number) or not isinstance(text, str) or str(role) not in _ROLES:
        raise UserError(
            f"{where()}: the record is no message of a tree (message_id, parent_id, text, role: prompter or "
            f"assistant); its fields are {', '.join(record)}"
        )
    if not _is_root(record) and not isinstance(parent, str if is_text else int | float):
        raise UserError(
            f"{where()}: message_id {name!r} and parent_id {parent!r} are not of one kind, so that none would find its "
            "parent; write both as texts, or both as numbers"
        )


def _is_root(record: Record) -> bool:
    parent = record["parent_id"]
    return parent in (None, "") or parent != parent  # NaN, as pandas may write it


def _grandparent(record: Record, messages: dict[Any, Placed]) -> Any:
    parent = messages.get(record["parent_id"])
    return parent.record["parent_id"] if parent else None


def _path(name: Any, messages: dict[Any, Placed]) -> Conversation:
    """From the root to a message; nothing where one between them is not there (deleted, or left out)."""
    path: Conversation = []
    while name in messages:
        record, where = messages[name]
        path.append({"role": _ROLES[record["role"]], "content": record["text"]})
        if _is_root(record):
            return path[::-1]
        if len(path) > len(messages):
            raise UserError(f"{where()}: the message is its own ancestor, by parent_id; mend it, or take it out")
        name = record["parent_id"]
    return []
