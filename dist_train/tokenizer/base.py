"""What every tokenizer does: text to ids and back, and chats through their template."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_train.tokenizer.chat import ChatTemplate, Message, RefusedChatError, Templates
from dist_train.tokenizer.special import Marks, SpecialTokens
from dist_train.tokenizer.wordwise import Array


class EncodedChat(NamedTuple):
    """A conversation up to where the assistant's next answer begins."""

    ids: list[int]
    by_parts: bool
    """Whether special tokens and the texts between them were encoded one by one, because a message spells out a special
    token, which stays text; else it was the rendered text as a whole, which is what a server does."""


class Tokenizer(ABC):
    """Text to ids and back. Special ids never come out of text that a user wrote, but of the chat template alone."""

    source: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    adds_bos: bool
    """whether a server puts BOS before a text"""
    byte_fallback: bool
    """whether a character without a piece becomes its bytes' pieces"""
    sha256: str
    special: SpecialTokens
    chat: ChatTemplate

    @property
    def special_ids(self) -> dict[str, int]:
        """Special token to id."""
        return self.special.ids

    @property
    def chat_template(self) -> Templates:
        """As it is stored with the tokenizer: one template, several by name, or none."""
        return self.chat.stored

    @abstractmethod
    def use_chat_template(self, templates: Templates) -> None:
        """Put another chat template in the place of the stored one."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids leave no trace."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files from which servers and `load_tokenizer` make this tokenizer again."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """As `encode_batch`, one text after the other: ids, int32 [tokens], and how many each has, int64 [texts]."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter((i for ids in encoded for i in ids), np.int32, int(lengths.sum())), lengths

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of `encode_chat`."""
        return self.encode_chat(messages).ids

    def encode_chat(self, messages: Sequence[Message], *, answered: bool = False) -> EncodedChat:
        """Ids of a conversation, rendered by its chat template; `answered`: whose last message is an answer.

        They are those that a server makes of the same messages, save where a message spells out a special token: there
        it stays text. Raises RefusedChatError where these messages cannot be rendered, or the tokens that they spell
        out not be told from the template's, and UserError where nothing can.
        """
        rendered = self.chat.render(messages, answered=answered)
        spells = [message["content"] for message in messages if self.special.may_hide_in(message["content"])]
        parts = self._parts(messages, rendered, spells, answered=answered) if spells else None
        if parts is None:
            return EncodedChat(self._encode_whole(rendered), by_parts=False)
        return EncodedChat(self._encode_parts(parts), by_parts=True)

    def _parts(
        self, messages: Sequence[Message], rendered: str, spells: Sequence[str], *, answered: bool
    ) -> list[str | int] | None:
        """The template's special ids, and the texts between them; None where there are no other special tokens.

        Raises RefusedChatError where they cannot be told apart.
        """
        marks = self.special.marks(spells, rendered)
        if marks is not None:
            found = self._marked(messages, marks, edges=True, answered=answered)
            parts, as_read = self.special.cut(found), self.special.cut(rendered)
            ids, ids_read = _ids(parts), _ids(as_read)
            kept = found.translate(marks.table) == rendered
            if not kept:  # the template may look at what a message begins or ends with
                found = self._marked(messages, marks, edges=False, answered=answered)
                parts = self.special.cut(found)
                kept = found.translate(marks.table) == rendered and _ids(parts) == ids
            if ids == ids_read and (kept or not {self.special_ids[token] for token in marks.of} & {*ids_read}):
                return None  # what was spelled out, the template has dropped
            # By parts must be as by the whole, were it not for what is spelled out.
            if kept and self._encode_parts(as_read) == self._encode_whole(rendered):
                return [part if isinstance(part, int) else part.translate(marks.table) for part in parts]
        raise RefusedChatError(
            f"{self.source}: a message spells out special tokens, and its chat template rewrites messages so that "
            "these cannot be told from its own; take them out of the message"
        )

    def _marked(self, messages: Sequence[Message], marks: Marks, *, edges: bool, answered: bool) -> str:
        """The conversation rendered with marks in its messages."""
        contents = (self.special.marked(message["content"], marks, edges=edges) for message in messages)
        marked = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return self.chat.render(marked, answered=answered)

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of special tokens and texts in a row."""
        texts = iter(self.encode_batch([part for part in parts if isinstance(part, str)]))
        return [i for part in parts for i in ([part] if isinstance(part, int) else next(texts))]

    def _encode_whole(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation in which all special tokens are the template's."""
        return self._encode_parts(self.special.cut(rendered))


def _ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
