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
from dist_train.tokenizer import RefusedChatError, Tokenizer
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
    """Records with a prompt and a response, or already with their ids; the response is what is trained on."""

    has_mask = True

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._prompt, self._response = tokenizer, config.prompt_field, config.response_field
        self.fields: Sequence[str] = (config.prompt_field, config.response_field, *_ID_FIELDS)
        # The chat template decides where BOS and EOS stand.
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bos=False, eos=False)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; a response that ends by itself ends with EOS."""
        documents, masks, rejected = [], [], []
        for index, record in enumerate(records):
            if problem := self._problem(record):
                rejected.append(Rejected(index, *problem))
                continue
            try:
                prompt, response = self._ids(record)
            except RefusedChatError as error:
                rejected.append(Rejected(index, "malformed", str(error)))
            except UserError as error:  # no template, or a broken one: told as it is, and not as a rank's own failure
                raise DataError(str(error)) from error
            else:
                documents.append([*prompt, *response])
                masks.append([0] * len(prompt) + [1] * len(response))
        return Encoded(_flat(documents), _lengths(documents), _flat(masks), rejected)

    def _problem(self, record: Record) -> tuple[str, str] | None:
        if _has_ids(record):
            return self._problem_of_ids(record)
        return _problem(record, self._prompt) or _problem(record, self._response)

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

    def _ids(self, record: Record) -> tuple[list[int], list[int]]:
        if _has_ids(record):
            return record["prompt_ids"], record["response_ids"]
        prompt = self._tokenizer.encode_prompt([{"role": "user", "content": record[self._prompt]}])
        return prompt, [*self._tokenizer.encode(record[self._response]), self._tokenizer.eos_id]


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
