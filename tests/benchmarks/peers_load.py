"""Contestants of `data.py load`: batches of token sequences in a shuffled order, as int64 tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 32_000


def make_tokens(folder: Path, tokens: int, document: int = 1000) -> None:
    """A corpus of random ids."""
    from data_shards import Encoding, ShardWriter

    drawn = np.random.default_rng(0)
    with ShardWriter(folder, Encoding("random", VOCAB_SIZE), 1 << 26) as writer:
        for first in range(0, tokens, 1000 * document):
            ids = drawn.integers(VOCAB_SIZE, size=min(1000 * document, tokens - first), dtype=np.uint16)
            for at in range(0, len(ids), document):
                writer.add(ids[at : at + document])


def sequences(work: str, length: int) -> Iterator[Any]:
    """The corpus cut into sequences, uint16, for the peers' own writers."""
    from data_shards import ShardedTokens

    corpus = ShardedTokens(f"{work}/tokens")
    for at in range(0, len(corpus) - length, length):
        yield corpus[at : at + length]


def once(prepared: str, make: Callable[[str], None]) -> str:
    """What a peer made of the corpus, made before the clock runs."""
    if not Path(prepared).exists():
        make(prepared)
    return prepared


def timed(build: Callable[[], Iterator[Any]], batches: int) -> dict[str, Any]:
    """Seconds of all batches, the first included, of the first, and the 99th percentile of the others."""
    began = last = time.perf_counter()
    waits, total = [], 0
    for batch in islice(build(), batches):
        total += int(batch[0, 0])  # the batch is there, not promised
        now = time.perf_counter()
        waits.append(now - last)
        last = now
    assert len(waits) == batches, f"only {len(waits)} batches"
    return {"seconds": last - began, "first": waits[0], "p99": float(np.percentile(waits[1:], 99))}


def dist_train(work: str, prepared: str, length: int, batch: int, batches: int, workers: int, **_: Any) -> Any:
    """`TokenLoader`; its workers are steps read ahead by a thread. Labels, mask and positions come with it."""
    import torch

    from data_shards import ShardedTokens, Source, TokenLoader

    def build() -> Iterator[Any]:
        loader = TokenLoader(
            [Source(ShardedTokens(f"{work}/tokens"))],
            sequence_length=length,
            global_batch=batch,
            micro_batch=batch,
            seed=0,
            prefetch=workers,
        )
        return (torch.from_numpy(step[0].input_ids) for step in loader)

    return timed(build, batches)


def arrow(work: str, prepared: str, length: int, batch: int, batches: int, workers: int, **_: Any) -> Any:
    """torch's DataLoader with a random sampler over an Arrow table of lists."""
    import datasets
    from torch.utils.data import DataLoader

    folder = once(prepared, lambda folder: make_arrow(work, length, folder))

    def build() -> Iterator[Any]:
        table = datasets.load_from_disk(folder).with_format("torch")
        loader = DataLoader(table, batch_size=batch, shuffle=True, num_workers=workers)
        return (step["ids"] for step in loader)

    return timed(build, batches)


def mosaicml_streaming(work: str, prepared: str, length: int, batch: int, batches: int, workers: int, **_: Any) -> Any:
    """MDS shards of fixed arrays, its own data loader."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    folder = once(prepared, lambda folder: make_mds(work, length, folder))
    clean_stale_shared_memory()

    class Ids(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return super().__getitem__(at)["ids"].astype(np.int64)

    def build() -> Iterator[Any]:
        data = Ids(local=folder, shuffle=True, batch_size=batch)
        return iter(StreamingDataLoader(data, batch_size=batch, num_workers=workers))

    return timed(build, batches)


def litdata(work: str, prepared: str, length: int, batch: int, batches: int, workers: int, **_: Any) -> Any:
    """Optimised chunks of tokens, its own data loader."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    folder = once(prepared, lambda folder: make_litdata(work, length, folder))

    def build() -> Iterator[Any]:
        data = StreamingDataset(folder, item_loader=TokensLoader(block_size=length), shuffle=True)
        loader = StreamingDataLoader(data, batch_size=batch, num_workers=workers)
        return (step.to(torch.int64) for step in loader)

    return timed(build, batches)


def make_arrow(work: str, length: int, folder: str) -> None:
    """A table of lists of one length."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"), length)})
    rows = datasets.Dataset.from_generator(
        lambda: ({"ids": ids} for ids in sequences(work, length)), features=features, cache_dir=f"{folder}-cache"
    )
    rows.save_to_disk(folder)


def make_mds(work: str, length: int, folder: str) -> None:
    """mosaicml-streaming's shards."""
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"ids": f"ndarray:uint16:{length}"}) as writer:
        for ids in sequences(work, length):
            writer.write({"ids": ids})


def make_litdata(work: str, length: int, folder: str) -> None:
    """Its chunks."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=_litdata_parts,
        inputs=[(work, length, part) for part in range(2)],
        output_dir=folder,
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
        num_workers=2,
    )


def _litdata_parts(task: tuple[str, int, int]) -> Iterator[Any]:
    import torch

    work, length, part = task
    for number, ids in enumerate(sequences(work, length)):
        if number % 2 == part:
            yield torch.from_numpy(ids)


LOADERS: dict[str, Callable[..., Any]] = {
    "dist-train": dist_train,
    "DataLoader over Arrow": arrow,
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata,
}
