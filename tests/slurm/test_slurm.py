"""The batch scripts, submitted to a real SLURM of two nodes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import weights

TEMPLATES = Path(__file__).parents[2] / "slurm"
STAGES = ("prepare", "pretrain", "generate", "distill", "evaluate")
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")


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


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_template_is_shell_that_sbatch_accepts(slurm, stage, tmp_path):
    """The site's defaults: eight GPUs a node, which this cluster does not have and says so."""
    slurm.run("bash", "-n", TEMPLATES / f"{stage}.sbatch")
    slurm.run("sbatch", "--test-only", *TWO_NODES, TEMPLATES / f"{stage}.sbatch", "x.yaml", cwd=tmp_path)


def test_prepare_by_mpi_on_two_nodes_gives_the_bytes_of_one_process(slurm, tiny, cli, tmp_path):
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", "shard_bytes=4096"]
    cli("prepare", *keys, f"out={tmp_path / 'one'}")
    script = TEMPLATES / "prepare.sbatch"
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = slurm.run(
        "sbatch", "--parsable", *options, script, *keys, f"out={tmp_path / 'two'}", cwd=tmp_path
    ).stdout.strip()
    log = tmp_path / f"prepare-{job}.log"
    assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
    assert "2 ranks" in log.read_text()
    for one in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / one.name).read_bytes() == one.read_bytes(), one.name


def test_srun_without_its_mpi_is_an_error_that_names_the_mend(slurm, tiny, tmp_path):
    """N tasks that each believe to be alone would write the same shards N times."""
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "dist_train", "prepare", *keys]
    told = slurm.run("srun", "--nodes=2", "--ntasks=2", "--mpi=none", *command, cwd=tmp_path, expect=2)
    assert told.stderr.count("srun --mpi=") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_noticed_and_requeued_equals_an_undisturbed_one(slurm, tiny, cli, tmp_path):
    """SLURM's notice before the time limit: saved, requeued, resumed, on two nodes."""
    cli("pretrain", *training(tiny, tmp_path / "plain", steps=600), "--nproc", 2)
    script = TEMPLATES / "pretrain.sbatch"
    job = slurm.run(
        "sbatch", "--parsable", *TWO_NODES, script, *training(tiny, tmp_path / "run", steps=600), cwd=tmp_path
    ).stdout.strip()
    log = tmp_path / f"pretrain-{job}.log"
    metrics = tmp_path / "run" / "metrics.jsonl"
    for after in (50, 200):
        _until_step(slurm, job, metrics, after, log)
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        _until_requeued(slurm, job, log)
    known = slurm.wait(job, log)
    said = log.read_text()
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "2"), said
    assert said.count("resuming at step") == 2
    assert steps_of(tmp_path / "run") == list(range(1, 601))
    plain, run = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert all(torch.equal(plain[name], run[name]) for name in plain)


def test_a_failing_stage_ends_its_job_and_the_chain(slurm, tiny, tmp_path):
    """A fault is not requeued, and what waits for the job is cancelled."""
    keys = training(tiny, tmp_path / "run", "train.learning_rate=1e30", steps=50)
    first = slurm.run(
        "sbatch", "--parsable", *TWO_NODES, TEMPLATES / "pretrain.sbatch", *keys, cwd=tmp_path
    ).stdout.strip()
    second = slurm.run(
        "sbatch",
        "--parsable",
        f"--dependency=afterok:{first}",
        *TWO_NODES,
        TEMPLATES / "pretrain.sbatch",
        *keys,
        cwd=tmp_path,
    ).stdout.strip()
    log = tmp_path / f"pretrain-{first}.log"
    known = slurm.wait(first, log)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert "lower train.learning_rate" in log.read_text()
    assert slurm.wait(second, log)["JobState"] == "CANCELLED"


def test_submit_checks_and_submits_with_a_site_env(slurm, tiny, tmp_path):
    """The rest of the stages, through `dist-train submit`."""
    site = tmp_path / "site.sh"
    site.write_text("echo the site has spoken\n")
    submit = [sys.executable, "-m", "dist_train", "submit"]
    place = ["--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 1, "--env", site]
    lines = tmp_path / "seeds.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(8)))
    target = [f"target.path={tiny.target}", "target.precision=fp32"]
    generate = [*target, f"seeds.inputs={lines}", f"out={tmp_path / 'answers'}", "max_new_tokens=8", "batch_size=4"]
    evaluate = [
        *target,
        f"drafters={{base: {tiny.drafter}}}",
        f"tasks=[{{name: words, inputs: {lines}}}]",
        f"out={tmp_path / 'results'}",
        "max_new_tokens=8",
        "token_rate.prompts=0",
    ]
    distill = training(tiny, tmp_path / "run", *target, steps=3)
    jobs = {}
    for stage, keys in (("generate", generate), ("distill", distill), ("evaluate", evaluate)):
        told = slurm.run(*submit, stage, *keys, *place, cwd=tmp_path).stdout
        jobs[stage] = told.split("as job ")[1].split(";")[0]
    for stage, job in jobs.items():
        log = tmp_path / f"{stage}-{job}.log"
        assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
        assert "the site has spoken" in log.read_text()
    assert list((tmp_path / "answers").glob("unit-*.parquet"))
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert (tmp_path / "results" / "results.md").exists()


def test_submit_refuses_before_slurm_is_asked(slurm, tiny, tmp_path):
    submit = [sys.executable, "-m", "dist_train", "submit", "pretrain"]
    keys = training(tiny, tmp_path / "run", steps=3)
    told = slurm.run(*submit, *keys, "data.sources.0.path=nowhere", cwd=tmp_path, expect=2)
    assert "nowhere" in told.stderr and "Traceback" not in told.stderr
    told = slurm.run(*submit, *keys, "--env", "nowhere.sh", cwd=tmp_path, expect=2)
    assert "nowhere.sh: no such file" in told.stderr
    told = slurm.run(*submit, *keys, "--partition", "moon", cwd=tmp_path, expect=2)
    assert "sbatch refused: " in told.stderr and "partition" in told.stderr


def test_dry_run_prints_the_script_and_submits_nothing(slurm, tiny, cli, tmp_path):
    before = slurm.run("squeue", "-h", "-a").stdout
    keys = training(tiny, tmp_path / "run", steps=3)
    told = cli("submit", "pretrain", *keys, "--nodes", 4, "--gpus-per-node", 8, "--dry-run").stdout
    assert "--nodes=4 --gpus-per-node=8 --ntasks-per-node=8" in told
    assert (TEMPLATES / "pretrain.sbatch").read_text() in told
    assert slurm.run("squeue", "-h", "-a").stdout == before


def _until_step(slurm, job, metrics, step, log):
    deadline = time.monotonic() + 180
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else slurm.show(job)
        time.sleep(0.05)


def _until_requeued(slurm, job, log):
    restarts = int(slurm.show(job)["Restarts"])
    deadline = time.monotonic() + 120
    pending_since = None
    while (known := slurm.show(job))["JobState"] != "RUNNING" or int(known["Restarts"]) == restarts:
        assert time.monotonic() < deadline, f"{known['JobState']}\n{log.read_text()}"
        if known["JobState"] == "PENDING":
            pending_since = pending_since or time.monotonic()
            # SLURM waits for minutes before it starts a requeued job, and takes a start within the second of the old
            # one's end for a part of that.
            if time.monotonic() - pending_since > 3:
                slurm.hurry(job)
        time.sleep(0.3)
