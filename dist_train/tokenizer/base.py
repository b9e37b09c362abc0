"""What every tokenizer does: text to ids and back, and chats through their template."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_train.errors import UserError
from dist_train.tokenizer.wordwise import Array

LLAMA2_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
)

Message = dict[str, str]

_HOLDER = "\ue000{}\ue001"  # stands for a message's content; private-use characters are in no template


class Tokenizer(ABC):
    """Text to ids and back. Special ids never come out of text that a user wrote; `encode_chat` inserts them as ids."""

    source: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    adds_bos: bool
    """whether a server puts BOS before a text"""
    byte_fallback: bool
    """whether a character without a piece becomes its bytes' pieces"""
    sha256: str
    special_ids: dict[str, int]
    chat_template: str

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
        """Ids of a conversation up to where the assistant's next answer begins.

        The chat template is rendered around place-holders, so that its special tokens can be told from those which a
        message spells out: the former become ids, the latter stay text. Raises UserError when the template refuses the
        messages or rewrites their content.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._layouts:
            self._layouts[roles] = self._layout(roles)

        def content(holder: re.Match[str]) -> str:
            text = messages[int(holder[2])]["content"]
            return text if holder[1] else text.strip()  # the template trims if it took the wide spaces off

        ids: list[int] = []
        for part in self._layouts[roles]:
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.encode(re.sub("(\u2002?)\ue000(\\d+)\ue001\u2002?", content, part))
        return ids

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], list[str]]:
        """Rendered templates by roles: rendering is a hundred times slower than encoding."""
        return {}

    def _layout(self, roles: tuple[str, ...]) -> list[str]:
        """The template around place-holders for each role's message, cut at its special tokens."""
        messages = [{"role": role, "content": f"\u2002{_HOLDER.format(i)}\u2002"} for i, role in enumerate(roles)]
        rendered = _render(self, messages)
        for i in range(len(roles)):
            if _HOLDER.format(i) not in rendered:
                raise UserError(f"{self.source}: its chat template does not keep the content of message {i}")
        return list(_split_at(rendered, self.special_ids))


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise UserError(f"{tokenizer.source}: its chat template refuses the conversation: {reason}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=list(messages),
            add_generation_prompt=True,
            bos_token="" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
            eos_token=tokenizer.piece(tokenizer.eos_id),
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{tokenizer.source}: its chat template cannot be rendered: {error}") from error


def _split_at(text: str, special: dict[str, int]) -> Iterator[str]:
    """Cut a text before and after each special token in it; the longest one wins where several begin."""
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first)
    yield from (piece for piece in re.split(f"({pattern})", text) if piece)
