"""What a stage asks of an engine, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dist_train.tokenizer import Message


class Ask(NamedTuple):
    """One answer that is wanted: a conversation, its token ids through the target's template, and a random seed."""

    messages: list[Message]
    ids: list[int]
    seed: int


class Sampling(NamedTuple):
    """How it is drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int


class Answer(NamedTuple):
    """Response ids, with the end-of-sequence id where the model ended by itself, and why it ended: stop or length.

    `reencoded`: the ids were made of a text, because the engine told no more; they may not be those that were sampled.
    """

    ids: list[int]
    finish_reason: str
    reencoded: bool = False


class Engine(Protocol):
    """Answers asks. Where it decodes by itself, the same asks give the same answers."""

    def units_at_once(self, unit_size: int) -> int:
        """Calls of `answer`, each with so many asks, that it wants at the same time, from threads."""

    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask, in their order. Raises UserError when that cannot be had."""
