"""What users do to run folders and configurations: named in one line, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
import yaml
from runs import arguments, distillation, losses, patched, run_by
from safetensors.torch import load_file, save_file

from data_shards.files import read_json, write_json
from dist_train.config import TrainSection
from dist_train.errors import UserError
from dist_train.train.engine import deepspeed_config


@pytest.fixture(scope="module")
def finished(tiny, cli, tmp_path_factory):
    """A run of six steps with checkpoints after steps 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    cli(*distillation(tiny, run, "checkpoint.every=2", "checkpoint.keep=2"))
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_damaged_checkpoints_do_not_count_and_copies_do_not_matter(tiny, run, finished):
    newest = run / "checkpoints" / "step-00000006"
    shutil.copytree(newest, newest.with_name("step-00000006.bak"))
    torn = next(newest.glob("optimizer-*"))
    torn.write_bytes(torn.read_bytes()[:-10])
    done = run_by(1, *distillation(tiny, run, "checkpoint.keep=1", steps=5))
    assert "is damaged" in done.stderr
    assert names(run) == ["step-00000005", "step-00000006.bak", "step-00000006.damaged"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000005\n"
    assert losses(run) == losses(finished)[:4] + losses(run)[4:]


def test_a_torn_manifest_is_listed_and_passed_over(tiny, command, run):
    (run / "checkpoints" / "step-00000006" / "manifest.json").write_text('{"torn')
    code, listed, _ = command("checkpoint", "ls", run)
    assert code == 1
    assert "step-00000004  " in listed and "written by 1 rank\n" in listed and "torn" in listed
    assert "resuming at step 4" in run_by(1, *distillation(tiny, run), "--resume").stdout


def test_manifests_and_the_newest_checkpoints_name_stay_within_the_run(tiny, command, refused, run, finished):
    checkpoint = run / "checkpoints" / "step-00000006"
    manifest = read_json(checkpoint / "manifest.json")
    name = next(name for name in manifest["files"] if name.startswith("model/") and name.endswith(".safetensors"))
    stolen = f"model/../../../../{finished.name}/{name}"
    manifest["files"][stolen] = manifest["files"].pop(name)
    write_json(checkpoint / "manifest.json", manifest)
    code, said, _ = command("checkpoint", "verify", run)
    assert code == 1
    assert f"names {stolen!r}, which is outside" in said
    (run / "checkpoints" / "latest").write_text("../../elsewhere")
    assert "names '../../elsewhere'" in refused("export", f"drafter={run}", f"target.path={tiny.target}", "out=x")


def test_a_target_of_other_weights_and_a_drafter_of_other_heads_are_named(tiny, run, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(tiny.target, target)
    weights = load_file(target / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = (run / "config.yaml").read_text()
    done = run_by(1, *distillation(tiny, run, f"target.path={target}", steps=7), expect=2)
    assert "is not the one this run was begun with" in done.stderr
    shutil.copytree(tiny.target, tmp_path / "whole")
    shutil.copytree(target, tiny.target, dirs_exist_ok=True)  # in its place: only the weights tell
    try:
        done = run_by(1, *distillation(tiny, run, steps=7), expect=2)
    finally:
        shutil.copytree(tmp_path / "whole", tiny.target, dirs_exist_ok=True)
    assert "its weights or configuration changed" in done.stderr
    done = run_by(1, *distillation(tiny, run, "drafter.heads=1", steps=7), expect=2)
    assert "the drafter's head_dim is 16, it was 8" in done.stderr
    assert (run / "config.yaml").read_text() == config


def test_a_drafter_of_another_tokenizer_begins_no_run_and_drafts_for_no_target(
    tiny, command, refused, other_tokenizer, tmp_path, monkeypatch
):
    corpus, run, other = tmp_path / "corpus", tmp_path / "run", f"tokenizer={other_tokenizer}"
    assert command("prepare", f"inputs={tiny.root / 'text.jsonl'}", other, f"out={corpus}")[0] == 0
    data = [f"data.sources=[{{path: {corpus}}}]", "data.sequence_length=32", "objective={ce: 1.0}"]
    run_by(1, "pretrain", *arguments(tiny, run, other, *data, steps=1))
    warm = distillation(tiny, tmp_path / "next", f"drafter.init_from={run}")
    exported = ["export", f"drafter={run}", f"target.path={tiny.target}", f"out={tmp_path / 'out'}"]
    evaluated = ["evaluate", f"drafters={{a: {run}}}", f"target.path={tiny.target}", f"out={tmp_path / 'out'}"]
    evaluated += [f"tasks=[{{name: chat, inputs: {tiny.chat_lines}}}]"]
    for words, name in ((warm, "drafter.init_from"), (exported, "drafter"), (evaluated, "drafter a")):
        assert f"{name}: {run}: its tokenizer, {other_tokenizer}" in refused(*words)

    # Of a path that leads to another tokenizer today, nothing can be said but that.
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "tokenizer": "tokenizer.model"}))
    monkeypatch.chdir(tiny.tokenizer)
    code, _, told = command(*exported)
    assert code == 0
    assert told.startswith(f"drafter: {run}: not compared with {tiny.target}") and "is not what " in told
    monkeypatch.chdir(other_tokenizer)
    assert f"drafter: {run}: its tokenizer, " in refused(*exported)
    (run / "config.yaml").write_text("target: foo")
    code, _, told = command(*exported)
    assert code == 2 and f"dist-train export: {run / 'config.yaml'}: torn or changed; restore it" in told


