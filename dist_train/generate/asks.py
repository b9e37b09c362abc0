"""What a stage asks of an engine, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dist_train.config import GenerateConfig
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


class Condition(NamedTuple):
    """How a seed is answered. top_p is None where it has no part in it: greedy."""

    temperature: float
    top_p: float | None
    sample: int


def conditions(config: GenerateConfig) -> list[Condition]:
    """Temperatures x top-p x samples; greedy decoding has only one answer to give."""
    found = []
    for temperature in dict.fromkeys(config.temperatures):
        if temperature == 0:
            found.append(Condition(0.0, None, 0))
            continue
        for top_p in dict.fromkeys(config.top_p):
            found += [Condition(temperature, top_p, sample) for sample in range(config.samples)]
    return found


class Answer(NamedTuple):
    """Response ids, with the end-of-sequence id where the model ended by itself, and why it ended: stop or length.

    `reencoded`: the ids were made of a text, because the engine told no more; they may not be those that were sampled.
    """

    ids: list[int]
    finish_reason: str
    reencoded: bool = False


class Engine(Protocol):
    """Answers asks. Where it decodes by itself, the same asks give the same answers."""

    def ready(self, ask: Ask, sampling: Sampling) -> str | None:
        """Be able to answer such an ask, before the first; what tells the weights from others, where that is known.

        Raises UserError where it cannot be answered.
        """

    def units_at_once(self, unit_size: int) -> int:
        """Calls of `answer`, each with so many asks, that it wants at the same time, from threads."""

    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask, in their order. Raises UserError when that cannot be had."""
