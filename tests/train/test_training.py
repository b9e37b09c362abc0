"""Training, with real processes: against a plain PyTorch loop, another world size, and an uninterrupted run."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import arguments, distillation, losses, run_by, weights


@pytest.fixture(scope="module")
def reference(tiny, cli, tmp_path_factory):
    """An undisturbed distillation by two ranks, with a checkpoint half-way."""
    out = tmp_path_factory.mktemp("reference") / "run"
    cli(*distillation(tiny, out, "checkpoint.every=3"), "--nproc", 2)
    return out


def test_a_run_is_a_plain_pytorch_loop(tiny, cli, tmp_path):
    """Cross-entropy, AdamW with two groups, clipping, warm-up and cosine, written out with torch alone."""
    cli("pretrain", *arguments(tiny, tmp_path / "run", *tiny.data("corpus"), "train.gradient_clip=0.5"))

    from dist_train.config import DrafterSection
    from dist_train.models.drafter import drafter_config, new_drafter

    section = DrafterSection(hidden_size=16, layers=2, heads=2, mlp_size=32, max_positions=256)
    model = new_drafter(drafter_config(section, tiny.vocab_size, 1, 2), seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    tokens = np.fromfile(tiny.corpus / "shard-00000.tokens", dtype="<u2").astype(np.int64)
    count = (len(tokens) - 1) // 32

    from data_shards import GlobalOrder

    expected = []
    for step in range(6):
        rate = 1e-2 * (step + 1) / 2 if step < 2 else 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = GlobalOrder(count, 0 * 1_000_003 + 1)[np.arange(step * 8, step * 8 + 8)]
        rows = torch.tensor(np.stack([tokens[i * 32 : i * 32 + 33] for i in picked]))
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.allclose(weight, model.state_dict()[name], atol=2e-5), name


@pytest.mark.parametrize("normalize", ["position", "batch"])
def test_one_rank_and_two_ranks_take_the_same_steps(tiny, tmp_path, normalize):
    runs = []
    for ranks, micro_batch in ((1, 4), (2, 2)):
        runs.append(tmp_path / str(ranks))
        options = (f"loss.tvdpp_normalize={normalize}", f"train.micro_batch={micro_batch}")
        run_by(ranks, *distillation(tiny, runs[-1], *options))
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for name, weight in weights(runs[0]).items():
        assert torch.allclose(weight, weights(runs[1])[name], atol=1e-4), name


SHARDINGS = ["train.deepspeed=zero0", "train.deepspeed=zero2", "train.deepspeed=zero3", "target.sharding=zero3"]


@pytest.mark.parametrize("option", SHARDINGS)
def test_every_sharding_gives_the_same_losses(tiny, tmp_path, reference, option):
    run_by(2, *distillation(tiny, tmp_path / "run", option))
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-5)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.allclose(weight, weights(reference)[name], atol=1e-4), name


def test_a_compiled_loss_gives_the_same_losses(tiny, command, tmp_path, reference):
    """By each of two ranks, compiled in the first step; the run's first line says so."""
    code, told, _ = command(*distillation(tiny, tmp_path / "run", "loss.compile=true"), "--nproc", 2)
    assert code == 0
    assert "loss compiled" in told
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-5)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.allclose(weight, weights(reference)[name], atol=1e-4), name


