"""Journals, figures and configurations with a few bytes changed: one line and exit code 2, or what is left of them."""

from __future__ import annotations

import json
import random

import pytest

from dist_train.slurm import journal

PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\n",
    b"\0",
    b"\xff",
    b"NaN",
    b"1e999",
    b"null",
    b"-",
    b"&a ",
    b"*a",
]
CONFIG = b"train: {steps: 9, global_batch: 4}\nrun: {dir: x}\ntarget: {path: y}\nobjective: {kld: 1.0}\n"


def mutated(data, drawn):
    """Pieces cut out, put in, doubled."""
    data = bytearray(data)
    for _ in range(drawn.randrange(1, 5)):
        at = drawn.randrange(len(data) + 1)
        end = min(len(data), at + drawn.randrange(1, 20))
        data[at:end] = drawn.choice([b"", drawn.choice(PIECES), bytes(data[at:end]) * 2, drawn.choice(PIECES) * 3000])
    return bytes(data)


def folder_of_a_run(folder):
    """Its files, as the stages and the batch script leave them."""
    job = journal.Job("12", 1, "n[1-2]")
    now = journal.Standing(3, 9, "step", False)
    journal.note(folder, "12", "submitted", stage="distill", after={"11": str(folder)})
    journal.begin(folder, "distill", job, now)
    journal.end(folder, "distill", job, now, 2, "", None)
    lines = [{"step": step, "time": 1.0 + step, "train/loss": 2.5, "progress/tokens": 64 * step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_bytes(CONFIG)
    return {path: path.read_bytes() for path in folder.iterdir()}


def status_of_mutated(command, folder, rounds, seed):
    drawn, whole = random.Random(seed), folder_of_a_run(folder)
    for number in range(rounds):
        for path, data in whole.items():
            path.write_bytes(mutated(data, drawn) if drawn.random() < 0.5 else data)
        code, shown, told = command("status", folder)
        where = f"seed {seed}, round {number}"
        assert code in (0, 2) and told.count("\n") == (1 if code else 0), (where, told)
        assert shown if code == 0 else told.startswith("dist-train status: "), where
        code, _, told = command("distill", folder / "config.yaml", "--dry-run")
        assert code == 2 and told.count("\n") == 1, (where, told)


def test_status_of_mutated_files(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    status_of_mutated(command, tmp_path, 60, seed=1)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(10))
def test_a_campaign_of_mutated_files(command, tmp_path, monkeypatch, seed):
    monkeypatch.setenv("PATH", "/nowhere")
    status_of_mutated(command, tmp_path, 200, seed=100 + seed)
