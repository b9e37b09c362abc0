"""From corpora on disk to the micro-batches of a training step.

The samples of global step s are positions `s * global_batch` to `(s + 1) * global_batch` of one global sequence, cut
into equal, contiguous slices for the ranks. Nothing else decides them, so they are the same for any world size and
after any resume, and the state to save is the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_shards.errors import DataError
from data_shards.format import Array, ShardedTokens
from data_shards.order import MixtureOrder


class Sample(NamedTuple):
    """One sequence of length T: four int64 arrays [T].

    `labels[t]` is the token after `input_ids[t]`; `mask[t]` is 1 where its prediction is trained; `positions` begin
    anew with each document that must not attend to the one before it.
    """

    input_ids: Array
    labels: Array
    mask: Array
    positions: Array


class Batch(NamedTuple):
    """A micro-batch: the arrays of `Sample`, stacked to [B, T]."""

    input_ids: Array
    labels: Array
    mask: Array
    positions: Array


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the mixture."""

    corpus: ShardedTokens
    weight: float = 1.0


class _Text:
    """Consecutive sequences of a plain corpus; documents run on within a sequence."""

    def __init__(self, corpus: ShardedTokens, sequence_length: int) -> None:
        self.corpus, self.length = corpus, sequence_length
        self.size = (len(corpus) - 1) // sequence_length  # the last label is a token too
        if self.size < 1:
            raise DataError(f"{corpus.path}: its {len(corpus)} tokens are not one sequence of {sequence_length}")

    def __getitem__(self, i: int) -> Sample:
        tokens = self.corpus[i * self.length : (i + 1) * self.length + 1].astype(np.int64)
        return Sample(tokens[:-1], tokens[1:], np.ones(self.length, np.int64), np.arange(self.length))


class _Conversations:
    """Packed documents; trained on responses only, positions restart with each document."""

    def __init__(self, corpus: ShardedTokens, sequence_length: int) -> None:
        self.corpus, self.length = corpus, sequence_length
        self.size = corpus.num_packs
        if corpus.packed_length != sequence_length:
            raise DataError(
                f"{corpus.path}: packed for sequences of {corpus.packed_length}, not {sequence_length}; "
                "prepare it again or set data.sequence_length"
            )

    def __getitem__(self, i: int) -> Sample:
        capacity = self.length + 1
        tokens, mask = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        positions = np.zeros(capacity, np.int64)
        at = 0
        for document in self.corpus.pack(i):
            start, stop = self.corpus.document_range(int(document))
            stop = min(stop, start + capacity - at)
            end = at + stop - start
            tokens[at:end] = self.corpus[start:stop]
            mask[at:end] = self.corpus.mask(slice(start, stop))
            positions[at:end] = np.arange(end - at)
            mask[at] = 0  # nothing precedes a document's first token that could predict it
            at = end
        positions[at:] = np.arange(capacity - at)  # padding is a document of its own: it attends to nothing real
        return Sample(tokens[:-1], tokens[1:], mask[1:], positions[:-1])


class TokenLoader:
    """Iterates over global steps; each is this rank's list of micro-batches, equally many on every rank.

    `global_batch`: sequences per optimizer step over all ranks; `micro_batch`: sequences per forward pass on one rank.
    Raises DataError when the sources do not fit together, ValueError when the batch cannot be cut equally.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of micro-batch {micro_batch} x {world_size} ranks"
            )
        _check_same_encoding(sources)
        self._samples = [
            (_Conversations if source.corpus.num_packs else _Text)(source.corpus, sequence_length) for source in sources
        ]
        sizes = [samples.size for samples in self._samples]
        self._order = MixtureOrder(sizes, [source.weight for source in sources], seed)
        self._share = global_batch // world_size
        self._first = rank * self._share
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._step = 0
        self._fingerprint = _fingerprint(sources, sequence_length, global_batch, seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Endless: epochs follow each other, each in its own order."""
        return self

    def __next__(self) -> list[Batch]:
        """The next global step's micro-batches of this rank."""
        batches = self.step(self._step)
        self._step += 1
        return batches

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`; does not move the iterator."""
        first = step * self._global_batch + self._first
        sources, indices = self._order.locate(np.arange(first, first + self._share))
        samples = [self._samples[source][int(i)] for source, i in zip(sources, indices, strict=True)]
        return [
            Batch(*map(np.stack, zip(*samples[at : at + self._micro_batch], strict=True)))
            for at in range(0, self._share, self._micro_batch)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The next step, and a fingerprint of everything that decides which samples it has."""
        return {"step": self._step, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved step. Raises DataError when data, mixture, batch or seed are not those of the save."""
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "the training data, its weights, sequence length, global batch or seed changed since the checkpoint; "
                "restore them, or warm-start a new run with drafter.init_from"
            )
        self._step = state["step"]


def _check_same_encoding(sources: Sequence[Source]) -> None:
    first = sources[0].corpus
    for source in sources[1:]:
        other = source.corpus
        if other.encoding.tokenizer != first.encoding.tokenizer:
            raise DataError(f"{other.path} and {first.path} were made with different tokenizers; prepare one again")


def _fingerprint(sources: Sequence[Source], *settings: int) -> str:
    """Changes when any byte of any shard, the weights or the settings change."""
    shards = [[source.corpus.index["shards"], source.corpus.index["packs"], source.weight] for source in sources]
    return hashlib.sha256(json.dumps([shards, settings], sort_keys=True).encode()).hexdigest()
