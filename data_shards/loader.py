"""From corpora on disk to the micro-batches of a training step.

The samples of global step s are positions `s * global_batch` to `(s + 1) * global_batch` of one global sequence, cut
into equal, contiguous slices for the ranks. Nothing else decides them, so they are the same for any world size and
after any resume, and the state to save is the step.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data_shards.errors import DataError
from data_shards.format import Array
from data_shards.order import MixtureOrder
from data_shards.reader import ShardedTokens
from data_shards.samples import Batch, samples_of

_STEPS_LOCATED = 32  # at once: the order is array work, and a step alone has few rows


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the mixture: relative to the others, or as `epochs` times its size.

    With neither, conversations have 9 times the weight of text.
    """

    corpus: ShardedTokens
    weight: float | None = None
    epochs: float | None = None


class TokenLoader:
    """Iterates over global steps; each is this rank's list of micro-batches, equally many on every rank.

    `global_batch`: sequences per optimizer step over all ranks; `micro_batch`: sequences per forward pass on one rank;
    `separate_documents`: those of plain text do not attend to each other, as conversations never do; `prefetch`: steps
    that a thread reads ahead. Raises DataError when the sources do not fit together, ValueError when the batch cannot
    be cut equally or only some of the sources have `epochs`.
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
        separate_documents: bool = False,
        prefetch: int = 2,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of micro-batch {micro_batch} x {world_size} ranks"
            )
        _check_same_encoding(sources)
        self._corpora = [source.corpus for source in sources]
        self._samples = [samples_of(source.corpus, sequence_length, separate=separate_documents) for source in sources]
        self._order = MixtureOrder(
            [samples.size for samples in self._samples],
            _weights(sources, [samples.size for samples in self._samples]),
            seed,
            [samples.block for samples in self._samples],
        )
        self._length, self._share = sequence_length, global_batch // world_size
        self._first = rank * self._share
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._step = 0
        self._fingerprint = _fingerprint(sources, sequence_length, global_batch, seed, separate_documents)
        self._located = lru_cache(maxsize=2)(self._locate)
        self._prefetch = prefetch
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="token-loader")
        self._ahead: deque[Future[list[Batch]]] = deque()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Endless: epochs follow each other, each in its own order."""
        return self

    def __next__(self) -> list[Batch]:
        """The next global step's micro-batches of this rank."""
        while len(self._ahead) < self._prefetch:
            self._ahead.append(self._reader.submit(self.step, self._step + len(self._ahead)))
        batches = self._ahead.popleft().result() if self._ahead else self.step(self._step)
        self._step += 1
        return batches

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`; does not move the iterator.

        Raises DataError where one of its samples has a token id outside the vocabulary.
        """
        chunk, at = divmod(step, _STEPS_LOCATED)
        sources, indices = (found[at] for found in self._located(chunk))
        whole = Batch.of_text(self._share, self._length)
        for source, samples in enumerate(self._samples):
            rows = np.flatnonzero(sources == source)
            samples.fill(whole, rows, indices[rows])
        self._refuse_foreign(whole, sources, indices, step * self._global_batch + self._first)
        return [
            Batch(*(array[at : at + self._micro_batch] for array in whole))
            for at in range(0, self._share, self._micro_batch)
        ]

    def first(self) -> Batch:
        """The first sequence of the order alone, the same on every rank: [1, T]."""
        sources, indices = self._order.locate(np.zeros(1, np.int64))
        batch = Batch.of_text(1, self._length)
        self._samples[int(sources[0])].fill(batch, np.zeros(1, np.int64), indices)
        self._refuse_foreign(batch, sources, indices, 0)
        return batch

    def _refuse_foreign(self, batch: Batch, sources: Array, indices: Array, first: int) -> None:
        """Raise DataError for a token id outside the vocabulary, as only a shard has that changed since it was written.

        Found here, among arrays: on a GPU it would be an assertion of the device, which names nothing. `first`: the
        position of the first row in the order.
        """
        last = batch.labels[:, -1]  # the other labels are inputs too
        vocab_size = self._corpora[0].encoding.vocab_size
        if max(batch.input_ids.max(), last.max()) < vocab_size:
            return
        row = int(np.flatnonzero((batch.input_ids.max(axis=1) >= vocab_size) | (last >= vocab_size))[0])
        path, found = self._corpora[int(sources[row])].path, max(batch.input_ids[row].max(), last[row])
        raise DataError(
            f"{path}: its sample {indices[row]} (number {first + row} of the order) has the token id {found}, outside "
            f"the vocabulary of {vocab_size}: a shard was changed or damaged; see prepare --verify out={path}, "
            "and prepare it again"
        )

    def _locate(self, chunk: int) -> tuple[Array, Array]:
        """Source and sample of each row of this rank, int64 [steps, rows], for a few steps at a time."""
        steps = chunk * _STEPS_LOCATED + np.arange(_STEPS_LOCATED)
        return self._order.locate(steps[:, None] * self._global_batch + self._first + np.arange(self._share))

    def epochs(self) -> list[float]:
        """How often each source has been gone through before the next step."""
        drawn = self._order.drawn(self._step * self._global_batch)
        return [count / samples.size for count, samples in zip(drawn, self._samples, strict=True)]

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
        for read_ahead in self._ahead:
            read_ahead.cancel()
        self._ahead.clear()
        self._step = state["step"]


def _weights(sources: Sequence[Source], sizes: Sequence[int]) -> list[float]:
    if len({source.epochs is None for source in sources}) > 1:
        raise ValueError("give every source of the mixture epochs, or none")
    return [
        source.epochs * size
        if source.epochs is not None
        else source.weight or (9.0 if source.corpus.num_packs else 1.0)
        for source, size in zip(sources, sizes, strict=True)
    ]


def _check_same_encoding(sources: Sequence[Source]) -> None:
    first = sources[0].corpus
    for source in sources[1:]:
        other = source.corpus
        if other.encoding.tokenizer != first.encoding.tokenizer:
            raise DataError(f"{other.path} and {first.path} were made with different tokenizers; prepare one again")


def _fingerprint(sources: Sequence[Source], *settings: int) -> str:
    """Changes when any byte of any shard, the weights or the settings change."""
    shards = [
        [source.corpus.index["shards"], source.corpus.index["packs"], source.weight, source.epochs]
        for source in sources
    ]
    return hashlib.sha256(json.dumps([shards, settings], sort_keys=True).encode()).hexdigest()
