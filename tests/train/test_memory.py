"""The memory estimate against the table of the ZeRO paper (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

import pytest

from dist_train.config import PretrainConfig
from dist_train.train import memory


@pytest.mark.parametrize(("stage", "gigabytes"), [("zero0", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_7_5_billion_parameters_on_64_ranks(monkeypatch, stage, gigabytes):
    from transformers import LlamaConfig

    monkeypatch.setattr(memory, "parameters", lambda shape: 7_500_000_000)
    config = PretrainConfig.model_validate(
        {
            "run": {"dir": "run"},
            "tokenizer": "tokenizer.model",
            "data": {"sources": [{"path": "shards"}]},
            "train": {"steps": 1, "global_batch": 64, "micro_batch": 1, "deepspeed": stage},
        }
    )
    estimate = memory.memory_estimate(config, LlamaConfig(), 64)
    states = sum(estimate[kind] for kind in ("drafter weights", "drafter gradients", "optimizer"))
    assert states * 2**30 / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_parameters_are_counted_without_storage():
    """Llama 2 7B: 6,738,415,616 by its model card's configuration."""
    from transformers import LlamaConfig

    assert memory.parameters(LlamaConfig()) == 6_738_415_616


def test_a_run_that_cannot_fit_says_what_to_change(tiny, cli, tmp_path):
    from runs import distillation

    huge = ("drafter.hidden_size=65536", "drafter.mlp_size=262144", "drafter.layers=60")
    done = cli(*distillation(tiny, tmp_path / "run", *huge), expect=2)
    assert "GiB are free: most for" in done.stderr and "train.deepspeed=" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_estimate_is_printed_before_the_start(tiny, cli, tmp_path):
    from runs import distillation

    done = cli(*distillation(tiny, tmp_path / "run", steps=1))
    assert done.stdout.startswith("distill: about 0.4") and "GiB a rank of" in done.stdout
