"""Drafting: what a drafter proposes after the texts of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dist_train.decoding.cache import RowReader
from dist_train.decoding.rows import Rows
from dist_train.decoding.sampling import Sampler, draw
from dist_train.losses.head import working_dtype
from dist_train.models.chains import parallel_of

_CANDIDATES = 10


Drafting = Callable[[Rows, Tensor], tuple[Tensor, Tensor | None]]
"""From chances [B, gamma] in [0, 1) to drafts [B, gamma] after each row, and the probabilities that they were drawn
with, [B, gamma + 1, V], the last 0; None if greedy."""


class Draft(ABC):
    """Drafts gamma tokens after each row; without a sampler the likeliest ones.

    With `record`, `confidences` holds [B] for each draft of the last call, as those who stop drafting at a threshold
    take it: of a likeliest token its probability at temperature 1 among the ten likeliest (llama.cpp, draft-simple in
    common/speculative.cpp), of a drawn one the probability it was drawn with (transformers, ConfidenceCriteria).
    """

    def __init__(self, reader: RowReader, gamma: int, sampler: Sampler | None, *, record: bool = False) -> None:
        self.reader, self.sampler, self.record, self.gamma = reader, sampler, record, gamma
        self.confidences: list[Tensor] = []

    def __call__(self, rows: Rows, chances: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, gamma], and the probabilities they were drawn with, [B, gamma + 1, V], the last 0; None if greedy.

        `chances` [B, gamma] in [0, 1).
        """
        drafts: list[Tensor] = []
        probabilities: list[Tensor] = []
        self.confidences = []
        for k, logits in enumerate(self._logits(rows, drafts)):
            if self.sampler is None:
                drafts.append(logits.argmax(-1, keepdim=True))
            else:
                probabilities.append(self.sampler(logits))
                drafts.append(draw(probabilities[-1], chances[:, k])[:, None])
            if self.record:
                self.confidences.append(self._confidence(logits, drafts[-1], probabilities))
        if not probabilities:
            return torch.cat(drafts, 1), None
        return torch.cat(drafts, 1), torch.stack([*probabilities, torch.zeros_like(probabilities[0])], 1)

    @abstractmethod
    def _logits(self, rows: Rows, drafts: Sequence[Tensor]) -> Iterator[Tensor]:
        """[B, V] for each draft in turn; when the next is asked for, `drafts` has one more."""

    def _confidence(self, logits: Tensor, tokens: Tensor, probabilities: list[Tensor]) -> Tensor:
        if self.sampler is not None:
            return probabilities[-1].gather(-1, tokens)[:, 0]
        candidates = logits.topk(min(_CANDIDATES, logits.shape[-1]), -1).values
        return torch.softmax(candidates.to(working_dtype(logits)), -1)[:, 0]


class TokenByToken(Draft):
    """In gamma passes, each token after the ones before it."""

    def _logits(self, rows: Rows, drafts: Sequence[Tensor]) -> Iterator[Tensor]:
        # A draft accepted last has not been read by its drafter: it always reads the last two anew.
        tokens, positions = rows.window(2)
        for _ in range(self.gamma):
            yield self.reader.read(tokens, positions, rows.width, keep=1)[:, -1]
            tokens, positions = drafts[-1], positions[:, -1:] + 1


class AllAtOnce(Draft):
    """In one pass, each token from the text alone: behind the last one stand masks (PARD, arXiv 2504.18583).

    Their caches are written over: the tokens of the last block, of which none has been read, are read with the masks.
    """

    def _logits(self, rows: Rows, drafts: Sequence[Tensor]) -> Iterator[Tensor]:
        parallel = parallel_of(self.reader.model.config)
        assert parallel is not None
        tokens, positions = rows.window(self.gamma + 1)
        masks = torch.full_like(tokens[:, 2:], parallel.mask_id)
        behind = positions[:, -1:] + torch.arange(1, self.gamma, device=positions.device)
        read = torch.cat([tokens, masks], 1), torch.cat([positions, behind], 1)
        yield from self.reader.read(*read, rows.width, keep=self.gamma).unbind(1)


def drafts_of(reader: RowReader, gamma: int, sampler: Sampler | None, *, record: bool = False) -> Draft:
    """As the reader's model drafts. Raises ValueError where it was not trained to draft so many in one pass."""
    parallel = parallel_of(reader.model.config)
    if parallel is None:
        return TokenByToken(reader, gamma, sampler, record=record)
    if gamma > parallel.tokens:
        raise ValueError(f"gamma {gamma}: the drafter drafts at most {parallel.tokens} tokens in its one pass")
    return AllAtOnce(reader, gamma, sampler, record=record)
