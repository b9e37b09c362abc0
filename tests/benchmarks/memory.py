"""The memory that a training is told to need against the memory that it takes, in six configurations.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --drafter small --length 128 --target-layers 2 --target-width 128

Each is a run of four steps of `dist-train pretrain` with the drafter of 115M parameters, two of them beside a random
target. The estimate is the line that the run prints before it loads anything, the measured figure the peak of what
PyTorch has allocated on the GPU (max_memory_allocated), or of the process where there is none. The CUDA context and
what NCCL takes for itself are in neither. Prints a Markdown table, or with --json one object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from training_runs import DRAFTERS, VOCABS, ours_command, prepared, random_target, vocabulary

ALONE: dict[str, list[str]] = {
    "zero1, micro-batch 8": ["train.deepspeed=zero1", "train.micro_batch=8"],
    "zero3, micro-batch 8, everything compiled": [
        *("train.deepspeed=zero3", "train.micro_batch=8", "train.compile=true", "loss.compile=true"),
    ],
    "zero0, fp32, micro-batch 4": ["train.deepspeed=zero0", "train.micro_batch=4", "train.precision=fp32"],
    "zero1, checkpointing, micro-batch 16": ["train.gradient_checkpointing=true", "train.micro_batch=16"],
}
BESIDE_A_TARGET: dict[str, list[str]] = {
    "zero1, kld, micro-batch 4": ["train.micro_batch=4", "objective={kld: 1.0}"],
    "zero2, ce and tvdpp compiled, micro-batch 8": [
        *("train.deepspeed=zero2", "train.micro_batch=8", "loss.compile=true", "objective={ce: 0.1, tvdpp: 0.9}"),
    ],
}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """GiB estimated and measured of each configuration."""
    tokenizer, corpus = prepared(folder, 300_000)
    alone = vocabulary(folder, tokenizer, options)
    sizes = (options.target_layers, options.target_width, VOCABS[options.drafter])
    target = random_target(folder / "target", tokenizer, *sizes)
    cases = {name: [*alone, *more] for name, more in ALONE.items()}
    cases |= {name: [f"target.path={target}", *more] for name, more in BESIDE_A_TARGET.items()}
    found = {}
    for number, (name, more) in enumerate(cases.items()):
        run = folder / str(number)
        command = ours_command(run, tokenizer, corpus, options, "train.global_batch=16", *more)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        told = re.search(r"about ([0-9.]+) GiB a rank.*the process itself ([0-9.]+)", done.stdout)
        assert told is not None, done.stdout
        tensors = float(told[1]) - (float(told[2]) if torch.cuda.is_available() else 0)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = (tensors, max(line["perf/memory_gib"] for line in lines))
    return found


def main() -> None:
    """Reads the sizes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", choices=DRAFTERS, default="115m")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--target-layers", type=int, default=22)
    parser.add_argument("--target-width", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    fixed = {"steps": 4, "batch": 8, "ranks": 1, "stage": "zero1", "compile": False}
    fixed["dtype"] = "bf16" if torch.cuda.is_available() else "fp32"
    vars(options).update(fixed)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{options.drafter} drafter, {options.length} tokens a sequence, {fixed['dtype']} where nothing else is said\n"
    )
    print("| configuration | estimated GiB | measured GiB | estimated over measured |\n|--|--|--|--|")
    for name, (estimated, measured) in found.items():
        print(f"| {name} | {estimated:.2f} | {measured:.2f} | {estimated / measured:.2f} |")


if __name__ == "__main__":
    main()
