"""A corpus as samples: sequences of one length, filled into the rows of a batch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_shards.errors import DataError
from data_shards.format import Array
from data_shards.order import BlockOrder
from data_shards.reader import ShardedTokens

READ_BYTES = 1 << 20


class Batch(NamedTuple):
    """Sequences of length T: four int64 arrays [B, T].

    `labels[b, t]` is the token after `input_ids[b, t]`; `mask[b, t]` is 1 where its prediction is trained; `positions`
    begin anew with each document that must not attend to the one before it.
    """

    input_ids: Array
    labels: Array
    mask: Array
    positions: Array

    @staticmethod
    def of_text(rows: int, length: int) -> Batch:
        """Ids still to be filled in; every prediction is trained, and each sequence is one document."""
        tokens = np.empty((rows, length + 1), np.int64)
        positions = np.broadcast_to(np.arange(length), (rows, length)).copy()
        return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, length), np.int64), positions)


class Samples(Protocol):
    """`size` samples; `block` neighbours are read at once."""

    size: int
    block: int

    def fill(self, batch: Batch, rows: Array, indices: Array) -> None:
        """Write the samples `indices` to the `rows` of a `Batch.of_text`."""


class TextSamples:
    """Consecutive sequences of a plain corpus.

    Documents run on within a sequence, or, with `separate`, do not see each other: positions restart, and a document's
    first token, which nothing precedes, is not trained. Blocks of about `READ_BYTES` are read whole and a window of
    them is kept.
    """

    def __init__(self, corpus: ShardedTokens, sequence_length: int, *, separate: bool = False) -> None:
        self.corpus, self.length, self.separate = corpus, sequence_length, separate
        self.size = (len(corpus) - 1) // sequence_length  # the last label is a token too
        if self.size < 1:
            raise DataError(f"{corpus.path}: its {len(corpus)} tokens are not one sequence of {sequence_length}")
        self.block = max(1, READ_BYTES // (sequence_length * corpus.dtype.itemsize))
        self._read = lru_cache(maxsize=BlockOrder.WINDOW)(self._read_block)

    def _read_block(self, block: int) -> Array:
        first = block * self.block
        last = min(first + self.block, self.size)
        return self.corpus.read(first * self.length, last * self.length + 1)

    def fill(self, batch: Batch, rows: Array, indices: Array) -> None:
        """Row by row, from blocks that were read whole."""
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            block, within = divmod(index, self.block)
            tokens = self._read(block)
            first = within * self.length
            batch.input_ids[row] = tokens[first : first + self.length]
            batch.labels[row, -1] = tokens[first + self.length]  # the others are inputs too, at the same place
            if self.separate:
                self._separate(batch, row, index)

    def _separate(self, batch: Batch, row: int, index: int) -> None:
        first = index * self.length
        starts = self.corpus.document_starts(first, first + self.length + 1)
        begin = np.zeros(self.length + 1, np.int64)
        begin[starts] = starts
        batch.positions[row] -= np.maximum.accumulate(begin)[:-1]
        batch.mask[row, starts[starts > 0] - 1] = 0


class PackSamples:
    """Packed conversations; trained on responses only, positions restart with each document."""

    block = 1

    def __init__(self, corpus: ShardedTokens, sequence_length: int) -> None:
        self.corpus, self.length = corpus, sequence_length
        self.size = corpus.num_packs
        if corpus.packed_length != sequence_length:
            raise DataError(
                f"{corpus.path}: packed for sequences of {corpus.packed_length}, not {sequence_length}; "
                "prepare it again or set data.sequence_length"
            )

    def fill(self, batch: Batch, rows: Array, indices: Array) -> None:
        """Pack by pack."""
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            self._fill_row(batch, row, index)

    def _fill_row(self, batch: Batch, row: int, index: int) -> None:
        capacity = self.length + 1
        tokens, mask, positions = (np.zeros(capacity, np.int64) for _ in range(3))
        at = 0
        for document in self.corpus.pack(index):
            start, stop = self.corpus.document_range(int(document))
            stop = min(stop, start + capacity - at)
            end = at + stop - start
            tokens[at:end] = self.corpus[start:stop]
            mask[at:end] = self.corpus.mask(slice(start, stop))
            positions[at:end] = np.arange(end - at)
            mask[at] = 0  # nothing precedes a document's first token that could predict it
            at = end
        positions[at:] = np.arange(capacity - at)  # padding is a document of its own: it attends to nothing real
        for array, values in zip(batch, (tokens[:-1], tokens[1:], mask[1:], positions[:-1]), strict=True):
            array[row] = values


def samples_of(corpus: ShardedTokens, sequence_length: int, **options: Any) -> Samples:
    """Packs where the corpus was packed, else consecutive sequences with the `options` of `TextSamples`."""
    if corpus.num_packs:
        return PackSamples(corpus, sequence_length)
    return TextSamples(corpus, sequence_length, **options)