def test_damaged_weights_begin_no_other_run(tiny, run, tmp_path):
    file = next((run / "checkpoints" / "step-00000006" / "model").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run_by(1, *distillation(tiny, tmp_path / "next", f"drafter.init_from={run}"), expect=2)
    assert "is damaged" in done.stderr and done.stderr.count("\n") == 1, done.stderr


DISK_IS_FULL = """
import errno
from dist_train.train import metrics
log = metrics.Metrics.log
def full(self, step, figures):
    if step == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    log(self, step, figures)
metrics.Metrics.log = full
"""


def test_a_disk_that_is_full_of_figures_is_one_line(tiny, tmp_path):
    (done,) = patched(DISK_IS_FULL, 1, *distillation(tiny, tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert "No space left on device; free space" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_work_is_told_before_the_start(tiny, refused, tmp_path):
    held_out = f"held_out={{path: {tiny.chats}, sequences: 5}}"
    window = f"held_out={{path: {tiny.chats}, gammas: [64]}}"
    target = [f"target.path={tiny.target}", "target.precision=fp32", *tiny.data("corpus")]
    pretraining = ["pretrain", *arguments(tiny, tmp_path / "run", *target)]
    distilling = distillation(tiny, tmp_path / "run")
    cases = [
        ([*pretraining, held_out], "held_out.sequences 5 is not a multiple of train.micro_batch 2"),
        ([*pretraining, window], "held_out.gammas: 64 is no window of data.sequence_length 32"),
        ([*pretraining, "on_policy.share=0.5"], "name a loss besides ce"),
        ([*distilling, "objective={kld: .nan}"], "objective.kld: Input should be a finite number"),
        ([*distilling, "drafter.heads=3"], "change drafter.heads"),
    ]
    for command, message in cases:
        assert message in refused(*command)


def test_a_deepspeed_file_of_ones_own_cannot_contradict_the_run(tmp_path):
    path = tmp_path / "own.json"
    train = TrainSection(steps=1, global_batch=8, micro_batch=2, precision="bf16", deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    filled = deepspeed_config(train, world_size=2)
    assert filled["train_micro_batch_size_per_gpu"] == filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 0.0  # done beside AdamW, without DeepSpeed's look at the norm
    assert filled["bf16"] == {"enabled": True, "check_grad_overflow": False}
    for content, message in (
        ([], "not a DeepSpeed configuration"),
        ({"zero_optimization": {"stage": 7}}, "stage of 0 to 3"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, the train section says 2"),
        ({"bf16": {"enabled": False}}, "enabled is False, the train section says True"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is the train section's to say"),
        ({"train_batch_size": 8}, "train_batch_size is the train section's to say"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            deepspeed_config(train, world_size=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": torch.ones(3)}, "mask has 3 positions, drafter_hidden 4"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "labels has 5 positions"),
        ({"target_hidden": torch.zeros(2, 8)}, "target_hidden has 2 positions"),
        ({"normalize": "positions"}, "normalize 'positions'; there are batch and position"),
        ({"beta": 2.0}, "beta 2.0"),
        ({"name": {}}, "no loss is named"),
    ],
)
def test_losses_refuse_what_does_not_fit(changed, message):
    from dist_train.losses import linear_divergence

    given = {
        "name": "tvdpp",
        "drafter_hidden": torch.zeros(4, 6),
        "drafter_weight": torch.zeros(9, 6),
        "target_hidden": torch.zeros(4, 8),
        "target_weight": torch.zeros(9, 8),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**given, **changed})


def test_a_flipped_token_id_ends_training_with_the_sample_whichever_rank_reads_it(tiny, tmp_path):
    shutil.copytree(tiny.corpus, tmp_path / "corpus")
    tokens = tmp_path / "corpus" / "shard-00000.tokens"
    tokens.write_bytes(b"\xff\x7f" * (tokens.stat().st_size // 2))
    sources = [f"data.sources=[{{path: {tmp_path / 'corpus'}}}]", f"data.sequence_length={tiny.sequence_length}"]
    done = patched("", 2, "pretrain", *arguments(tiny, tmp_path / "run", *sources), check=False)
    for rank, one in enumerate(done):
        assert one.returncode == 2
        assert f"dist-train pretrain: rank {rank}: {tmp_path / 'corpus'}: its sample " in one.stderr
        assert "has the token id 32767, outside the vocabulary of 320" in one.stderr and "Traceback" not in one.stderr


def test_every_file_of_a_run_follows_the_umask(tiny, cli, tmp_path):
    """So that colleagues can verify, evaluate and export it, where the umask lets them."""
    before = os.umask(0o007)
    try:
        cli(*distillation(tiny, tmp_path / "run", steps=1))
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [path for path in found if path.suffix == ".safetensors"]
    assert {str(path): oct(mode) for path, mode in found.items() if mode != 0o660} == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("closed", ["model/*.safetensors", "optimizer-*.safetensors", "manifest.json", "."])
def test_what_may_not_be_read_is_one_line(command, run, tmp_path, closed):
    """A colleague's `checkpoint verify` and `status`: neither a traceback nor a word of damage."""
    for folder in (tmp_path, *takewhile(lambda folder: folder != Path(gettempdir()), tmp_path.parents)):
        folder.chmod(0o755)
    words = (("checkpoint", "verify", run), ("status", run))
    for word in words:
        assert command(*word)[0] == 0  # and all that it imports is imported
    for path in (run / "checkpoints" / "step-00000006").glob(closed) if closed != "." else [run]:
        path.chmod(0)
    os.seteuid(65534)
    try:
        told = [command(*word) for word in words]
    finally:
        os.seteuid(0)
    if closed != ".":
        assert told.pop()[0] == 0
    for code, listed, complaint in told:
        said = complaint or listed.splitlines()[-1]
        assert code == (2 if complaint else 1) and complaint.count("\n") <= 1, complaint
        assert "ermission denied" in said and "damaged" not in said
