"""Which GPU is a process's, and whether it shares it with another: decided before NCCL is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserError
from dist_train.runtime.world import World, node_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, order=True)
class Seat:
    """A rank, and the GPU that it takes: `gpu` tells it from every other of its node, `visible` is how many it sees."""

    node: str
    gpu: str
    rank: int
    visible: int


def device_index(world: World, count: int) -> int:
    """Of the `count` GPUs that a process sees, the one it takes.

    One of a task's own (--gpus-per-task=1, --gpu-bind=single:1) has the index 0, whatever the task's place on its node.
    """
    return world.local_rank % count


def shared_gpus(seats: Sequence[Seat]) -> str | None:
    """What to say where several ranks take one GPU; None where each has its own."""
    for (node, _), group in groupby(sorted(seats), key=lambda seat: (seat.node, seat.gpu)):
        ranks = list(group)
        if len(ranks) > 1:
            here = [seat for seat in seats if seat.node == node]
            gpus = len({seat.gpu for seat in here})
            visible = ranks[0].visible
            return (
                f"{node}: ranks {', '.join(str(seat.rank) for seat in ranks)} see "
                f"{'one GPU, the same' if visible == 1 else f'the same {visible} GPUs'}: {len(here)} tasks for "
                f"{gpus} GPU{'s' if gpus > 1 else ''}; ask for one GPU a task, --gpus-per-node={len(here)} with "
                f"--ntasks-per-node={len(here)}, or for {gpus} task{'s' if gpus > 1 else ''}"
            )
    return None


def refuse_shared_gpus(world: World, device: torch.device, store: Any, patience: timedelta) -> None:
    """Raise UserError, on all ranks, where two of them would use one GPU: NCCL would fail or hang. Collective."""
    import torch
    from torch._C._distributed_c10d import PrefixStore

    store = PrefixStore("gpus", store)
    seat = Seat(node_name(), _identity(device), world.rank, torch.cuda.device_count())
    store.set(str(world.rank), json.dumps(asdict(seat)))
    if world.is_first:
        keys = [str(rank) for rank in range(world.size)]
        store.wait(keys, patience)
        store.set("verdict", shared_gpus([Seat(**json.loads(found)) for found in store.multi_get(keys)]) or "")
    store.wait(["verdict"], patience)
    if complaint := store.get("verdict").decode():
        raise UserError(complaint)


def current_gpu() -> str:
    """The name of the GPU that this process works on, "unknown" where it has none."""
    import torch

    if not torch.cuda.is_initialized():
        return "unknown"
    return gpu_name(torch.device("cuda", torch.cuda.current_device()))


def gpu_name(device: torch.device) -> str:
    """As the node's own tools number it, where that is known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    return visible[index] if index < len(visible) and visible[index] else str(index)


def _identity(device: torch.device) -> str:
    import torch

    name = gpu_name(device)
    return name if name.startswith("MIG-") else str(torch.cuda.get_device_properties(device).uuid)
