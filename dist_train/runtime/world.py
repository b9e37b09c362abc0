"""Who am I: one answer for SLURM, torchrun, MPI and a single process.

A process started by `srun` finds its place in SLURM's variables, one started by torchrun or by `--nproc` in RANK and
WORLD_SIZE, one started by `mpiexec` in MPI's; anything else is one process.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from dist_train.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among all: read from the environment, before anything is started."""

    rank: int
    local_rank: int
    size: int
    master_addr: str
    master_port: int
    launcher: str
    spare_ports: tuple[int, ...] = ()
    """where rank 0 may listen instead, if another process has the port"""
    meeting: str = ""
    """tells the ranks of this start of this job from others that listen at the same ports"""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def ports(self) -> tuple[int, ...]:
        """Where rank 0 may listen, in the order of trying."""
        return (self.master_port, *self.spare_ports)


# Below Linux' ephemeral ports (32768 and up), any of which an outgoing connection of anybody may have at any time.
_FIRST_PORT, _PORTS, _TRIES = 20_000, 12_768, 16


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
        job = int(environment["SLURM_JOB_ID"])
        # Two jobs on one node must not meet: the port is the job's own.
        given = environment.get("MASTER_PORT")
        ports = [int(given)] if given else [_FIRST_PORT + (job + 797 * i) % _PORTS for i in range(_TRIES)]
        step = [environment.get(name, "0") for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
        return World(
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            size=int(environment["SLURM_STEP_NUM_TASKS"]),
            master_addr=environment.get("MASTER_ADDR") or _first_slurm_host(environment),
            master_port=ports[0],
            launcher="slurm",
            spare_ports=tuple(ports[1:]),
            meeting=".".join([str(job), *step]),
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


def local_world_size(world: World) -> int:
    """Processes on this node."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        # SLURM writes "2(x3)" for two tasks on each of three nodes.
        if count := os.environ.get(name, "").split("(")[0].split(",")[0]:
            return int(count)
    return world.size if world.master_addr in ("127.0.0.1", "localhost", socket.gethostname()) else 1


def on_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def node_name() -> str:
    """This node as SLURM calls it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
