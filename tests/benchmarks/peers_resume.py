"""Contestants of `data.py resume`: stopped at 90 % of an epoch, gone on with on as many ranks or others.

Ranks are processes with gloo, as the peers' loaders expect. A sample is known by its first tokens, which are random.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers_load import make_arrow, make_litdata, make_mds, once, sequences


class Task(NamedTuple):
    """What each rank is told."""

    work: str
    prepared: str
    length: int
    batch: int
    state: Any
    steps: int | None

    @property
    def tokens(self) -> Path:
        """The corpus."""
        return Path(self.work, "tokens")


Iterating = tuple[Iterator[Any], Callable[[], Any]]
"""Batches of this rank from the state on, to the end of the epoch; and the state to go on from."""


def dist_train(task: Task, rank: int, ranks: int) -> Iterating:
    """`TokenLoader`."""
    from data_shards import ShardedTokens, Source, TokenLoader

    corpus = ShardedTokens(task.tokens)
    share = task.batch // ranks
    loader = TokenLoader(
        [Source(corpus)],
        sequence_length=task.length,
        global_batch=task.batch,
        micro_batch=share,
        seed=0,
        rank=rank,
        world_size=ranks,
    )
    if task.state:
        loader.load_state_dict(task.state)
    steps = (len(corpus) - 1) // task.length // task.batch
    first = loader.state_dict()["step"]
    return (step[0].input_ids for step in islice(loader, steps - first)), loader.state_dict


def arrow(task: Task, rank: int, ranks: int) -> Iterating:
    """torch's DataLoader with a distributed sampler; it has no state, what was seen is read again and dropped."""
    import datasets
    from torch.utils.data import DataLoader, DistributedSampler

    folder = once(task.prepared, lambda folder: make_arrow(task.work, task.length, folder))
    table = datasets.load_from_disk(folder)
    sampler: Any = DistributedSampler(table, ranks, rank, seed=0, drop_last=True)
    loader = DataLoader(table.with_format("numpy"), task.batch // ranks, sampler=sampler, drop_last=True, num_workers=2)
    done = task.state or 0
    seen = [done]

    def batches() -> Iterator[Any]:
        for step in islice(loader, done, None):
            seen[0] += 1
            yield step["ids"]

    return batches(), lambda: seen[0]


def mosaicml_streaming(task: Task, rank: int, ranks: int) -> Iterating:
    """Its own data loader's state; canonical nodes fixed, as it asks for where ranks change."""
    from streaming import StreamingDataLoader, StreamingDataset

    folder = once(task.prepared, lambda folder: make_mds(task.work, task.length, folder))
    share = task.batch // ranks
    data = StreamingDataset(local=folder, shuffle=True, batch_size=share, num_canonical_nodes=1)
    loader = StreamingDataLoader(data, batch_size=share, num_workers=0, drop_last=True)
    if task.state:
        loader.load_state_dict(task.state)
    return (step["ids"].numpy() for step in loader), loader.state_dict


def litdata(task: Task, rank: int, ranks: int) -> Iterating:
    """Its own data loader's state."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    folder = once(task.prepared, lambda folder: make_litdata(task.work, task.length, folder))
    data = StreamingDataset(folder, item_loader=TokensLoader(block_size=task.length), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(data, batch_size=task.batch // ranks, num_workers=0, drop_last=True)
    if task.state:
        loader.load_state_dict(task.state)
    return (step.numpy() for step in loader), loader.state_dict


ITERATORS = {
    "dist-train": dist_train,
    "DataLoader over Arrow": arrow,
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata,
}


# -- ranks ------------------------------------------------------------------------------------------------------


def _rank(name: str, task: Task, rank: int, ranks: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        ITERATORS[name](task, rank, ranks)  # imports, and what a peer makes once
        dist.barrier()
        began = time.perf_counter()
        batches, state = ITERATORS[name](task, rank, ranks)
        seen: list[bytes] = []
        first = 0.0
        for batch in batches:
            first = first or time.perf_counter() - began
            seen += [np.asarray(row[:8], np.uint16).tobytes() for row in batch]
            if task.steps and len(seen) * ranks >= task.steps * task.batch:
                break
        results.put((rank, first, seen, state(), None))
    except ModuleNotFoundError as error:
        results.put((rank, 0.0, [], None, error))
    except Exception as error:
        results.put((rank, 0.0, [], None, RuntimeError(str(error))))
    dist.barrier()


def _run(name: str, task: Task, ranks: int) -> tuple[float, Counter[bytes], Any]:
    from dist_train.runtime.world import free_port

    context = multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=_rank, args=(name, task, rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join(10)
        process.kill()
    for *_, error in found:
        if error:
            raise error
    return max(result[1] for result in found), Counter(key for result in found for key in result[2]), found[0][3]


def resumed(name: str, work: str, prepared: str, length: int, batch: int, before: int, after: int) -> dict[str, Any]:
    """Seconds of the slowest rank to its first batch; samples of the epoch that came twice, and that never came.

    The rest of an epoch that fills no global batch is not counted as missed.
    """
    task = Task(work, prepared, length, batch, None, None)
    every = Counter(np.asarray(ids[:8], np.uint16).tobytes() for ids in sequences(work, length))
    steps = len(every) // batch
    if not Path(prepared).exists():  # by one process: several would get in each other's way
        _run(name, task._replace(steps=1), 1)
    _, first_part, state = _run(name, task._replace(steps=int(0.9 * steps)), before)
    seconds, rest, _ = _run(name, task._replace(state=state), after)
    seen = first_part + rest
    repeated = sum((seen - every).values())
    missed = sum((every - seen).values())
    return {"seconds": seconds, "repeated": repeated, "missed": max(0, missed - (len(every) - steps * batch))}


def _contestant(name: str) -> Callable[..., dict[str, Any]]:
    return lambda folder, **arguments: resumed(name, **arguments)


RESUMES = {name: _contestant(name) for name in ITERATORS}
