"""The memory estimate against the table of the ZeRO paper (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.config import PretrainConfig
from dist_train.models.sizes import parameters
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

    assert parameters(LlamaConfig()) == 6_738_415_616


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


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_the_estimate_is_what_a_run_at_real_shape_takes(shared, cli, tmp_path):
    """The drafter of 115M beside a target of a billion parameters, 2,048 tokens of 32,000, two ranks, three steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        target = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=18))
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0.9e9 < target.num_parameters() < 1.2e9
    target.save_pretrained(tmp_path / "target", max_shard_size="500MB")
    del target
    lines = ({"text": f"Sentence {number} of a text that is as long as it has to be."} for number in range(3000))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = shared / "llama2" / "tokenizer.model"
    cli("prepare", f"inputs={tmp_path / 'text.jsonl'}", f"tokenizer={tokenizer}", f"out={tmp_path / 'shards'}")
    command = [
        *(sys.executable, "-m", "dist_train", "pretrain", f"run.dir={tmp_path / 'run'}", f"tokenizer={tokenizer}"),
        *(f"target.path={tmp_path / 'target'}", "target.sharding=zero3", "objective={ce: 0.5, kld: 0.5}"),
        *(f"data.sources=[{{path: {tmp_path / 'shards'}}}]", "data.sequence_length=2048", "train.deepspeed=zero2"),
        *("train.steps=3", "train.global_batch=2", "train.micro_batch=1", "--nproc", "2"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    while running.poll() is None:
        for child in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
            peaks[child] = max(peaks.get(child, 0), anonymous_memory(child))
        time.sleep(0.01)
    output = running.stdout.read()
    assert running.returncode == 0
    assert "finished at step 3" in output
    estimate = float(re.search(r"about ([0-9.]+) GiB a rank", output)[1])
    measured = [peak / 2**30 for peak in peaks.values()]
    print(f"estimated {estimate:.2f} GiB a rank, measured {', '.join(f'{peak:.2f}' for peak in measured)}")
    assert len(measured) == 2
    for peak in measured:
        assert estimate == pytest.approx(peak, rel=0.15)


def anonymous_memory(process: str) -> int:
    """Bytes that are the process's own, without pages of files that the kernel shares."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has just ended
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return int(found[1]) * 1024 if found else 0
