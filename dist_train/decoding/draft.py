"""Drafting: what a drafter proposes after the texts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.decoding.cache import RowReader
from dist_train.decoding.rows import Rows
from dist_train.decoding.sampling import Sampler, draw


class TokenByToken:
    """Drafts gamma tokens in gamma passes, each after the ones before it; without a sampler the likeliest ones."""

    def __init__(self, reader: RowReader, gamma: int, sampler: Sampler | None) -> None:
        self.reader, self.sampler, self._gamma = reader, sampler, gamma

    def __call__(self, rows: Rows, chances: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, gamma], and the probabilities they were drawn with, [B, gamma + 1, V], the last 0; None if greedy.

        `chances` [B, gamma] in [0, 1).
        """
        # A draft accepted last has not been read by its drafter: it always reads the last two anew.
        tokens, positions = rows.window(2)
        drafts, probabilities = [], []
        for k in range(self._gamma):
            logits = self.reader.read(tokens, positions, rows.width, keep=1)[:, -1]
            if self.sampler is None:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                probabilities.append(self.sampler(logits))
                tokens = draw(probabilities[-1], chances[:, k])[:, None]
            drafts.append(tokens)
            positions = positions[:, -1:] + 1
        if not probabilities:
            return torch.cat(drafts, 1), None
        return torch.cat(drafts, 1), torch.stack([*probabilities, torch.zeros_like(probabilities[0])], 1)
