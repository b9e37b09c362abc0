"""When a run compiles its loss and its blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dist_train.config import PretrainConfig
from dist_train.train import compiling

TREE = {"run": {"dir": "run"}, "tokenizer": "tokenizer.model", "data": {"sources": [{"path": "shards"}]}}
LONG, SHORT = 10_000, 10


def of(steps, *, stage="zero1", blocks="auto", loss="auto"):
    train = {"steps": steps, "global_batch": 8, "micro_batch": 1, "deepspeed": stage, "compile": blocks}
    return PretrainConfig.model_validate({**TREE, "train": train, "loss": {"compile": loss}})


def on(kind, ranks=8):
    return SimpleNamespace(device=torch.device(kind), world_size=ranks)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """One is there, as far as a machine without a GPU can say."""
    monkeypatch.setattr(compiling, "_can_compile", lambda device: True)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_loss_of_a_long_run_is_compiled(kind):
    assert compiling.compiles_loss(of(LONG), 32_000, on(kind)) == "auto"
    assert compiling.compiles_loss(of(SHORT), 32_000, on(kind)) is False
    assert compiling.compiles_loss(of(SHORT, loss=True), 32_000, on(kind)) is True
    assert compiling.compiles_loss(of(LONG, loss=False), 32_000, on(kind)) is False


def test_a_run_is_long_by_the_logits_of_one_rank():
    assert compiling.compiles_loss(of(2000), 32_000, on("cuda", ranks=1)) == "auto"
    assert compiling.compiles_loss(of(2000), 32_000, on("cuda", ranks=8)) is False


def test_blocks_are_compiled_on_a_gpu_short_of_zero3():
    assert compiling.compiles_blocks(of(LONG), 32_000, on("cuda")) is True
    assert compiling.compiles_blocks(of(SHORT), 32_000, on("cuda")) is False
    assert compiling.compiles_blocks(of(LONG, stage="zero3"), 32_000, on("cuda")) is False
    assert compiling.compiles_blocks(of(LONG), 32_000, on("cpu")) is False
    assert compiling.compiles_blocks(of(SHORT, stage="zero3", blocks=True), 32_000, on("cpu")) is True
    assert compiling.compiles_blocks(of(LONG, blocks=False), 32_000, on("cuda")) is False


def test_without_a_compiler_blocks_stay_eager(monkeypatch):
    monkeypatch.setattr(compiling, "_can_compile", lambda device: False)
    assert compiling.compiles_blocks(of(LONG), 32_000, on("cuda")) is False
