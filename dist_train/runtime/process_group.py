"""The process group of a stage, and what its ranks do together.

Whatever the launcher was, the variables that torch.distributed and DeepSpeed read are set from `find_world`, so that
neither guesses.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_shards.errors import DataError
from dist_train.errors import UserError
from dist_train.runtime.devices import device_index, refuse_shared_gpus
from dist_train.runtime.progress import phase
from dist_train.runtime.rendezvous import meet
from dist_train.runtime.world import World, cores, find_world, local_world_size

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """A started process group: what stages need to know of it."""

    world: World
    device: torch.device

    @property
    def rank(self) -> int:
        """Index of this process, 0 to world_size - 1."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.world.is_first

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all ranks, on every rank; in place."""
        import torch.distributed as dist

        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 alone and give all ranks its result, or its error, as a UserError.

        An error on one rank would otherwise leave the others waiting at their next collective.
        """
        outcome: tuple[Any, str | None] = (None, None)
        if self.is_first:
            try:
                outcome = (action(), None)
            except (UserError, DataError) as error:
                outcome = (None, str(error))
        result, refusal = self.first(outcome)
        if refusal is not None:
            raise UserError(refusal)
        return result

    def everywhere(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank, each with its own result; where some fail, all raise the first one's error."""
        result, refusal = None, None
        try:
            result = action()
        except (UserError, DataError) as error:
            refusal = str(error) if self.world_size == 1 else f"rank {self.rank}: {error}"
        if refusals := [found for found in self.gather(refusal) if found is not None]:
            raise UserError(refusals[0])
        return result


def settle_allocator(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch grow its blocks of GPU memory in place, where the user says nothing else.

    Gradients, chunks of logits and the layers of a target that come and go would leave gaps between whole ones. PyTorch
    reads this when a process first takes memory of a GPU.
    """
    if "PYTORCH_ALLOC_CONF" not in environment:  # the newer name, which PyTorch reads first
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def started() -> Iterator[Runtime]:
    """Start the process group (nccl with CUDA, gloo without) for the length of a `with` block."""
    world = find_world()
    settle_allocator(os.environ)
    import torch
    import torch.distributed as dist

    quiet_libraries()
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        device = torch.device("cuda", device_index(world, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # torchrun and srun leave this to each process; all cores for each of several would fight.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // local_world_size(world)))
    port = world.master_port
    if not dist.is_initialized():  # by the doctor, who waits less long
        with phase(f"waiting for {world.size} ranks"):
            port = start_process_group(world, device, COLLECTIVE_TIMEOUT)
    place = {
        "RANK": world.rank,
        "LOCAL_RANK": device.index or 0 if has_cuda else world.local_rank,  # DeepSpeed's index of the device
        "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": port,
    }
    before = {name: os.environ.get(name) for name in place}
    os.environ.update({name: str(value) for name, value in place.items()})
    import deepspeed

    # Its CPU accelerator would compile an all-reduce that only its tensor-parallel inference calls, behind a lock file
    # that a killed process leaves to all later ones. PyTorch's own serves. Set, not changed: reading it first would try
    # the compiler and linker on every operator.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed("nccl" if has_cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    try:
        yield Runtime(world, device)
    finally:
        if torch.distributed.is_initialized():
            deepspeed.comm.destroy_process_group()  # and DeepSpeed's own groups, so that another run can start here
        # What this process starts next has a place of its own.
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def start_process_group(world: World, device: torch.device, timeout: timedelta) -> int:
    """Make torch's process group, nccl with CUDA, gloo without; the port of its store. Collective.

    `timeout`: how long ranks wait for each other, here and in collectives. Raises UserError where they do not meet, or
    would share a GPU.
    """
    import torch.distributed as dist

    store, port = meet(world, timeout)
    several_gpus = device.type == "cuda" and world.size > 1
    if several_gpus:
        refuse_shared_gpus(world, device, store, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if several_gpus else None,
    )
    return port


def quiet_libraries() -> None:
    """Keep the libraries' own bars and deprecation notices off the screen; their warnings stay."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch alike on every rank."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
