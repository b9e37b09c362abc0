"""What goes wrong while a run trains: one clear message, no lost data, and nothing that hangs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
from runs import STAGE, distillation, figures, losses, patched, run_by, weights

NOT_FINITE = """
import torch
inner = loop.Objective.loss
def loss(self, batch, hidden, count):
    function = inner(self, batch, hidden, count)
    def changed(states, head):
        value, statistics = function(states, head)
        value = value * {value} if training.step in {steps} and states.requires_grad else value
        return value, statistics
    return changed
loop.Objective.loss = loss
init = loop.Training.fit
def fit(self):
    global training
    training = self
    return init(self)
loop.Training.fit = fit
"""


@pytest.mark.parametrize(
    ("stage", "value"), [("zero0", "float('nan')"), ("zero2", "float('inf')"), ("zero3", "float('nan')")]
)
def test_steps_that_are_not_finite_are_left_out(tiny, tmp_path, stage, value):
    options = (f"train.deepspeed={stage}", "checkpoint.every=1", "checkpoint.keep=9")
    patched(NOT_FINITE.format(value=value, steps="(2, 4)"), 2, *distillation(tiny, tmp_path / "run", *options))
    lines = figures(tmp_path / "run")
    assert [line["train/skipped"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert all(line["train/loss"] == line["train/loss"] for line in (lines[0], lines[1], lines[3], lines[5]))
    latest = tmp_path / "run" / "checkpoints" / "latest"
    after = {}
    for step in range(1, 7):
        latest.write_text(f"step-{step:08d}\n")
        after[step] = weights(tmp_path / "run")
    for name in after[1]:
        assert after[3][name].equal(after[2][name]), name  # nothing moved
        assert after[5][name].equal(after[4][name]), name
    assert not after[4]["lm_head.weight"].equal(after[3]["lm_head.weight"])
    assert after[6]["lm_head.weight"].isfinite().all()


def test_too_many_of_them_end_the_run_with_the_samples(tiny, tmp_path):
    options = ("train.max_skipped=3", "checkpoint.every=2")
    done = patched(
        NOT_FINITE.format(value="float('nan')", steps="range(2, 99)"),
        2,
        *distillation(tiny, tmp_path / "run", *options, steps=40),
        check=False,
    )
    assert all(one.returncode == 2 for one in done), [one.stderr for one in done]
    assert (
        "step 5: the loss is nan, and 3 steps in a row were left out (samples 32 to 39 of the order)" in done[0].stderr
    )


HANG = """
import time
step = loop.Training._optimizer_step
def slow(self, batches, stop):
    if self.step == 3 and self.runtime.rank == 1:
        time.sleep(600)
    return step(self, batches, stop)
loop.Training._optimizer_step = slow
"""


def test_a_hung_collective_ends_with_every_stack(tiny, tmp_path):
    began = time.monotonic()
    command = distillation(tiny, tmp_path / "run", "run.hang_timeout=5", steps=10)
    done = patched(HANG, 2, *command, check=False, timeout=120)
    assert time.monotonic() - began < 100
    # The first that gives up breaks the other's collective.
    assert {one.returncode for one in done} == {75}
    hung = [rank for rank, one in enumerate(done) if f"rank {rank}: no step finished for 5 s" in one.stderr]
    assert hung
    for rank, one in enumerate(done):
        if rank in hung:
            assert "after step 3" in one.stderr
            assert ("slow" if rank else "all_reduce") in one.stderr  # where it stood
        else:
            assert f"rank {rank}: another rank is gone" in one.stderr


def test_a_rank_that_is_gone_is_told_by_the_others(tiny, tmp_path):
    """Without a launcher that would stop them."""
    patch = HANG.replace("time.sleep(600)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = patched(patch, 2, *distillation(tiny, tmp_path / "run", steps=10), check=False, timeout=120)
    assert done[0].returncode == 75  # the same command goes on
    assert "rank 0: another rank is gone" in done[0].stderr
    assert done[0].stderr.count("\n") == 1, done[0].stderr


def test_a_left_over_process_writes_nothing_more(tiny, tmp_path):
    """It wakes up after its successor has begun, as after a node that SLURM took for dead."""
    awake = tmp_path / "awake"
    patch = HANG.replace("self.runtime.rank == 1", "True").replace("import time", "import os, time")
    patch = patch.replace("self.step == 3", "self.step == 6")  # a checkpoint is there by then
    patch = patch.replace("time.sleep(600)", f"while not os.path.exists({str(awake)!r}): time.sleep(0.1)")
    command = distillation(tiny, tmp_path / "run", "checkpoint.every=2", steps=10)
    code = [sys.executable, "-c", STAGE.format(patch=patch), *command]
    left_over = subprocess.Popen(code, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():
        time.sleep(0.1)
        assert left_over.poll() is None
    run_by(1, *command)
    after = losses(tmp_path / "run")
    awake.touch()
    _, complaint = left_over.communicate(timeout=120)
    assert left_over.returncode == 2
    assert "this process ends without writing more" in complaint
    assert losses(tmp_path / "run") == after
    assert len(after) == 10


FULL_DISK = """
import errno
from dist_train.train import checkpoint
save = checkpoint.save_file
def full(tensors, path, **options):
    if "00000004" in str(path) and "optimizer-00002" in path.name:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    save(tensors, path, **options)
