"""What tests of training share: small runs, what they leave behind, and code that several ranks execute together."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from dist_train.runtime.launch import place_of
from dist_train.runtime.world import free_port

SHAPE = [
    "drafter.hidden_size=16",
    "drafter.layers=2",
    "drafter.heads=2",
    "drafter.mlp_size=32",
    "drafter.max_positions=256",
]
MIXED = "objective={ce: 0.3, tvdpp: 0.7}"


def arguments(tiny, out, *more, steps=6):
    return [
        f"run.dir={out}",
        f"tokenizer={tiny.tokenizer}",
        *SHAPE,
        f"train.steps={steps}",
        "train.global_batch=8",
        "train.micro_batch=2",
        "train.learning_rate=1e-2",
        "train.precision=fp32",
        "train.warmup_steps=2",
        *more,
    ]


def distillation(tiny, out, *more, **options):
    target = [f"target.path={tiny.target}", "target.precision=fp32", *tiny.data("chats", "corpus")]
    return ["distill", *arguments(tiny, out, *target, MIXED, *more, **options)]


def figures(run: Path) -> list[dict[str, float]]:
    """The lines of a run, every step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in figures(run)]


def weights(run: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    newest = (run / "checkpoints" / "latest").read_text().strip()
    files = sorted((run / "checkpoints" / newest / folder).glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


ENDED = """
import os as _os, sys as _sys
_sys.stdout.flush(), _sys.stderr.flush()
_os._exit(0)  # as the command line ends its ranks: PyTorch's threads may abort an interpreter that goes down
"""
# Imports are most of the time that a small run takes. Ranks are forked from a process that has made them, and has done
# nothing else: no tensor, no thread. Nothing here asks for a GPU; a process that did could not be forked any more.
# pytest is the main module of the tests, which each forked process looks at.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._inductor.compile_fx", "transformers.models.llama.modeling_llama", "pytest"])


def _rank(code: str, arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    """What `python -c code arguments` does, from within a forked process."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(code + ENDED, {"__name__": "__main__"})


def on_ranks(code: str, ranks: int, *arguments, timeout: float = 300, check: bool = True) -> list:
    """Execute Python code in `ranks` processes that know each other; what each returned, printed and complained."""
    port = free_port()
    words, processes, done = list(map(str, arguments)), [], []
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder, f"{rank}.{name}") for name in ("out", "err")] for rank in range(ranks)]
        for rank in range(ranks):
            environment = {**os.environ, **place_of(rank, ranks, port)}
            processes.append(FORKED.Process(target=_rank, args=(code, words, environment, outputs[rank])))
            processes[-1].start()
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        for returned, paths in zip(codes, outputs, strict=True):
            done.append(subprocess.CompletedProcess(words, returned, *(path.read_text() for path in paths)))
    assert None not in codes, f"not done after {timeout} s: {done}"
    if check:
        for one in done:
            assert one.returncode == 0, f"{one.stdout}\n{one.stderr}"
    return done


STAGE = """
import sys
from dist_train.train import loop, guard, lease
{patch}
from dist_train.cli import main
code = main(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
import os
os._exit(code)
"""


def patched(patch: str, ranks: int, *arguments, **options):
    """Two ranks of the command line with a piece of the program changed."""
    return on_ranks(STAGE.format(patch=patch), ranks, *arguments, **options)


def run_by(ranks: int, *words, expect: int = 0, **options) -> subprocess.CompletedProcess:
    """A command by so many ranks, as `--nproc` starts them, without the launching process; what the first one said."""
    done = patched("", ranks, *words, check=False, **options)
    assert {one.returncode for one in done} == {expect}, done
    return done[0]
