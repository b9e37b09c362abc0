"""Who am I: one answer for SLURM, torchrun, MPI and a single process.

A process started by `srun` finds its place in SLURM's variables, one started by torchrun or by `--nproc` in RANK and
WORLD_SIZE, one started by `mpiexec` in MPI's; anything else is one process. Whatever the source, the variables that
torch.distributed and DeepSpeed read are set from it, so that neither guesses.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from data_shards.errors import DataError
from dist_train.errors import UserError

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process's place among all: read from the environment, before anything is started."""

    rank: int
    local_rank: int
    size: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Resolve rank, local rank, world size and master.

    Raises UserError when a launcher left out what it must say.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return World(
            rank=int(environment["RANK"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            size=int(environment["WORLD_SIZE"]),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT", "29500")),
            launcher="torchrun",
        )
    # A batch script has SLURM_PROCID too; only a step started by srun has SLURM_STEP_NUM_TASKS.
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return World(
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            size=int(environment["SLURM_STEP_NUM_TASKS"]),
            master_addr=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            # Two jobs on one node must not meet: the port is the job's own.
            master_port=int(environment.get("MASTER_PORT") or 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
            launcher="slurm",
        )
    return World(rank=0, local_rank=0, size=1, master_addr="127.0.0.1", master_port=0, launcher="single process")


def is_spokesman(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what every process would say is this one's to say: it is alone, or rank 0 of any launcher."""
    return all(environment.get(name, "0") == "0" for name in ("RANK", "PMI_RANK", "SLURM_PROCID"))


@cache
def tell_once(line: str) -> None:
    """Say what every process finds, on the error stream; with --nproc its parent may have said it, too."""
    if is_spokesman():
        print(line, file=sys.stderr, flush=True)


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    """The address under which SLURM itself reaches the first node of the step."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    first = _scontrol("show", "hostnames", nodes).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
    return address[1] if address else first


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol {' '.join(arguments)} does not answer ({error}); set MASTER_ADDR") from error


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


@contextmanager
def started() -> Iterator[Runtime]:
    """Start the process group (nccl with CUDA, gloo without) for the length of a `with` block."""
    world = find_world()
    place = {
        "RANK": world.rank,
        "LOCAL_RANK": world.local_rank,
        "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": world.master_port,  # 0 of a process alone: whichever is free when it listens
    }
    before = {name: os.environ.get(name) for name in place}
    os.environ.update({name: str(value) for name, value in place.items()})
    import torch

    quiet_libraries()
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # torchrun and srun leave this to each process; all cores for each of several would fight.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // local_world_size(world)))
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count()) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    import deepspeed

    # Its CPU accelerator would compile an all-reduce that only its tensor-parallel inference calls, behind a lock file
    # that a killed process leaves to all later ones. PyTorch's own serves. Set, not changed: reading it first would try
    # the compiler and linker on every operator.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(
        "nccl" if has_cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        yield Runtime(world, device)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # What this process starts next has a place of its own.
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def quiet_libraries() -> None:
    """Keep the libraries' own bars and deprecation notices off the screen; their warnings stay."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def local_world_size(world: World) -> int:
    """Processes on this node."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        # SLURM writes "2(x3)" for two tasks on each of three nodes.
        if count := os.environ.get(name, "").split("(")[0].split(",")[0]:
            return int(count)
    return world.size if world.master_addr in ("127.0.0.1", "localhost", socket.gethostname()) else 1


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch alike on every rank."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