@pytest.fixture(scope="module")
def beside_a_whole_target(tiny, tmp_path_factory):
    """Twenty losses of pretraining with the target in the loop, whole on each of two ranks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_by(2, *online(tiny, out, "target.sharding=replicate"))
    return losses(out)


def online(tiny, out, *more):
    target = [f"target.path={tiny.target}", "target.precision=fp32", *tiny.data("corpus"), "train.deepspeed=zero2"]
    return ["pretrain", *arguments(tiny, out, *target, "objective={ce: 0.5, kld: 0.5}", *more, steps=20)]


@pytest.mark.parametrize(("sharding", "ranks"), [("zero3", 2), ("zero3", 4), ("tp", 2), ("tp", 4)])
def test_a_sharded_target_in_the_loop_gives_the_same_losses(tiny, tmp_path, beside_a_whole_target, sharding, ranks):
    run_by(ranks, *online(tiny, tmp_path / "run", f"target.sharding={sharding}"))
    assert losses(tmp_path / "run") == pytest.approx(beside_a_whole_target, rel=1e-5)


def half_way(reference: Path, out: Path) -> None:
    """The reference as a kill after its first checkpoint would have left it."""
    shutil.copytree(reference, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "checkpoints" / "latest").write_text("step-00000003\n")


def test_resuming_is_as_if_nothing_had_happened(tiny, cli, tmp_path, reference):
    half_way(reference, tmp_path / "run")
    done = cli(*distillation(tiny, tmp_path / "run", "checkpoint.every=3"), "--nproc", 2, "--resume")
    assert "resuming at step 3" in done.stdout
    assert losses(tmp_path / "run") == losses(reference)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(weight, weights(reference)[name]), name


def test_a_torn_newest_checkpoint_is_passed_over_loudly(tiny, command, tmp_path, reference):
    shutil.copytree(reference, tmp_path / "run")
    torn = next((tmp_path / "run" / "checkpoints" / "step-00000006").glob("optimizer-*"))
    torn.write_bytes(torn.read_bytes()[:-100])
    code, listed, _ = command("checkpoint", "verify", tmp_path / "run")
    assert code == 1 and torn.name in listed
    done = run_by(2, *distillation(tiny, tmp_path / "run", "checkpoint.every=3"))
    assert torn.name in done.stderr
    assert "going back to the one before" in done.stderr
    assert losses(tmp_path / "run") == losses(reference)


def test_sigterm_saves_at_a_step_boundary_and_the_same_command_goes_on(tiny, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_by(2, *distillation(tiny, whole, steps=40))
    command = [sys.executable, "-m", "dist_train", *distillation(tiny, stopped, steps=40), "--nproc", "2"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (stopped / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert running.poll() is None
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "stopped on request" in output
    assert len(losses(stopped)) < 40
    run_by(2, *distillation(tiny, stopped, steps=40))
    assert losses(stopped) == losses(whole)


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, kills=2)


@pytest.mark.campaign
def test_a_drafter_of_one_pass_is_killed_at_random_moments(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, "drafter.parallel={tokens: 3, keep: 0.8}", kills=2)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_thirty_kills(tiny, tmp_path):
    kill_and_resume(tiny, tmp_path, kills=30)


def kill_and_resume(tiny, tmp_path, *kind, kills):
    """SIGKILL to the launcher alone: its ranks die with it; the same command resumes."""
    import random

    drawn = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"steps": 30 * kills}
    run_by(2, *distillation(tiny, whole, *kind, "checkpoint.every=5", **options), timeout=900)
    again = distillation(tiny, killed, *kind, "checkpoint.every=5", **options)
    command = [sys.executable, "-m", "dist_train", *again]
    for _ in range(kills):
        running = subprocess.Popen([*command, "--nproc", "2"], stdout=subprocess.PIPE, text=True)
        for line in running.stdout:  # its first line comes when training begins
            if "drafter of" in line:
                break
        time.sleep(drawn.random() * 1.5)
        running.kill()
        running.wait()
    run_by(2, *again, timeout=900)
    assert losses(killed) == losses(whole)
    for name, weight in weights(killed).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_dead_rank_ends_the_others(tiny, tmp_path):
    command = [sys.executable, "-m", "dist_train", *distillation(tiny, tmp_path / "run", steps=100_000), "--nproc", "2"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert running.poll() is None
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, complaint = running.communicate(timeout=60)
    assert running.returncode not in (0, None)
    assert "rank 1 was ended by SIGKILL" in complaint
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# -- bad input --------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_before_anything_starts(tiny, refused, tmp_path):
    good = distillation(tiny, tmp_path / "run")
    cases = [
        ([*good, "train.leraning_rate=1"], "unknown key train.leraning_rate; did you mean train.learning_rate?"),
        ([*good, "objective={tvdp: 1}"], "no loss 'tvdp'; did you mean tvd"),
        ([*good, "data.sources=[{path: /nowhere}]"], "/nowhere: no prepared corpus here"),
        ([*good, "target.path=/nowhere"], "/nowhere: no target model"),
        ([*good, "tokenizer=/nowhere"], "/nowhere: no such tokenizer file or folder"),
        (["pretrain", *good[1:], "target=null"], "compares with a target; set target.path"),
        (["distill", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        ([*good, "data.sequence_length=64"], "packed for sequences of 32, not 64"),
        ([*good, "train.global_batch=7"], "train.global_batch 7 is not a multiple"),
        ([*good, "train.deepspeed=zero9"], "no zero9.json in ds_configs; there are zero0"),
        ([*good, "--resume"], "nothing to resume"),
    ]
    for command, message in cases:
        assert message in refused(*command)


def test_divergence_is_one_line_and_exit_code_2(tiny, tmp_path):
    options = ("train.learning_rate=1e30", "train.max_skipped=3")
    done = run_by(1, *distillation(tiny, tmp_path / "run", *options), expect=2)
    assert "lower train.learning_rate" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_drafter_of_another_vocabulary_is_refused(tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, **shape)).save_pretrained(tmp_path / "other")
    done = run_by(1, *distillation(tiny, tmp_path / "run", f"drafter.init_from={tmp_path / 'other'}"), expect=2)
    assert "a vocabulary of 384, not the 320 of this run" in done.stderr


def test_warm_start_begins_from_the_weights_of_another_run(tiny, tmp_path, reference):
    options = (f"drafter.init_from={reference}", "train.learning_rate=1e-12")
    run_by(1, *distillation(tiny, tmp_path / "run", *options, steps=1))
    for name, weight in weights(tmp_path / "run").items():
        assert torch.allclose(weight, weights(reference)[name], atol=1e-6), name


def test_tensorboard_has_every_step_once(reference):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/acceptance", "train/lr", "perf/tokens_per_s", "progress/tokens"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(reference), rel=1e-6)
