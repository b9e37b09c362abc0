"""Who is here: ranks that do not come, and checks that do not end, lead to a message in bounded time."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from dist_train.errors import UserError
from dist_train.runtime.devices import device_index, refuse_shared_gpus
from dist_train.runtime.rendezvous import meet
from dist_train.runtime.world import World, node_name

_MARGIN = 15.0  # seconds by which the others' patience exceeds that of rank 0, which tells them


class AbsentError(Exception):
    """Some ranks did not come. `tells`: this rank prints it; the others know the same from rank 0."""

    def __init__(self, message: str, *, tells: bool) -> None:
        super().__init__(message)
        self.tells = tells


@contextmanager
def assembled(world: World, patience: float) -> Iterator[None]:
    """A process group of all ranks, if all come within `patience` seconds; `runtime.started` takes it over.

    Raises AbsentError, on every rank that is there, with the ranks that are not. One process needs no group.
    """
    if world.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    store = _call_the_roll(world, patience)
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", device_index(world, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        refuse_shared_gpus(world, device, store, timedelta(seconds=patience + _MARGIN))
    # Longer than a check may take: the deadline of the check speaks first.
    dist.init_process_group(
        backend,
        store=PrefixStore("doctor", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=2 * patience + _MARGIN),
    )
    yield


def _call_the_roll(world: World, patience: float) -> Any:
    """The store at which all ranks have met."""
    try:
        store, _ = meet(world, timedelta(seconds=patience))
    except UserError as error:
        raise AbsentError(str(error), tells=True) from error
    store.set(f"here/{world.rank}", node_name())
    absent = _absent(store, world, patience)
    if absent:
        if world.is_first:
            time.sleep(1.0)  # the store ends with this process, and the others read from it
        raise AbsentError(
            f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} of {world.size} did not come within "
            f"{patience:.0f} s; look at their logs and nodes, or give --wait more seconds",
            tells=world.is_first or absent == [0],
        )
    return store


def _absent(store: Any, world: World, patience: float) -> list[int]:
    """The ranks that have not come: rank 0 waits for all, and tells."""
    if not world.is_first:
        try:
            store.wait(["verdict"], timedelta(seconds=patience + _MARGIN))
            absent: list[int] = json.loads(store.get("verdict"))
        except RuntimeError:
            return [0]
        return absent
    deadline, missing = time.monotonic() + patience, list(range(world.size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        time.sleep(0.05)
    store.set("verdict", json.dumps(missing))
    return missing


@contextmanager
def deadline(what: str, seconds: float, rank: int, mend: str) -> Iterator[None]:
    """End this process with one line and exit code 1 if the `with` block takes longer: a collective cannot be left."""

    def end() -> None:
        line = f"FAIL  {what}: rank {rank} on {node_name()} still waits after {seconds:.0f} s; {mend}"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
