"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd from Debian's packages.

Everything is in a temporary folder and on private ports, and is ended by PID.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_train.runtime.world import free_port

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/sbin"

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
SchedulerParameters=batch_sched_delay=0,sched_interval=1
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=10 State=UP OverSubscribe=NO PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:2 State=UNKNOWN"
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; `environment` makes the commands talk to it."""

    root: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def run(self, *command: object, cwd: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of SLURM's, or any other, in the cluster's environment."""
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, cwd=cwd, timeout=300)
        assert done.returncode == expect, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, log: Path, timeout: float = 240) -> dict[str, str]:
        """Wait for the end of a job, hurried where it is requeued."""
        deadline = time.monotonic() + timeout
        pending_since = None
        while time.monotonic() < deadline:
            known = self.show(job)
            if known["JobState"] in FINISHED:
                return known
            pending_since = self._hurry(job, known, pending_since)
            time.sleep(0.3)
        said = log.read_text() if log.exists() else "no log"
        raise AssertionError(
            f"job {job} is still {known['JobState']} ({known.get('Reason')}) after {timeout} s\n{said}"
        )

    def submit(self, *words: object, cwd: Path) -> str:
        """Hand a script to sbatch; the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).stdout.strip()

    def until(self, what: str, true: Callable[[], object], log: Path, timeout: float = 180) -> None:
        """Wait for something, or fail with the job's log."""
        deadline = time.monotonic() + timeout
        while not true():
            said = log.read_text() if log.exists() else "no log"
            assert time.monotonic() < deadline, f"after {timeout} s not true: {what}\n{said}"
            time.sleep(0.2)

    def until_restarted(self, job: str, restarts: int, log: Path, *, hurried: bool = True) -> None:
        """Wait until a job runs for the `restarts`-th time after its first.

        Not `hurried` where SLURM found out by itself that a node was lost: for about a minute it goes on telling that
        node to end the job, and a start that the node has by then would be ended in the old one's place.
        """
        pending_since = None
        deadline = time.monotonic() + 240
        while (known := self.show(job))["JobState"] != "RUNNING" or int(known["Restarts"]) < restarts:
            assert time.monotonic() < deadline, f"{known['JobState']}\n{log.read_text()}"
            assert known["JobState"] not in FINISHED, f"{known['JobState']}\n{log.read_text()}"
            if hurried:
                pending_since = self._hurry(job, known, pending_since)
            time.sleep(0.3)

    def kill_node(self, name: str) -> None:
        """What a node that loses its power looks like: its daemon and all that runs on it are gone at once."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for pid in _processes_on(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        with (self.root / f"slurmd-{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["slurmd", "-D", "-N", name], env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def _hurry(self, job: str, known: dict[str, str], pending_since: float | None) -> float | None:
        """Let a requeued job start, for which SLURM would wait two minutes; since when it is pending.

        Not at once: a start within the second of the old one's end is taken for a part of that, and refused.
        """
        if known["JobState"] != "PENDING" or known["Restarts"] == "0":
            return None
        if pending_since is not None and time.monotonic() - pending_since > 2:
            command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(command, capture_output=True, env=self.environment, timeout=60)
        return pending_since or time.monotonic()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, or a skip that names what is missing."""
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in BINARIES if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs only as root")
    root = tmp_path_factory.mktemp("slurm")
    root.chmod(0o755)
    environment = {
        **os.environ,
        # The README's way: the virtual environment is active, so its python and mpi4py are found first.
        "PATH": f"{Path(sys.executable).parent}:{path}",
        "VIRTUAL_ENV": str(Path(sys.executable).parent.parent),
        "SLURM_CONF": str(root / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
        "USER": os.environ.get("USER", "root"),
    }
    cluster = Cluster(root, environment, {})
    try:
        _start_daemons(cluster)
        yield cluster
    finally:
        for daemon in reversed(cluster.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in cluster.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture
def login_node(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for `dist-train submit` in this process and in `tmp_path`: each start of Python is seconds."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return slurm


def _start_daemons(cluster: Cluster) -> None:
    root, environment = cluster.root, cluster.environment
    host = socket.gethostname().split(".")[0]
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o400)
    (root / "state").mkdir()
    nodes = [NODE.format(name=name, host=host, port=free_port(), cpus=os.cpu_count() or 1) for name in ("n1", "n2")]
    (root / "slurm.conf").write_text(
        CONFIGURATION.format(
            root=root, host=f"{host}(127.0.0.1)", user="root", controller_port=free_port(), nodes="\n".join(nodes)
        )
    )
    # Any file will do for a GPU that only SLURM believes in.
    (root / "gres.conf").write_text("".join(f"Name=gpu File={root}/gpu{number}\n" for number in (0, 1)))
    for number in (0, 1):
        (root / f"gpu{number}").touch()

    def start(*command: str) -> None:
        with (root / f"{command[0]}.out").open("ab") as out:
            daemon = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        cluster.daemons[command[0]] = daemon

    start(
        "munged",
        "--foreground",
        "--force",
        *(f"--{name}={root / file}" for name, file in MUNGE_FILES.items()),
    )
    _until("munged answers", lambda: (root / "munge.socket").exists(), root)
    start("slurmctld", "-D")
    for name in ("n1", "n2"):
        cluster.start_node(name)

    def idle() -> bool:
        command = ["sinfo", "-h", "-p", "all", "-o", "%T %D"]
        told = subprocess.run(command, capture_output=True, text=True, env=environment)
        return told.stdout.strip() == "idle 2"

    _until("both nodes are idle", idle, root)


def _processes_on(node: str) -> list[int]:
    """The tasks of a node, by a variable that SLURM gives to each, and the step daemons that they are children of."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
                parent = (folder / "status").read_text().split("PPid:")[1].split()[0]
                if (Path("/proc") / parent / "cmdline").read_bytes().startswith(b"slurmstepd:"):
                    found.add(int(parent))
    return sorted(found)


MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munged.seed",
}


def _until(what: str, true: object, root: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            said = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in root.glob("*.log"))
            raise AssertionError(f"after {seconds} s not true: {what}\n{said}")
        time.sleep(0.2)
