"""From records to the token ids and loss masks of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_shards import Encoded, Encoding, Rejected
from data_shards.errors import DataError, listed
from data_shards.inputs import Record
from dist_train.config import PrepareConfig
from dist_train.errors import UserError
from dist_train.prompts.formats import CHAT_FIELDS, chat_turns, not_unicode
from dist_train.tokenizer import MaskedChat, Message, RefusedChatError, Tokenizer, encode_answers, has_answers
from dist_train.tokenizer.wordwise import Array


class TextEncoder:
    """Records with a text field, as documents that begin and end as the target's own texts do."""

    has_mask = False

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._field = tokenizer, config.text_field
        self.fields: Sequence[str] = (config.text_field,)
        with_bos = tokenizer.adds_bos if config.bos is None else config.bos
        self._before = [tokenizer.bos_id] if with_bos and tokenizer.bos_id is not None else []
        end = {None: _end_of_text(tokenizer), True: tokenizer.eos_id, False: None}[config.eos]
        self._after = [] if end is None else [end]
        self.encoding = Encoding(
            tokenizer.sha256,
            tokenizer.vocab_size,
            bos=bool(self._before),
            eos=end == tokenizer.eos_id,
            separator=None if end == tokenizer.eos_id else end,
        )

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; empty texts give no document."""
        texts, rejected = [], []
        for index, record in enumerate(records):
            if problem := _problem(record, self._field):
                rejected.append(Rejected(index, *problem))
            else:
                texts.append(record[self._field])
        ids, lengths = self._tokenizer.encode_flat(texts)
        return Encoded(*_enclosed(ids, lengths, self._before, self._after), None, rejected)


_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # as families with other EOS for chats name it: Qwen, Llama 3


def _end_of_text(tokenizer: Tokenizer) -> int:
    """What keeps texts apart: no tokenizer adds it by itself, and in all pretraining there is one.

    EOS of a chat model may be the end of a turn, `<|im_end|>` say, which does not end texts.
    """
    return next(
        (tokenizer.special_ids[name] for name in _ENDS_OF_TEXT if name in tokenizer.special_ids), tokenizer.eos_id
    )


def _enclosed(ids: Array, lengths: Array, before: Sequence[int], after: Sequence[int]) -> tuple[Array, Array]:
    """Each document of `ids` between `before` and `after`, and the new lengths."""
    extra = len(before) + len(after)
    if not extra or not len(lengths):
        return ids, lengths
    starts = np.cumsum(lengths) - lengths + extra * np.arange(len(lengths))
    enclosed = np.empty(len(ids) + extra * len(lengths), ids.dtype)
    enclosed[np.arange(len(ids)) + np.repeat(extra * np.arange(len(lengths)) + len(before), lengths)] = ids
    for place, special in enumerate(before):
        enclosed[starts + place] = special
    for place, special in enumerate(after, start=len(before)):
        enclosed[starts + lengths + place] = special
    return enclosed, lengths + extra


class ChatEncoder:
    """Conversations, pairs of a prompt and a response, or such already with their ids; answers are trained on."""

    has_mask = True

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._prompt, self._response = tokenizer, config.prompt_field, config.response_field
        self.fields: Sequence[str] = (config.prompt_field, config.response_field, *_ID_FIELDS, *CHAT_FIELDS)
        # The chat template decides where BOS and EOS stand.
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bos=False, eos=False)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; an answer ends as the template ends it, or where there is a pair alone, with EOS."""
        documents: list[MaskedChat] = []
        rejected = []
        for index, record in enumerate(records):
            try:
                documents += self._documents(record)
            except _UnusableError as error:
                rejected.append(Rejected(index, error.kind, str(error)))
            except RefusedChatError as error:
                rejected.append(Rejected(index, "malformed", str(error)))
            except UserError as error:  # no template, or a broken one: told as it is, and not as a rank's own failure
                raise DataError(str(error)) from error
        ids, masks = [chat.ids for chat in documents], [chat.mask for chat in documents]
        return Encoded(_flat(ids), _lengths(ids), _flat(masks), rejected)

    def _documents(self, record: Record) -> list[MaskedChat]:
        """Raises _UnusableError or RefusedChatError for a record that gives none."""
        if _has_ids(record):
            _raise(self._problem_of_ids(record))
            return [_answered(record["prompt_ids"], record["response_ids"])]
        if record.get(self._response) is None and any(record.get(field) for field in CHAT_FIELDS):
            return encode_answers(self._tokenizer, _clear_messages(record))
        _raise(_problem(record, self._prompt) or _problem(record, self._response))
        prompt = self._tokenizer.encode_prompt([{"role": "user", "content": record[self._prompt]}])
        return [_answered(prompt, [*self._tokenizer.encode(record[self._response]), self._tokenizer.eos_id])]

    def _problem_of_ids(self, record: Record) -> tuple[str, str] | None:
        for name in _ID_FIELDS:
            ids = record[name]
            if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
                return "malformed", f"{name!r} is no list of token ids"
            if ids and not 0 <= min(ids) <= max(ids) < self.encoding.vocab_size:
                return (
                    "malformed",
                    f"{name!r} has an id outside the tokenizer's vocabulary of {self.encoding.vocab_size}",
                )
        return None if record["response_ids"] else ("empty", "no response")


class _UnusableError(Exception):
    """A record that gives no document, for a reason of this kind."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _raise(problem: tuple[str, str] | None) -> None:
    if problem is not None:
        raise _UnusableError(*problem)


def _answered(prompt: list[int], response: list[int]) -> MaskedChat:
    return MaskedChat([*prompt, *response], [0] * len(prompt) + [1] * len(response))


def _clear_messages(record: Record) -> list[Message]:
    """The messages of a conversation of which all is clear, and which has an answer. Raises _UnusableError."""
    found = chat_turns(record)
    if found is None:
        raise _UnusableError("malformed", f"no chat messages in {' or '.join(map(repr, CHAT_FIELDS))}")
    messages, unclear = found
    if unclear:
        first = min(unclear)
        raise _UnusableError("malformed", f"message {first + 1} {unclear[first]}")
    if reason := next(filter(None, (not_unicode(message["content"]) for message in messages)), None):
        raise _UnusableError("encoding", reason)
    if not has_answers(messages):
        raise _UnusableError("empty", "no answer to a user's message")
    return messages


_ID_FIELDS = ("prompt_ids", "response_ids")  # what generate writes


def _has_ids(record: Record) -> bool:
    """Whether both are there; where one is null, as in tables that were joined, the texts are used."""
    return all(record.get(name) is not None for name in _ID_FIELDS)


def _problem(record: Record, field: str) -> tuple[str, str] | None:
    """Kind and reason of a record without a usable text in `field`."""
    text = record.get(field)
    if not isinstance(text, str):
        fields = f"its fields are {listed(record)} (set the field's name)"
        if text is None:
            return "malformed", f"the record has no text in {field!r}; {fields}"
        return "malformed", f"the record has no text in {field!r} but a value of type {type(text).__name__}; {fields}"
    if not text:
        return "empty", f"no text in {field!r}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return "encoding", f"not Unicode: half a surrogate pair at character {error.start} of {field!r}"
    return None


def _flat(documents: Sequence[Sequence[int]]) -> Any:
    return np.fromiter((i for document in documents for i in document), dtype=np.int64)


def _lengths(documents: Sequence[Sequence[int]]) -> Any:
    return np.array([len(document) for document in documents], dtype=np.int64)
