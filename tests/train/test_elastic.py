"""A run that goes on with other ranks or another ZeRO stage, against the one that was not disturbed."""

from __future__ import annotations

import shutil

import pytest
import torch
from runs import distillation, losses, on_ranks, run_by, weights

STOPPED, STEPS = 3, 23
WAYS = [  # made under, gone on with: ZeRO stage, ranks, and micro-batch
    ("zero2", "zero2", 1, 4),
    ("zero2", "zero2", 4, 2),
    ("zero2", "zero1", 2, 1),
    ("zero2", "zero3", 2, 2),
    ("zero3", "zero3", 1, 2),
    ("zero3", "zero3", 4, 1),
    ("zero3", "zero0", 2, 2),
]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Runs of two ranks under ZeRO-2 and ZeRO-3, and what each had left after its first checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in ("zero2", "zero3"):
        options = (f"train.deepspeed={stage}", f"checkpoint.every={STEPS - STOPPED}", "train.ema_decay=0.9")
        stop = (f"checkpoint.every={STOPPED}", f"checkpoint.keep_every={STOPPED}", "checkpoint.keep=99")
        run_by(2, *distillation(tiny, folder / stage, *options, *stop, steps=STEPS))
    return folder


def left_over(run, out):
    """The run as a kill after its first checkpoint would have left it."""
    shutil.copytree(run, out)
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.name != f"step-{STOPPED:08d}":
            shutil.rmtree(folder)
    (out / "checkpoints" / "latest").unlink()  # the folders tell which is the newest


@pytest.mark.parametrize(("made", "stage", "ranks", "micro_batch"), WAYS)
def test_other_ranks_and_stages_go_on_as_if_nothing_had_happened(
    tiny, tmp_path, undisturbed, made, stage, ranks, micro_batch
):
    left_over(undisturbed / made, tmp_path / "run")
    options = (f"train.deepspeed={stage}", f"train.micro_batch={micro_batch}", "train.ema_decay=0.9")
    done = run_by(ranks, *distillation(tiny, tmp_path / "run", *options, steps=STEPS), "--resume")
    assert f"resuming at step {STOPPED}" in done.stdout
    # A sample that was repeated or left out would show: these losses are of the undisturbed run's own batches.
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed / made), rel=1e-4)
    for folder in ("model", "ema"):
        expected = weights(undisturbed / made, folder)
        for name, weight in weights(tmp_path / "run", folder).items():
            assert torch.allclose(weight, expected[name], atol=1e-3), (folder, name)


def test_the_average_of_weights_is_that_of_its_definition(tiny, tmp_path):
    run = tmp_path / "run"
    options = ("train.ema_decay=0.8", "checkpoint.every=1", "checkpoint.keep=9")
    run_by(2, *distillation(tiny, run, *options, steps=4))
    average = None
    for step in range(1, 5):
        (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        now = weights(run)
        if average is None:  # it began at the initial weights, which the first checkpoint's average tells
            average = {name: (weights(run, "ema")[name] - 0.2 * weight) / 0.8 for name, weight in now.items()}
        average = {name: 0.8 * average[name] + 0.2 * weight for name, weight in now.items()}
    for name, weight in weights(run, "ema").items():
        assert torch.allclose(weight, average[name], atol=1e-6), name


def test_a_checkpoint_is_a_hugging_face_folder(undisturbed):
    from transformers import AutoModelForCausalLM

    run = undisturbed / "zero3"
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{STEPS:08d}" / "model")
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in weights(run).items()
    }
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights(run).items())


STATES = """
import sys
import torch
from dist_train.config import DrafterSection, TrainSection
from dist_train.models.drafter import TrainableDrafter, drafter_config, new_drafter
from dist_train.runtime.process_group import started
from dist_train.train.engine import build_engine
from dist_train.train.state import WEIGHT, DrafterState

stage, precision = sys.argv[1:]
with started() as runtime:
    section = DrafterSection(hidden_size=16, layers=1, heads=2, mlp_size=32, max_positions=64)
    model = new_drafter(drafter_config(section, 320, 1, 2), 0)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = TrainSection(steps=1, global_batch=4, micro_batch=2, precision=precision, deepspeed=stage)
    state = DrafterState(build_engine(TrainableDrafter(model), train, runtime), model, has_ema=True)
    for name, weight in first.items():
        for factor, key in enumerate((WEIGHT, *state.moments), start=2):
            state.set(name, key, weight * factor)
    for name, weight in first.items():
        for factor, key in enumerate((WEIGHT, *state.moments), start=2):
            assert torch.equal(state.get(name, key), weight * factor), (name, key)
    state.updates = 7
    assert state.updates == 7
"""


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_every_stage_gives_back_what_was_set_in_bf16(stage):
    """fp32 is what the runs above are in."""
    on_ranks(STATES, 2, stage, "bf16")


LOADED_BY_DEEPSPEED = """
import sys
import deepspeed, torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from dist_train.runtime.process_group import started

folder, checkpoint = sys.argv[1:]
with started() as runtime:
    torch.manual_seed(9)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    path, state = engine.load_checkpoint(folder)
    assert path is not None and state["step"] == engine.global_steps == 3
    engine.optimizer._lazy_init_hp_params_optimizer_state()  # else only the first step lets moments be read
    from pathlib import Path

    for file in Path(checkpoint).glob("model/*.safetensors"):
        for name, weight in load_file(file).items():
            assert torch.equal(safe_get_full_fp32_param(model.get_parameter(name)), weight), name
    for file in Path(checkpoint).glob("optimizer-*.safetensors"):
        for stored, moment in load_file(file).items():
            key, name = stored.split(".", 1)
            if key != "ema":
                assert torch.equal(safe_get_full_optimizer_state(model.get_parameter(name), key), moment), stored
"""


def test_deepspeed_alone_goes_on_from_a_converted_checkpoint(cli, refused, tmp_path, undisturbed):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    left_over(undisturbed / "zero3", tmp_path / "run")
    command = ("checkpoint", "convert", tmp_path / "run", "--out", tmp_path / "converted", "--deepspeed", "zero1")
    done = cli(*command, "--nproc", 2)
    assert "step 3, for 2 rank(s) under zero1" in done.stdout
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{STOPPED:08d}"
    on_ranks(LOADED_BY_DEEPSPEED, 2, tmp_path / "converted", checkpoint)
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "converted"))
    (tmp_path / "run" / "checkpoints" / "latest").write_text(f"step-{STOPPED:08d}\n")
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(found[name], weight), name
    assert "is there already" in refused(*command)
