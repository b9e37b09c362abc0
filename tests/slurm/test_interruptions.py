"""Jobs that are ended before they are done: by SLURM's notice, its time limit, another job, a node; on two nodes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from runs import weights
from slurm_jobs import TEMPLATES, TWO_NODES, curve, journal, reasons, site, step_reached, steps_of, training

STEPS = 120


@pytest.fixture(scope="module")
def undisturbed(tiny, cli, tmp_path_factory):
    """The same run without SLURM and without a break."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    cli("pretrain", *training(tiny, run, steps=STEPS), "--nproc", 2)
    return run


def equals(run, plain):
    """The same weights, and one curve: every step once in what TensorBoard shows, with the value of its figure."""
    expected = weights(plain)
    found = weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = list(range(1, len(steps_of(plain)) + 1))
    assert steps_of(run) == steps
    points = curve(run)
    assert [step for step, _ in points] == steps
    assert points == curve(plain)


def submitted(slurm, tiny, tmp_path, *options, seconds, steps=STEPS, more=()):
    env = f"DIST_TRAIN_ENV={site(tmp_path, *more, seconds=seconds)}"
    words = (TEMPLATES / "pretrain.sbatch", *training(tiny, tmp_path / "run", steps=steps))
    job = slurm.submit(f"--export=ALL,{env}", *TWO_NODES, *options, *words, cwd=tmp_path)
    return job, tmp_path / f"pretrain-{job}.log", tmp_path / "run"


def reaches_more_steps(slurm, log, run, more=5):
    """Wait until the start that runs is further than those before it were."""
    reached = step_reached(run)
    slurm.until("steps of this start", lambda: step_reached(run) >= reached + more, log)


def test_the_time_limit_is_survived(slurm, tiny, tmp_path, request):
    """SLURM's own limit of a minute, and its notice before: 20 seconds, and up to 30 more, for it looks that often."""
    options = ("--time=1", "--signal=B:USR1@20")
    slow = "0.45 if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' else 0"  # the first start meets the limit
    job, log, run = submitted(slurm, tiny, tmp_path, *options, seconds=slow, more=["export DIST_TRAIN_NOTICE=20"])
    undisturbed = request.getfixturevalue("undisturbed")  # made while the notice is waited for
    known = slurm.wait(job, log)
    said = log.read_text()
    assert known["JobState"] == "COMPLETED" and int(known["Restarts"]) >= 1, said
    assert "notice received (time limit)" in said
    assert set(reasons(run, job)) == {"submitted", "time limit"}
    assert "DUE TO TIME LIMIT" not in said
    equals(run, undisturbed)


def test_a_signal_a_lost_node_and_preemption_are_told_apart_and_survived(slurm, tiny, tmp_path, undisturbed):
    slow = "0.15 if os.environ.get('SLURM_RESTART_COUNT', '0') < '3' else 0"  # the fourth start is not disturbed
    job, log, run = submitted(slurm, tiny, tmp_path, "--exclusive", seconds=slow)
    reaches_more_steps(slurm, log, run)
    slurm.run("scancel", "--batch", "--signal=USR1", job)

    slurm.until_restarted(job, 1, log)
    reaches_more_steps(slurm, log, run)
    slurm.kill_node("n2")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.start_node("n2")
    slurm.until_restarted(job, 2, log)

    reaches_more_steps(slurm, log, run)
    urgent = slurm.submit("--partition=urgent", "--exclusive", "--nodes=2", "--wrap=sleep 1", cwd=tmp_path)
    slurm.until_restarted(job, 3, log)
    known = slurm.wait(job, log)
    assert known["JobState"] == "COMPLETED", log.read_text()
    assert slurm.show(urgent)["JobState"] == "COMPLETED"
    assert reasons(run, job) == ["submitted", "signal", "node failure", "preemption"], log.read_text()
    equals(run, undisturbed)
    told = slurm.run(sys.executable, "-m", "dist_train", "status", run).stdout
    assert f"step {STEPS:,} of {STEPS:,} (100%)" in told and "3 requeues" in told and "finished" in told
    assert "preemption" in told and "COMPLETED" in told


def test_starts_that_lead_nowhere_are_bounded(slurm, tiny, tmp_path):
    """A crash at the start, each time: not a fault that a stage tells, so it is tried again, but not for ever."""
    crash = "os.kill(os.getpid(), 9) if stage == 'pretrain' else None"
    env = f"DIST_TRAIN_ENV={site(tmp_path, 'export DIST_TRAIN_MAX_FRUITLESS=2', patch=crash)}"
    words = (TEMPLATES / "pretrain.sbatch", *training(tiny, tmp_path / "run", steps=3))
    job = slurm.submit(f"--export=ALL,{env}", *TWO_NODES, *words, cwd=tmp_path)
    log = tmp_path / f"pretrain-{job}.log"
    known = slurm.wait(job, log)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "1"), log.read_text()
    assert "given up: 2 starts without progress" in log.read_text()
    assert [line.get("reason") for line in journal(tmp_path / "run", job) if line["event"] == "end"] == ["crash"] * 2


def test_a_cancelled_job_stays_cancelled(slurm, tiny, tmp_path):
    job, log, run = submitted(slurm, tiny, tmp_path, seconds=0.2, steps=10_000)
    slurm.until("a step", lambda: step_reached(run) >= 1, log)
    slurm.run("scancel", job)
    assert slurm.wait(job, log)["JobState"] == "CANCELLED"
    slurm.until("the batch script's last word", lambda: "(cancelled)" in log.read_text(), log, timeout=60)
    assert slurm.show(job)["Restarts"] == "0"


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_five_interruptions_and_a_lost_node_change_nothing(slurm, tiny, cli, tmp_path):
    """Three notices by signal, two time limits or more, and a node whose loss SLURM finds out by itself."""
    steps = 600
    cli("pretrain", *training(tiny, tmp_path / "plain", steps=steps), "--nproc", 2)
    job, log, run = submitted(
        slurm, tiny, tmp_path, "--time=1", "--signal=B:USR1@10", seconds=0.25, steps=steps,
        more=["export DIST_TRAIN_NOTICE=10"],
    )  # fmt: skip
    for restarts in (1, 2):  # time limits
        slurm.until_restarted(job, restarts, log)
    reaches_more_steps(slurm, log, run)
    slurm.kill_node("n2")
    slurm.until("n2 is down", lambda: "State=DOWN" in slurm.run("scontrol", "show", "node", "n2").stdout, log)
    slurm.start_node("n2")
    slurm.until_restarted(job, 3, log, hurried=False)
    for restarts in (4, 5, 6):
        reaches_more_steps(slurm, log, run)
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm.environment, check=False)
        slurm.until_restarted(job, restarts, log)
    known = slurm.wait(job, log, timeout=900)
    found = reasons(run, job)
    print(*found, log.read_text(), sep="\n")
    assert known["JobState"] == "COMPLETED", log.read_text()
    assert int(known["Restarts"]) >= 6
    # The ranks may find out before SLURM does, and to the script that is a crash.
    assert found.count("node failure") + found.count("crash") == 1, found
    assert found.count("time limit") + found.count("signal") >= 5, found
    equals(run, tmp_path / "plain")
