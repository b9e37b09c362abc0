"""Decoding many answers at once with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Answer(NamedTuple):
    """Response ids, with the end-of-sequence id where the model ended by itself, and why it ended: stop or length."""

    ids: list[int]
    finish_reason: str


class TransformersEngine:
    """Static batches through `generate`, left-padded. Same prompts, settings and seed, same answers."""

    def __init__(self, model: Any, eos_ids: Sequence[int]) -> None:
        self._model, self._eos_ids = model, list(eos_ids)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[Answer]:
        """One answer to each prompt (token ids); temperature 0 is greedy."""
        device = self._model.device
        width = max(map(len, prompts))
        padding = self._eos_ids[0]
        ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        # top_k: transformers cuts at the 50 likeliest unless told not to.
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=padding,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        return [self._cut(row) for row in output[:, width:].tolist()]

    def _cut(self, row: list[int]) -> Answer:
        """What follows the first end-of-sequence id is padding."""
        ends = [i for i, token in enumerate(row) if token in self._eos_ids]
        return Answer(row[: ends[0] + 1], "stop") if ends else Answer(row, "length")
