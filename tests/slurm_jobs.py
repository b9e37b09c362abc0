"""What tests of jobs share: a small training, slowed down without work, and what its folder tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TEMPLATES = Path(__file__).parents[1] / "slurm"
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")

# In front of dist-train, as a site's DIST_TRAIN_PYTHON: a step takes a while, so that a tiny run can be interrupted.
SLOW = """\
import os, sys, time
stage = sys.argv[3]  # -m dist_train STAGE
{patch}
if stage == "pretrain":
    from dist_train.train import loop
    step = loop.Training._optimizer_step
    def slow(*arguments):
        time.sleep({seconds})
        return step(*arguments)
    loop.Training._optimizer_step = slow
from dist_train.cli import main
sys.exit(main(sys.argv[3:]))
"""


def training(tiny, out, *more, steps):
    return [
        f"run.dir={out}",
        f"tokenizer={tiny.tokenizer}",
        *tiny.data("corpus"),
        "drafter.hidden_size=16",
        "drafter.layers=2",
        "drafter.heads=2",
        "drafter.mlp_size=32",
        "drafter.max_positions=256",
        f"train.steps={steps}",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.precision=fp32",
        "checkpoint.every=1000000",
        *more,
    ]


def site(folder, *lines, seconds=0.0, patch=""):
    """A site's env.sh whose Python executes `patch` before dist-train, and sleeps so many seconds at each step."""
    (folder / "slow.py").write_text(SLOW.format(patch=patch, seconds=seconds))
    python = folder / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {folder / "slow.py"} "$@"\n')
    python.chmod(0o755)
    (folder / "site.sh").write_text("\n".join([*lines, f"DIST_TRAIN_PYTHON={python}", ""]))
    return folder / "site.sh"


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_reached(run):
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def journal(folder, job):
    """The lines that the job's batch script left."""
    return [json.loads(line) for line in (folder / f"_slurm-{job}.jsonl").read_text().splitlines()]


def reasons(folder, job):
    """Why the job was started, each time."""
    return [line["because"] for line in journal(folder, job) if line["event"] == "start"]


def curve(run, tag="train/loss"):
    """The points of a run's curve as TensorBoard shows them: what a restart orphans (purge_step) is dropped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]
