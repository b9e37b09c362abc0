"""From logits to probabilities, under a temperature and a nucleus, and the draws from them.

A nucleus is mostly small, and sorting a vocabulary takes longer than a small model's pass over a token: so it is looked
for among the likeliest tokens, by a partial top-k that is exact, and further only where they do not reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.losses.head import working_dtype

_ON_CPU = (64, 1024)  # at V = 49,152 a row takes a 150th of a sort, and a 10th
_ON_DEVICE = 1024


class Sampler:
    """Probabilities [..., V] of logits [..., V], fp32 or better, after temperature (above 0) and nucleus.

    On a CPU, rows whose nucleus is larger than the likeliest tokens that were looked at are looked at again. A GPU
    would have to wait for an answer to which rows these are: there `incomplete`, a tensor, becomes true, to be read
    together with other things; whoever finds it so says `begin(whole=True)` and does everything since `begin` again.
    `waits`: whether it may ask; by default on a CPU.
    """

    def __init__(self, temperature: float, top_p: float, device: torch.device, waits: bool | None = None) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._waits = device.type == "cpu" if waits is None else waits
        self._none = torch.zeros((), dtype=torch.bool, device=device)
        self.begin()

    def begin(self, *, whole: bool = False) -> None:
        """`incomplete` starts anew; `whole`: look at the whole vocabulary."""
        self.incomplete, self._whole = self._none, whole

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities; a row of logits that holds NaN gives anything."""
        probabilities = torch.softmax(logits.to(working_dtype(logits)) / self._temperature, -1)
        if self._top_p >= 1:
            return probabilities
        rows = probabilities.flatten(0, -2)
        if self._waits:
            vocab_size = rows.shape[-1]
            counts = [count for count in _ON_CPU if 8 * count <= vocab_size]
            return _search(rows, self._top_p, [*counts, vocab_size]).view_as(probabilities)
        kept, reached = _nucleus(rows, self._top_p, rows.shape[-1] if self._whole else _ON_DEVICE)
        self.incomplete = self.incomplete | ~reached.all()
        return kept.view_as(probabilities)


def warp(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [..., V], fp32 or better, after temperature and nucleus; at temperature 0 all on the likeliest."""
    if temperature > 0:
        return Sampler(temperature, top_p, logits.device, waits=True)(logits)
    best = logits.argmax(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=working_dtype(logits)).scatter_(-1, best, 1.0)


def draw(weights: Tensor, chance: Tensor) -> Tensor:
    """One token [B] of each row of unnormalised probabilities [B, V], by inversion of `chance` [B] in [0, 1).

    Of NaN any token. In float64, where neither the sum over a vocabulary nor the chance rounds a rare token away.
    """
    reached = weights.double().cumsum(-1)
    total = reached[:, -1:]
    # Below the total even where the product rounds up to it: a token of probability 0 is never the first beyond.
    point = torch.minimum(chance[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, point, right=True)[:, 0].clamp_max(weights.shape[-1] - 1)


def _search(probabilities: Tensor, top_p: float, counts: list[int]) -> Tensor:
    """The nucleus of each row [N, V], looked for among the first of `counts` likeliest tokens, then the next."""
    kept, reached = _nucleus(probabilities, top_p, counts[0])
    if len(counts) > 1 and not bool(reached.all()):
        rows = (~reached).nonzero()[:, 0]
        kept[rows] = _search(probabilities[rows], top_p, counts[1:])
    return kept


def _nucleus(probabilities: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor]:
    """The fewest tokens of each row [N, V] that together reach `top_p`, of sum 1, if `count` do [N], else the `count`.

    All tokens always do.
    """
    count = min(count, probabilities.shape[-1])
    ordered, order = probabilities.topk(count, -1)
    sums = ordered.cumsum(-1)
    kept = ordered.masked_fill(sums - ordered >= top_p, 0)  # a token stays while those before it fall short
    reached = (sums[:, -1] >= top_p) | (count == probabilities.shape[-1])
    return torch.zeros_like(probabilities).scatter_(-1, order, kept / kept.sum(-1, keepdim=True)), reached
