"""What benchmarks of training share: a corpus, random targets, and `dist-train pretrain` of their sizes."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

DRAFTERS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "layers": 4, "heads": 8, "mlp_size": 1408, "max_positions": 2048},
    "115m": {},  # dist-train's own
}
VOCABS = {"small": 8000, "115m": 32_000}


def prepared(folder: Path, tokens: int = 2_000_000) -> tuple[Path, Path]:
    """A tokenizer and a corpus of random words."""
    from dist_train.cli import main
    from dist_train.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(tokens // 600)]
    train_tokenizer(texts[:2000], folder / "tokenizer", VOCABS["small"])
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / "corpus"
    with redirect_stdout(sys.stderr):  # what is printed is a table
        main(["prepare", f"inputs={folder / 'text.jsonl'}", f"tokenizer={folder / 'tokenizer'}", f"out={out}"])
    return folder / "tokenizer", out


def random_target(folder: Path, tokenizer: Path, layers: int, width: int, vocab_size: int) -> Path:
    """A Llama of random weights; its vocabulary may be larger than the tokenizer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_train.tokenizer import load_tokenizer

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 11 * width // 4}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": width // (128 if width >= 2048 else 64)}
    on_gpu = torch.cuda.is_available()  # where billions of weights are drawn in a second
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    if on_gpu:
        torch.cuda.empty_cache()  # for the processes that come
    load_tokenizer(tokenizer).save(folder)
    return folder


def vocabulary(folder: Path, tokenizer: Path, options: argparse.Namespace) -> list[str]:
    """What gives a drafter its vocabulary: nothing where it is the tokenizer's, else a target that is not loaded."""
    if options.drafter == "small":
        return []
    path = folder / "vocabulary"
    if not path.exists():
        random_target(path, tokenizer, 1, 64, VOCABS[options.drafter])
    return [f"target.path={path}"]


def seconds_a_step(run: Path, first: int) -> float:
    """The median over the steps after the first ones, of the run's own lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines]
    return statistics.median(np.diff(times)[first:])


def start(command: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """`command` in so many processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    return processes


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for them; ends with the complaint of one that failed."""
    for process in processes:
        _, complaint = process.communicate()
        if process.returncode:
            raise SystemExit(complaint.decode()[-2000:])


def ours_command(run: Path, tokenizer: Path, corpus: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """`dist-train pretrain` of this benchmark's size, into the folder `run`."""
    words = [
        f"run.dir={run}",
        f"tokenizer={tokenizer}",
        f"data.sources=[{{path: {corpus}}}]",
        f"data.sequence_length={options.length}",
        *(f"drafter.{name}={value}" for name, value in DRAFTERS[options.drafter].items()),
        f"train.steps={options.steps}",
        f"train.global_batch={options.batch * options.ranks}",
        f"train.micro_batch={options.batch}",
        f"train.precision={options.dtype}",
        f"train.deepspeed={options.stage}",
        f"train.compile={str(options.compile).lower()}",
        "checkpoint.every=1000000",
        *more,
    ]
    return [sys.executable, "-m", "dist_train", "pretrain", *words]


def ours(folder: Path, tokenizer: Path, corpus: Path, options: argparse.Namespace, *more: str) -> tuple[float, Path]:
    """Seconds a step of `dist-train pretrain`, and its run folder."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    finish(start(ours_command(run, tokenizer, corpus, options, *more), options.ranks))
    return seconds_a_step(run, 2), run
