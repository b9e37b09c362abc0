"""Commands of dist-train in forked processes: imports are made once, and each is held to bounds of time and memory.

The process that forks has made its imports and nothing else: it is forked itself from that of `runs.FORKED`.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
import resource
import select
import signal
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from runs import FORKED

SECONDS = 20.0
MEMORY = 2 << 30  # bytes beside what the imports take
_IMPORTS = (
    "dist_train.cli",
    "dist_train.prepare.stage",
    "dist_train.train.stage",
    "dist_train.generate.stage",
    "dist_train.evaluate.stage",
    "dist_train.evaluate.compare",
    "dist_train.export.stage",
    "dist_train.plan",
    "dist_train.slurm.status",
    "dist_train.slurm.pipeline",
    "dist_train.tokenizer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
# Nothing is asked of a hub, and no SLURM that this machine has is asked.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}


class Ended(NamedTuple):
    """How a command ended: `code` is None where it was killed because its time was over, negative for a signal."""

    code: int | None
    said: str
    complaint: str


class Sandbox:
    """`sandbox("prepare", "out=x")` runs one command; use as a context manager."""

    def __enter__(self) -> Sandbox:
        self._connection, other = FORKED.Pipe()
        self._process = FORKED.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def __call__(self, *words: object, seconds: float = SECONDS) -> Ended:
        """Run it in an empty folder of its own."""
        self._connection.send(([str(word) for word in words], seconds))
        return Ended(*self._connection.recv())


def _serve(connection: Connection) -> None:
    os.environ.update(_ENVIRONMENT)
    for name in _IMPORTS:
        importlib.import_module(name)
    while True:
        try:
            words, seconds = connection.recv()
        except EOFError:
            return
        connection.send(_run(words, seconds))


def _run(words: list[str], seconds: float) -> tuple[int | None, str, str]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        child = os.fork()
        if not child:
            _be(words, seconds, Path(folder), outputs)
        watched = os.pidfd_open(child)
        in_time = select.select([watched], [], [], seconds)[0]
        os.close(watched)
        if not in_time:
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said, complaint = (path.read_text(errors="replace") for path in outputs)
    return code if in_time else None, said, complaint


def _be(words: list[str], seconds: float, folder: Path, outputs: list[Path]) -> None:
    """The forked process: never returns."""
    code = 1
    try:
        os.setsid()
        for descriptor, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = _data() + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(sys.stderr)
        faulthandler.dump_traceback_later(0.95 * seconds, file=sys.stderr)
        scratch = folder / "scratch"
        scratch.mkdir()
        os.chdir(scratch)
        from dist_train.cli import main

        code = main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _data() -> int:
    """Bytes of this process that count as data."""
    found = re.search(r"^VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10
