"""Decoding many answers at once in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.decoding.speculative import generate
from dist_train.generate.asks import Answer, Ask, Sampling
from dist_train.models.target import weights_digest


class LocalEngine:
    """A model of this process, which one call at a time uses; `rows` answers are decoded at a time."""

    def __init__(self, model: Any, eos_ids: Sequence[int], rows: int) -> None:
        self._model, self._eos_ids, self._rows = model, list(eos_ids), rows

    def ready(self, ask: Ask, sampling: Sampling) -> str | None:
        """It is, being loaded, if it can give one token; the digest of its weights."""
        self.answer([ask], sampling._replace(max_new_tokens=1))
        return weights_digest(self._model)

    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask, from its own seed. Raises UserError where the model gives NaN."""
        found = generate(
            self._model,
            [ask.ids for ask in asks],
            sampling.temperature,
            sampling.top_p,
            limits=[sampling.max_new_tokens] * len(asks),
            eos_ids=self._eos_ids,
            seeds=[ask.seed for ask in asks],
            batch_size=self._rows,
        )
        return [Answer(ids, "stop" if ids[-1] in self._eos_ids else "length") for ids in found]

    def units_at_once(self, unit_size: int) -> int:
        """One: what answers a unit fixes which of them share a batch, and so how numbers round."""
        return 1
