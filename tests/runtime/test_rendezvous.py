"""Where ranks meet, and which GPU is whose: without SLURM and without a GPU."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from runs import on_ranks

from dist_train.errors import UserError
from dist_train.runtime.devices import Seat, device_index, shared_gpus
from dist_train.runtime.rendezvous import meet
from dist_train.runtime.world import World, find_world

SRUN = {"SLURM_JOB_ID": "41234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
MEET = """
from datetime import timedelta
from dist_train.runtime.rendezvous import meet
from dist_train.runtime.world import find_world
world = find_world()
store, port = meet(world, timedelta(seconds=60))
store.set(f"here/{world.rank}", "yes")
store.wait([f"here/{rank}" for rank in range(world.size)], timedelta(seconds=60))
print(port)
store.add("gone", 1)
while world.is_first and store.add("gone", 0) < world.size: pass
"""


def place(rank, **more):
    return {**SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **more}


@pytest.mark.parametrize("job", range(1, 60_000, 3571))
def test_ports_of_a_job_are_no_ephemeral_ones(job):
    ports = find_world(place(0, SLURM_JOB_ID=str(job))).ports
    assert len(set(ports)) == len(ports) > 1
    assert all(1024 <= port < 32_768 for port in ports)
    assert ports == find_world(place(1, SLURM_JOB_ID=str(job))).ports


def test_ranks_meet_at_the_next_port_where_others_have_the_first_ones():
    """A mute listener has the first, another step of the same job the second."""
    first, second, *_ = find_world(place(0)).ports
    with contextlib.ExitStack() as stack:
        mute, other = (stack.enter_context(socket.create_server(("127.0.0.1", port))) for port in (first, second))
        starts = []
        for rank in (1, 0):
            environment = {**os.environ, **place(rank)}
            start = [sys.executable, "-c", MEET]
            starts.append(subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True))
        other.settimeout(60)
        asked, _ = other.accept()
        asked.sendall(b"41234.7.0 20000\n")
        asked.close()
        told = [start.communicate(timeout=120)[0].split() for start in starts]
    assert told[0] == told[1] and int(told[0][0]) not in (first, second)
    assert int(told[0][0]) in find_world(place(0)).ports
    assert mute.fileno() == -1


def test_a_port_that_the_user_names_and_another_has_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        world = find_world(place(0, MASTER_PORT=str(port)))
        with pytest.raises(UserError, match=rf"cannot listen: port {port} in use; set MASTER_PORT"):
            meet(world, None)


def listening(pid):
    """The local addresses, as the kernel has them, at which a process listens."""
    inodes = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))  # noqa: PTH115
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as lines:  # noqa: PTH123
            rows = [line.split() for line in list(lines)[1:]]
        found += [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return found


LISTENING = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from dist_train.runtime.process_group import started
with started() as runtime:
    runtime.sum(torch.ones(3))
    from test_rendezvous import listening
    print(" ".join(sorted(set(listening(os.getpid())))))
    runtime.barrier()
"""


def test_ranks_on_this_machine_listen_on_the_loopback_alone():
    for rank, done in enumerate(on_ranks(LISTENING.format(tests=os.path.dirname(__file__)), 2)):  # noqa: PTH120
        assert set(done.stdout.split()) == {"0100007F"}, (rank, done.stdout)


def world(local_rank, size=8):
    return World(local_rank, local_rank, size, "node0", 20_000, "slurm")


@pytest.mark.parametrize(("seen", "indices"), [(8, range(8)), (1, [0] * 8), (2, [0, 1] * 4)])
def test_a_task_takes_its_gpu_among_those_that_it_sees(seen, indices):
    assert [device_index(world(rank), seen) for rank in range(8)] == list(indices)


def seats(gpus, visible, node="node7", first=0):
    return [Seat(node, gpu, first + i, visible) for i, gpu in enumerate(gpus)]


def test_tasks_that_share_a_gpu_are_refused_by_name():
    own = [f"GPU-{i}" for i in range(8)]
    assert shared_gpus(seats(own, 8)) is None
    assert shared_gpus(seats(own, 1)) is None  # --gpus-per-task=1
    assert shared_gpus([*seats(own, 8), *seats(own, 8, "node8", 8)]) is None  # a node's own names may repeat
    told = shared_gpus([*seats(own, 8, "node1", 8), *seats(["GPU-3"] * 8, 1)])
    assert told.startswith("node7: ranks 0, 1, 2, 3, 4, 5, 6, 7 see one GPU, the same: 8 tasks for 1 GPU;")
    assert "--gpus-per-node=8" in told and "\n" not in told
    told = shared_gpus(seats([f"GPU-{i % 4}" for i in range(8)], 4))
    assert told.startswith("node7: ranks 0, 4 see the same 4 GPUs: 8 tasks for 4 GPUs")
