"""Conversations to train on: where in their ids the assistant's answers are, from the first token to the end of a turn.

An answer begins where a server lets the target answer: after the ids of the conversation before it, with the chat
template's own opening of a turn. It ends with the special token that the template writes after it, which is what the
target ends a turn with. An answer that a template rewrites once there is a later message, by taking reasoning
out, say, is not what the target says there: it is trained on in a document of its own, which it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from dist_train.tokenizer.base import Tokenizer
from dist_train.tokenizer.chat import Message, RefusedChatError

_FIRST_MARK = 0x10F000  # private use, far from the stand-ins for special tokens


class MaskedChat(NamedTuple):
    """Ids of a conversation that ends with an answer, and for each of them whether it is of one to be trained on."""

    ids: list[int]
    mask: list[int]


class _Written(NamedTuple):
    """A conversation as the template writes it: its text, its ids, and where each answer ends in these, by message."""

    text: str
    ids: list[int]
    ends: dict[int, int]


def encode_answers(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[MaskedChat]:
    """The documents of a conversation, in which each answer that a user's message led to is trained on once.

    One, save where the template rewrites earlier answers. Empty where there is no answer; what comes after the last one
    is left out. Raises RefusedChatError where the template does not take these messages, or does not write an answer
    where it asks for it, and UserError where it cannot be rendered.
    """
    left = _answers(messages)
    documents: list[MaskedChat] = []
    written = {answer: _written(tokenizer, messages[: answer + 1]) for answer in left}
    while left:
        whole = written[left[-1]]
        spans = {}
        for answer in left:
            start = _start(tokenizer, messages[:answer], whole)
            end = written[answer].ends.get(answer)
            if start is not None and end is not None and written[answer].ids[:end] == whole.ids[:end]:
                spans[answer] = range(start, end)
        if left[-1] not in spans:
            raise RefusedChatError(_why(tokenizer, left[-1], whole))
        mask = [0] * len(whole.ids)
        for span in spans.values():
            mask[span.start : span.stop] = [1] * len(span)
        documents.insert(0, MaskedChat(whole.ids, mask))
        left = [answer for answer in left if answer not in spans]
    return documents


def has_answers(messages: Sequence[Message]) -> bool:
    """Whether a conversation has an answer that a user's message led to."""
    return bool(_answers(messages))


def _answers(messages: Sequence[Message]) -> list[int]:
    """Which messages these are; a greeting, before a user has said anything, is none."""
    asked = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return [i for i in range(asked, len(messages)) if _is_answer(messages[i])]


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _start(tokenizer: Tokenizer, before: Sequence[Message], whole: _Written) -> int | None:
    """Where in `whole` the answer to the messages `before` begins; None where their prompt is not what it begins with.

    A token that holds the prompt's end and the answer's beginning, such as two line breaks, is of neither: from no
    state in which a server drafts does it come.
    """
    prompt = tokenizer.encode_chat(before).ids
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole.ids, strict=False)))
    if same == len(prompt):
        return same
    return same + 1 if whole.text.startswith(tokenizer.chat.render(before)) else None


def _written(tokenizer: Tokenizer, messages: Sequence[Message]) -> _Written:
    """The conversation with its ids; a mark behind each answer, in the text alone, tells what the template puts there.

    Raises RefusedChatError where the template does not write the answers as they are.
    """
    text = tokenizer.chat.render(messages, answered=True)
    ids = tokenizer.encode_chat(messages, answered=True).ids
    marks = {i: chr(_FIRST_MARK + i) for i, message in enumerate(messages) if _is_answer(message)}
    marked = _with_marks(tokenizer, messages, text, marks)
    if any(mark in text for mark in marks.values()) or marked is None:
        raise RefusedChatError(f"{tokenizer.source}: its chat template rewrites answers by what they end with")
    parts = tokenizer.special.cut(marked)
    special = {part for part in parts if isinstance(part, int)}
    places = [place for place, i in enumerate(ids) if i in special]
    if len(places) != sum(isinstance(part, int) for part in parts):
        raise RefusedChatError(f"{tokenizer.source}: the ends of turns cannot be told in the ids of the conversation")
    ends, seen = {}, 0
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if isinstance(part, int):
            seen += 1
            continue
        for answer, mark in marks.items():
            if mark in part and not part.partition(mark)[2].strip() and isinstance(after, int):
                ends[answer] = places[seen] + 1
    return _Written(text, ids, ends)


def _with_marks(tokenizer: Tokenizer, messages: Sequence[Message], text: str, marks: dict[int, str]) -> str | None:
    """The text with `marks` at the ends of messages, and stand-ins for special tokens that messages spell out.

    None where it is not the same text otherwise.
    """
    stand_ins = tokenizer.special.marks([message["content"] for message in messages], text)
    if stand_ins is None:
        return None
    contents = [tokenizer.special.marked(message["content"], stand_ins, edges=False) for message in messages]
    for i, mark in marks.items():
        core = contents[i].rstrip()
        contents[i] = core + mark + contents[i][len(core) :]
    changed = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    marked = tokenizer.chat.render(changed, answered=True)
    table = {**stand_ins.table, **{ord(mark): "" for mark in marks.values()}}
    return marked if marked.translate(table) == text else None


def _why(tokenizer: Tokenizer, answer: int, whole: _Written) -> str:
    """What is wrong with the last answer of a conversation, which is message `answer`."""
    if answer not in whole.ends:
        return f"{tokenizer.source}: its chat template ends message {answer + 1}, an answer, with no special token"
    return (
        f"{tokenizer.source}: its chat template writes message {answer + 1} after other text than it asks for that "
        "answer with, as those of models that reason first do; let the target answer by itself, dist-train generate"
    )