checkpoint.save_file = full
"""


def test_a_full_disk_leaves_the_checkpoints_before_whole(tiny, command, tmp_path):
    words = distillation(tiny, tmp_path / "run", "checkpoint.every=2", steps=8)
    done = patched(FULL_DISK, 2, *words, check=False)
    assert all(one.returncode == 2 for one in done), [one.stderr for one in done]
    assert "No space left on device" in done[0].stderr and "free space and start again" in done[0].stderr
    code, said, _ = command("checkpoint", "verify", tmp_path / "run")
    assert code == 0 and "step-00000002" in said
    assert "resuming at step 2" in run_by(2, *words).stdout
    run_by(2, *distillation(tiny, tmp_path / "whole", steps=8))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


CLOCK = """
import time
clock, step, back = time.time, loop.Training._optimizer_step, 0
time.time = lambda: clock() - back
def jumping(self, batches, stop):
    global back
    back = 86_400 * (self.step >= 10)
    return step(self, batches, stop)
loop.Training._optimizer_step = jumping
"""


def test_a_clock_that_jumps_back_a_day_changes_nothing(tiny, tmp_path):
    patched(CLOCK, 1, *distillation(tiny, tmp_path / "run", steps=30))
    lines = figures(tmp_path / "run")
    assert len(lines) == 30
    assert all(0 < line["perf/tokens_per_s"] < 1e7 for line in lines)


def test_what_changed_since_the_checkpoint_is_named(tiny, tmp_path):
    command = distillation(tiny, tmp_path / "run", "checkpoint.every=3", steps=6)
    run_by(1, *command)
    target = tmp_path / "target"
    shutil.copytree(tiny.target, target)
    config = target / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert "is not the one this run was begun with" in run_by(1, *command, f"target.path={target}", expect=2).stderr
    assert "training data" in run_by(1, *command, f"data.sources=[{{path: {tiny.chats}}}]", expect=2).stderr
    assert "drafter.*" in run_by(1, *command, "drafter.mlp_size=64", expect=2).stderr


def test_logs_of_every_rank_and_where_the_time_went(tiny, tmp_path):
    options = ("log.every=2", "log.profile=2")
    run_by(2, *distillation(tiny, tmp_path / "run", *options, steps=8))
    for rank in range(2):
        log = (tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text()
        assert f"process {os.getpid()}" not in log
        assert "begins at step 0 of 8" in log and "step 8: loss" in log
    assert list((tmp_path / "run" / "profile").glob("rank-00001*.json"))
    phases = ("data_wait", "target", "drafter", "communication", "optimizer")
    for line in figures(tmp_path / "run"):
        shares = [line[f"perf/{phase}"] for phase in phases]
        assert min(shares) >= 0 and sum(shares) <= 1.01
    assert sum(figures(tmp_path / "run")[-1][f"perf/{phase}"] for phase in phases) > 0.5
