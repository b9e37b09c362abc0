"""Where the ranks of a stage meet: a store at rank 0, through which the process group is made.

It has no authentication, so it listens on the loopback where all ranks are on this machine. Under SLURM its port comes
from the job's id; if another process has that port, rank 0 takes the next, and the others ask at each for the one that
answers with the name of their meeting.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.runtime.world import World, node_name, on_loopback

_BACKLOG = 4096
_SECONDS_TO_ANSWER = 2.0  # at a port that may be anybody's
_SECONDS_BETWEEN_ROUNDS = 0.2
_meetings = itertools.count()  # of this process: stages may follow each other in it


def meet(world: World, patience: timedelta) -> tuple[Any, int]:
    """The store of this world's ranks, and its port. Collective.

    Raises UserError where rank 0 finds no port to listen at, or does not answer within `patience`.
    """
    from torch._C._distributed_c10d import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens, not rank 0
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=patience))
        return store, world.master_port
    meeting = f"{world.meeting}.{next(_meetings)}"
    if world.is_first:
        listener, port = _open(world, world.ports)
        if len(world.ports) > 1:
            door = listener  # whoever comes there is told where the store is
            listener, port = _open(world, world.ports[world.ports.index(port) + 1 :])
            threading.Thread(target=_tell, args=(door, f"{meeting} {port}\n"), daemon=True).start()
        address = "127.0.0.1" if on_loopback(world.master_addr) else world.master_addr
        descriptor = listener.detach()
        store = TCPStore(
            address, port, is_master=True, timeout=patience, wait_for_workers=False, master_listen_fd=descriptor
        )
        return store, port
    deadline = time.monotonic() + patience.total_seconds()
    port = _find(world, meeting, deadline) if len(world.ports) > 1 else world.master_port
    try:
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        return TCPStore(world.master_addr, port, is_master=False, timeout=left, wait_for_workers=False), port
    except RuntimeError as error:
        raise UserError(f"{_unanswered(world, port, patience.total_seconds())} ({first_line(error)[:200]})") from error


def _open(world: World, ports: Sequence[int]) -> tuple[socket.socket, int]:
    """A socket that listens at the first port that is free."""
    alone = on_loopback(world.master_addr)
    both = not alone and socket.has_dualstack_ipv6()
    for port in ports:
        try:
            listener = socket.create_server(
                ("127.0.0.1" if alone else "", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=_BACKLOG,
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"rank 0 cannot listen at port {port}: {error.strerror}; set MASTER_PORT") from error
            continue
        return listener, int(listener.getsockname()[1])
    tried = ", ".join(map(str, ports))
    raise UserError(f"rank 0 on {node_name()} cannot listen: port {tried} in use; set MASTER_PORT to a free one")


def _tell(door: socket.socket, line: str) -> None:
    """Answer whoever comes, as long as this process lives."""
    while True:
        connection, _ = door.accept()
        with connection, suppress(OSError):  # who came is gone again
            connection.sendall(line.encode())


def _find(world: World, meeting: str, deadline: float) -> int:
    """The port of the store, asked for at each port where it may be told."""
    began = time.monotonic()
    while time.monotonic() < deadline:
        for port in world.ports:
            name, _, told = _asked(world.master_addr, port).partition(" ")
            if name == meeting and told.isdecimal():
                return int(told)
        time.sleep(_SECONDS_BETWEEN_ROUNDS)
    raise UserError(_unanswered(world, world.master_port, time.monotonic() - began))


def _asked(host: str, port: int) -> str:
    """The line with which a port answers; nothing where it does not."""
    try:
        with socket.create_connection((host, port), _SECONDS_TO_ANSWER) as connection:
            return connection.recv(200).decode(errors="replace").strip()
    except OSError:
        return ""


def _unanswered(world: World, port: int, seconds: float) -> str:
    return (
        f"rank {world.rank} on {node_name()}: rank 0 does not answer at {world.master_addr}:{port} within "
        f"{seconds:.0f} s; is it there, and may the nodes reach each other (firewall, MASTER_ADDR)?"
    )
