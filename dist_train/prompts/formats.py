"""From the records of well-known instruction sets to conversations that end where an answer is wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from data_shards.errors import listed, shown
from data_shards.faults import STRICT, Faults
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
    """A conversation, and what tells the place of the record that it is of, or that has its last message.

    `later`: what a user says after its answer, and after each of the following ones, where these are to be regenerated.
    """

    messages: Conversation
    where: Callable[[], str]
    later: list[Conversation]


class Turns(NamedTuple):
    """The messages of a conversation; of those whose meaning cannot be told, by index, what is unclear."""

    messages: Conversation
    unclear: dict[int, str]


# Of OpenAI's, ShareGPT's and OpenAssistant's data. What a tool answered has a role of its own in chat templates; that a
# tool is called (function_call, tool_calls) is no text.
_ROLES = {
    **{"system": "system", "user": "user", "assistant": "assistant", "developer": "system"},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"},
    **{"tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool"},
}


def placed_records(inputs: str | list[str], faults: Faults = STRICT) -> Iterator[Placed]:
    """The records of files, folders or globs in file order. Raises DataError naming file and line of a fault."""
    for unit in plan_units(find_files(inputs)):
        for where, record in read_located(unit, faults):
            yield Placed(record, partial(place, unit, where))


def conversations(
    records: Iterable[Placed], section: SeedsSection, faults: Faults = STRICT
) -> Iterator[PlacedConversation]:
    """The conversations in `records`, in their order.

    A record that has none, or one that is not clear, goes to `faults`, which counts it or raises DataError naming its
    place. Raises UserError where OpenAssistant's messages contradict each other.
    """
    turns = section.turns or ("first" if section.format == "openassistant" else "last")
    if section.format == "openassistant":
        yield from _trees(records, turns, faults)
        return
    wanted = f"the record has no prompt {_WANTED[section.format].format(section.prompt_field)}"
    for record, where in records:
        found = _READERS[section.format](record, section)
        if found is None:
            faults.note("malformed", where, f"{wanted}; its fields are {listed(record)}")
        else:
            for conversation in _cut(found, turns, partial(faults.note, where=where), wanted):
                first, *later = _asked_in_turn(conversation) if turns == "regenerate" else [conversation]
                yield PlacedConversation(first, where, later)


def _cut(found: Turns, turns: str, note: Callable[..., None], wanted: str) -> Iterator[Conversation]:
    """What goes up to the first, the last or each user message that says something, as long as all of it is clear."""
    messages, unclear = found
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "user" and message["content"].strip()]
    if turns != "each":
        ends = ends[:1] if turns == "first" else ends[-1:]
    for end in ends or [len(messages)]:
        if (first := min(unclear, default=end)) < end:
            return note("malformed", reason=f"{wanted}: message {first + 1} {unclear[first]}")
        if reason := next(filter(None, (not_unicode(message["content"]) for message in messages[:end])), None):
            return note("encoding", reason=reason)
        if not ends:
            return note("empty", reason="no message of a user says anything")
        if turns == "regenerate" and any(message["role"] == "tool" for message in messages[:end]):
            return note("malformed", reason="a tool's answer, to what the target has not asked; it is not regenerated")
        yield messages[:end]


def _asked_in_turn(messages: Conversation) -> list[Conversation]:
    """What goes before each answer, without the answers: a conversation that ends where the first one begins, and what
    is said between it and the second, and so on. What an assistant says before the first user is left out.
    """
    parts: list[Conversation] = [[]]
    for message in messages:
        if message["role"] != "assistant":
            parts[-1].append(message)
        elif any(said["role"] == "user" for said in parts[-1]):
            parts.append([])
    return parts


def not_unicode(text: str) -> str | None:
    """What is wrong with a text that holds half a surrogate pair, as JSON can: it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not Unicode: half a surrogate pair at character {error.start} of a text"
    return None


def refuse_half_characters(text: str, where: Callable[[], str]) -> None:
    """Raise UserError for a text that is not Unicode."""
    if reason := not_unicode(text):
        raise UserError(f"{where()}: {reason}; mend it, or take it out")


# -- one record, one conversation: None where the record is not of the format ---------------------------------------


def _prompt(record: Record, section: SeedsSection) -> Turns | None:
    value = record.get(section.prompt_field)
    return _user(value) if isinstance(value, str) else _messages(value)


CHAT_FIELDS = ("messages", "conversations")


def chat_turns(record: Record) -> Turns | None:
    """The conversation in `messages`, or in ShareGPT's `conversations`; None where there is none.

    Of two fields the one that is filled; tables of text alone hold messages as JSON.
    """
    given = [record[name] for name in CHAT_FIELDS if record.get(name) is not None]
    value = next(filter(None, given), given[0] if given else None)  # joined tables fill one of the two
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return _messages(value)


