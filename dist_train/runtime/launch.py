"""Start a stage in several processes on this machine, for `--nproc`. On a cluster srun does this."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError
from dist_train.runtime.progress import silence
from dist_train.runtime.world import cores, free_port

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `dist-train ARGUMENTS` in `processes` processes that know each other as torchrun's would.

    Returns the first non-zero exit code, or 0. When one fails the others are stopped: they would wait for it in their
    next collective. SIGTERM, SIGINT and SIGUSR1 are passed on; if this process dies the others die with it.
    """
    port = free_port()
    threads = max(1, cores() // processes)
    workers = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **place_of(rank, processes, port)}
        workers.append(_start([sys.executable, "-m", "dist_train", *arguments], environment))
    return _wait(workers, [f"rank {rank}" for rank in range(processes)])


def place_of(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that tell a process its place among those of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # All are here: nothing has to listen where other machines reach it.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def launch_mpi(arguments: Sequence[str], processes: int) -> int:
    """Run `dist-train ARGUMENTS` under mpiexec; returns its exit code. Raises UserError where there is none."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise UserError("no mpiexec on this machine; pip install 'dist-train[mpi]', load the site's MPI, or --nproc 1")
    command = [mpiexec, "-n", str(processes), sys.executable, "-m", "dist_train", *arguments]
    # A session of its own: a terminal's Ctrl-C would reach it twice, from there and from here.
    return _wait([_start(command, dict(os.environ), start_new_session=True)], ["mpiexec"])


def _start(command: list[str], environment: dict[str, str], **how: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, preexec_fn=die_with_parent, **how)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, however it dies: a killed launcher must not leave writers behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(workers: list[subprocess.Popen[bytes]], names: Sequence[str]) -> int:
    def forward(number: int, _frame: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    # What was ignored from the start, as SIGINT is of a shell's background jobs, the workers ignore as well.
    heard = [number for number in forwarded if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        with silence():
            while True:
                codes = [worker.poll() for worker in workers]
                failed = [code for code in codes if code]
                if failed or None not in codes:
                    break
                time.sleep(_POLL_SECONDS)
        for name, code in zip(names, codes, strict=True):
            if code and code < 0:
                print(f"{name} was ended by {signal.Signals(-code).name}; the others are stopped", file=sys.stderr)
        return _shell_code(failed[0]) if failed else 0
    finally:
        _stop(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    """Give the rest a moment to end by themselves (they may be printing the same error), then end them."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, min(2.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _shell_code(code: int) -> int:
    """A process ended by a signal has a negative code here, 128 + signal for a shell."""
    return 128 - code if code < 0 else code
