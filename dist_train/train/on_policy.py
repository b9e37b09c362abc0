"""Responses that the drafter itself writes, for the target to score (Agarwal et al., 2024; Zhou et al., 2024).

A share of the sequences keep their prompts and the lengths of their responses; each response token is sampled from the
drafter as it is now, given what it wrote before. The loss then sees the states that drafting meets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_train.config import OnPolicySection
from dist_train.decoding.attention import grouped_attention
from dist_train.decoding.cache import RowReader
from dist_train.decoding.sampling import Sampler, draw
from dist_train.models.drafter import TrainableDrafter
from dist_train.train.batch import DeviceBatch
from dist_train.work.units import unit_seed


class _Document(NamedTuple):
    """Of a micro-batch: the sequence it lies in, its first position and length, its first and last response label."""

    sequence: int
    start: int
    length: int
    first: int
    last: int

    @property
    def passes(self) -> int:
        """From the first label to the last, what lies between responses included."""
        return self.last - self.first + 1


class OnPolicy:
    """Rewrites the responses of some sequences of a micro-batch. Collective under ZeRO-3, where ranks step together.

    `gather(number)` gives the numbers of all ranks.
    """

    def __init__(self, section: OnPolicySection, seed: int, gather: Callable[[int], list[int]]) -> None:
        self.section, self.seed, self._gather = section, seed, gather

    def due(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is one of those."""
        return step % self.section.every == 0

    def rewrite(self, drafter: TrainableDrafter, batch: DeviceBatch, number: int) -> DeviceBatch:
        """The micro-batch with the responses of a share of its sequences sampled anew; `number` decides which and how.

        Each document of a chosen sequence is a row of its own, and begins with its first response: the prompt is read
        at once, what lies between responses token by token, as it is. The host reads once, where documents lie.
        """
        seed = unit_seed(self.seed, "on-policy", number)
        drawn = np.random.default_rng(seed)
        documents = _find(batch, drawn.random(len(batch.input_ids)) < self.section.share)
        passes = max((document.passes for document in documents), default=0)
        if any(hasattr(weight, "ds_id") for weight in drafter.parameters()):
            passes = max(self._gather(passes))  # a rank with nothing to write goes along
        if not passes:
            return batch
        documents = documents or [_Document(0, 0, 1, 1, 0)]
        chances = np.zeros((len(documents), passes))
        for row, document in enumerate(documents):
            chances[row, : document.passes] = drawn.random(document.passes)
        # It may be compiled, for training: each shape met here would cost one of the few recompilations that it has.
        eagerly = torch.compiler.set_stance("force_eager")
        with eagerly, drafter.evaluating(), grouped_attention(drafter.model):
            return self._write(drafter, batch, documents, torch.from_numpy(chances).to(batch.input_ids.device))

    def _write(
        self, drafter: TrainableDrafter, batch: DeviceBatch, documents: list[_Document], chances: Tensor
    ) -> DeviceBatch:
        """`chances` [rows, passes] in [0, 1): one token each."""
        device, longest = batch.input_ids.device, max(document.length for document in documents)
        sequence, start, length, first = torch.tensor([document[:4] for document in documents]).to(device).T[..., None]
        slots = torch.arange(longest, device=device)
        inside = slots < length
        places = sequence * batch.input_ids.shape[1] + start + torch.minimum(slots, length - 1)
        ids, labels, mask = (values.flatten()[places] for values in (batch.input_ids, batch.labels, batch.mask))
        mask = mask & inside
        prompt = max(1, *(document.first for document in documents))
        reader = RowReader(drafter.model, len(documents), longest)
        reader.prefill(torch.arange(len(documents), device=device), ids[:, :prompt])
        sampler = Sampler(self.section.temperature, 1.0, device)
        for k in range(chances.shape[1]):
            at = (first + k).clamp_max(longest - 1)
            logits = reader.read(ids.gather(1, at), at, min(prompt + k + 1, longest), keep=1)[:, -1]
            drawn = draw(sampler(logits), chances[:, k])[:, None]
            due = mask.gather(1, at) & (at == first + k)  # a row may be at its end, and others not
            written = torch.where(due, drawn, labels.gather(1, at))
            labels.scatter_(1, at, written)
            after = (at + 1).clamp_max(longest - 1)
            goes_on = (after > at) & inside.gather(1, after)
            ids.scatter_(1, after, torch.where(goes_on, written, ids.gather(1, after)))
        # Places beyond a document's end are its last one's: that is what they hold, too.
        last = length - 1
        ids, labels = (torch.where(inside, values, values.gather(1, last)) for values in (ids, labels))
        return batch._replace(input_ids=_put(batch.input_ids, places, ids), labels=_put(batch.labels, places, labels))


def _find(batch: DeviceBatch, chosen: npt.NDArray[np.bool_]) -> list[_Document]:
    """The documents of the chosen sequences that hold a response."""
    found = []
    positions, mask = torch.stack([batch.positions, batch.mask.long()]).cpu().numpy()
    for sequence in np.flatnonzero(chosen):
        starts = np.union1d([0], np.flatnonzero(positions[sequence] == 0))
        for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True):
            labels = np.flatnonzero(mask[sequence, start:end])
            if len(labels):
                found.append(_Document(int(sequence), int(start), int(end - start), int(labels[0]), int(labels[-1])))
    return found


def _put(whole: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A copy of `whole` [B, T] with `values` at `places` of all its numbers, both [rows, slots]."""
    return whole.flatten().scatter(0, places.flatten(), values.flatten()).view_as(whole)