def _oig(record: Record, section: SeedsSection) -> Turns | None:
    """OIG-small-chip2: `user` and `chip2`, or one text of `<human>: ... <bot>: ...`."""
    if isinstance(record.get("user"), str):
        return _user(record["user"])
    text = record.get("text")
    if not isinstance(text, str) or not text.lstrip().startswith("<human>:"):
        return None
    _, *parts = re.split(r"<(human|bot)>:", text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return Turns([{"role": _ROLES[who], "content": said.strip()} for who, said in pairs], {})


def _instruction(context_field: str) -> Callable[[Record, SeedsSection], Turns | None]:
    def read(record: Record, section: SeedsSection) -> Turns | None:
        instruction, context = record.get("instruction"), record.get(context_field) or ""
        if not isinstance(instruction, str) or not isinstance(context, str):
            return None
        return _user("\n\n".join(part.strip() for part in (instruction, context) if part.strip()))

    return read


_READERS: dict[str, Callable[[Record, SeedsSection], Turns | None]] = {
    "prompt": _prompt,
    "chat": lambda record, _: chat_turns(record),
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


def _user(text: str) -> Turns:
    return Turns([{"role": "user", "content": text}], {})


def _messages(value: Any) -> Turns | None:
    """Messages with `role` and `content`, or ShareGPT's `from` and `value`; None where it is anything else."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    found = Turns([], {})
    for index, message in enumerate(value):
        named = message.get("role") or message.get("from")
        role = _ROLES.get(str(named).lower())
        content = message["content"] if message.get("content") is not None else message.get("value")
        text = _text(content)
        if message.get("tool_calls") or message.get("function_call"):
            found.unclear[index] = "calls a tool, which is no text"
        elif role is None:
            found.unclear[index] = f"has the role {shown(str(named))!r}"
        elif text is None:
            found.unclear[index] = "has no text"
        found.messages.append({"role": role or "", "content": text or ""})
    return found


def _text(content: Any) -> str | None:
    """A message's text, which may come in parts; None where any is something else, such as an image."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts) if texts else None


# -- OpenAssistant: one record a message, which names its parent ----------------------------------------------------


def _trees(records: Iterable[Placed], turns: str, faults: Faults) -> Iterator[PlacedConversation]:
    """Roots ("first"), every prompter's message with its path ("each"), or those that no prompter follows (else)."""
    messages: dict[Any, Placed] = {}  # ids are texts, or numbers, of which a parent's may have become a float
    for record, where in records:
        if kind_and_reason := _unusable(record):
            faults.note(kind_and_reason[0], where, kind_and_reason[1])
            continue
        before = messages.setdefault(record["message_id"], Placed(record, where))
        if _as_told(before.record) != _as_told(record):
            raise UserError(
                f"{where()}: message_id {record['message_id']!r} is another message's at {before.where()}; "
                "take one of them out"
            )
    prompts = [record for record, _ in messages.values() if _ROLES[record["role"]] == "user"]
    if turns == "first":
        prompts = [record for record in prompts if _is_root(record)]
    to_the_end = turns in ("last", "regenerate")
    followed = {_grandparent(record, messages) for record in prompts} if to_the_end else set()
    for record in prompts:
        path = _path(record["message_id"], messages)
        if path and record["message_id"] not in followed and all(message["content"].strip() for message in path):
            first, *later = _asked_in_turn(path) if turns == "regenerate" else [path]
            yield PlacedConversation(first, messages[record["message_id"]].where, later)


def _as_told(record: Record) -> tuple[Any, ...]:
    """Equal for a message that is there once more."""
    return None if _is_root(record) else record["parent_id"], record["text"], record["role"]


def _unusable(record: Record) -> tuple[str, str] | None:
    """Kind and reason of a record that is no message of a tree."""
    name, parent, text, role = (record.get(field) for field in ("message_id", "parent_id", "text", "role"))
    is_text, is_number = isinstance(name, str), isinstance(name, int | float) and not isinstance(name, bool)
    known = _ROLES.get(str(role)) in ("user", "assistant")
    if "parent_id" not in record or not (is_text or is_number) or not isinstance(text, str) or not known:
        return "malformed", (
            "the record is no message of a tree (message_id, parent_id, text, role: prompter or assistant); its fields "
            f"are {listed(record)}"
        )
    if not _is_root(record) and not isinstance(parent, str if is_text else int | float):
        return "malformed", (
            f"message_id {shown(repr(name))} and parent_id {shown(repr(parent))} are not of one kind, so that none "
            "would find its parent; write both as texts, or both as numbers"
        )
    reason = not_unicode(text)
    return ("encoding", reason) if reason else None


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
