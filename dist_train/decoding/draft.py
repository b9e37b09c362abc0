"""Drafting: what a drafter proposes after the texts of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_train.decoding.cache import RowReader
from dist_train.decoding.rows import Rows
from dist_train.decoding.sampling import Sampler, draw
from dist_train.losses.head import working_dtype

_CANDIDATES = 10


Drafting = Callable[[Rows, Tensor], tuple[Tensor, Tensor | None]]
"""From chances [B, gamma] in [0, 1) to drafts [B, gamma] after each row, and the probabilities that they were drawn
with, [B, gamma + 1, V], the last 0; None if greedy."""


class TokenByToken:
    """Drafts gamma tokens in gamma passes, each after the ones before it; without a sampler the likeliest ones.

    With `record`, `confidences` holds [B] for each draft of the last call, as those who stop drafting at a threshold
    take it: of a likeliest token its probability at temperature 1 among the ten likeliest (llama.cpp, draft-simple in
    common/speculative.cpp), of a drawn one the probability it was drawn with (transformers, ConfidenceCriteria).
    """

    def __init__(self, reader: RowReader, gamma: int, sampler: Sampler | None, *, record: bool = False) -> None:
        self.reader, self.sampler, self.record, self._gamma = reader, sampler, record, gamma
        self.confidences: list[Tensor] = []

    def __call__(self, rows: Rows, chances: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, gamma], and the probabilities they were drawn with, [B, gamma + 1, V], the last 0; None if greedy.

        `chances` [B, gamma] in [0, 1).
        """
        # A draft accepted last has not been read by its drafter: it always reads the last two anew.
        tokens, positions = rows.window(2)
        drafts, probabilities, self.confidences = [], [], []
        for k in range(self._gamma):
            logits = self.reader.read(tokens, positions, rows.width, keep=1)[:, -1]
            if self.sampler is None:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                probabilities.append(self.sampler(logits))
                tokens = draw(probabilities[-1], chances[:, k])[:, None]
            if self.record:
                self.confidences.append(self._confidence(logits, tokens, probabilities))
            drafts.append(tokens)
            positions = positions[:, -1:] + 1
        if not probabilities:
            return torch.cat(drafts, 1), None
        return torch.cat(drafts, 1), torch.stack([*probabilities, torch.zeros_like(probabilities[0])], 1)

    def _confidence(self, logits: Tensor, tokens: Tensor, probabilities: list[Tensor]) -> Tensor:
        if self.sampler is not None:
            return probabilities[-1].gather(-1, tokens)[:, 0]
        candidates = logits.topk(min(_CANDIDATES, logits.shape[-1]), -1).values
        return torch.softmax(candidates.to(working_dtype(logits)), -1)[:, 0]
