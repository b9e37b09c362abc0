"""The memory estimate against the table of the ZeRO paper (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import on_ranks
from transformers import LlamaConfig

from dist_train.config import PretrainConfig
from dist_train.models.sizes import parameters
from dist_train.train import memory

TREE = {"run": {"dir": "run"}, "tokenizer": "tokenizer.model", "data": {"sources": [{"path": "shards"}]}}


def planned(stage, *, global_batch=1, **more):
    train = {"steps": 1, "global_batch": global_batch, "micro_batch": 1, "deepspeed": stage, "precision": "bf16"}
    return PretrainConfig.model_validate({**TREE, "train": train, **more})


@pytest.mark.parametrize(("stage", "gigabytes"), [("zero0", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_7_5_billion_parameters_on_64_ranks(monkeypatch, stage, gigabytes):
    """The paper's gradients are half as wide as ours, which are summed in fp32 under ZeRO."""
    monkeypatch.setattr(memory, "parameters", lambda shape: 7_500_000_000)
    estimate = memory.memory_estimate(planned(stage, global_batch=64), LlamaConfig(), 64)
    states = sum(estimate[kind] for kind in ("drafter weights", "drafter gradients", "optimizer")) * 2**30 / 1e9
    wider = {"zero0": 0, "zero1": 2 * 7.5, "zero2": 2 * 7.5 / 64, "zero3": 2 * 7.5 / 64}[stage]
    assert states - wider == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "mlp", "heads", "kv_heads"), [(64, 176, 4, 4), (64, 352, 4, 1), (128, 176, 8, 2)])
def test_activations_are_those_that_autograd_keeps(dtype, hidden, mlp, heads, kv_heads):
    """Counted by hooks on a model of transformers: what a block more keeps, and what the final norm does."""
    import torch
    from transformers import LlamaForCausalLM

    def shape(layers):
        sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 64}
        return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)

    def kept(layers):
        model = LlamaForCausalLM(shape(layers)).to(getattr(torch, dtype))
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        found = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address stays its own
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(input_ids=torch.zeros(2, 128, dtype=torch.long), use_cache=False)
        return sum(size for size, _ in found.values()) / (2 * 128)

    width = getattr(torch, dtype).itemsize
    one, two = (memory.activation_bytes(shape(layers), width)[0] for layers in (1, 2))
    assert two - one == pytest.approx(kept(2) - kept(1), rel=0.02)
    again = [memory.activation_bytes(shape(layers), width, checkpointing=True)[0] for layers in (1, 2)]
    assert again[1] - again[0] == width * hidden


@pytest.mark.parametrize(
    ("stage", "ranks", "width"), [("zero1", 1, 4), ("zero1", 2, 8), ("zero2", 2, 4), ("zero3", 1, 4)]
)
def test_buckets_of_gradients_are_those_that_deepspeed_allocates(stage, ranks, width):
    """Asked of its optimizer for a drafter smaller than a bucket; a CPU gives pages only to what is written there.

    `width`: bytes of a number in all buckets; one bucket more is filled while another is sent to other ranks.
    """
    done = on_ranks(BUCKETS, ranks, stage)
    allocated, drafter = map(int, done[0].stdout.split()[-2:])
    estimate = memory.memory_estimate(planned(stage, global_batch=ranks), LlamaConfig(**SMALL), ranks, on_gpu=True)
    assert estimate["gradients on their way"] * 2**30 == allocated + 4 * drafter  # and the copy that is sent
    on_host = memory.memory_estimate(planned(stage, global_batch=ranks), LlamaConfig(**SMALL), ranks, on_gpu=False)
    assert on_host["gradients on their way"] * 2**30 == width * drafter + 4 * drafter


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
BUCKETS = """
import sys
from dist_train.config import DrafterSection, TrainSection
from dist_train.models.drafter import TrainableDrafter, drafter_config, new_drafter
from dist_train.models.sizes import num_parameters
from dist_train.runtime.process_group import started
from dist_train.train.engine import build_engine

section = DrafterSection(hidden_size=16, layers=1, heads=2, mlp_size=32, max_positions=64)
with started() as runtime:
    sizes = {"global_batch": runtime.world_size, "micro_batch": 1}
    train = TrainSection(steps=1, deepspeed=sys.argv[1], precision="bf16", **sizes)
    model = new_drafter(drafter_config(section, 64, 1, 2), 0)
    engine = build_engine(TrainableDrafter(model), train, runtime)
    if hasattr(engine.optimizer, "setup_buckets"):  # ZeRO 1 and 2 do so when the first gradient comes
        engine.optimizer.setup_buckets()
    held = [bucket.buffer for bucket in engine.optimizer.ipg_buckets.values()]
    buckets = [buffer for one in held for buffer in (one if isinstance(one, list) else [one])]
    print(sum(b.numel() * b.element_size() for b in buckets), num_parameters(model))
"""


def test_a_gpu_holds_the_context_and_nccl_besides_tensors():
    estimates = [
        memory.memory_estimate(planned("zero1", global_batch=8), LlamaConfig(), n, on_gpu=True) for n in (1, 8)
    ]
    assert [estimate["the process itself"] for estimate in estimates] == [0.5, 0.5]
    assert [estimate.get("NCCL") for estimate in estimates] == [None, 1.0]


def test_a_run_says_when_its_sharded_target_fits_whole(tiny):
    """And only then; the line is what the run and its plan print."""
    whole = {"objective": {"kld": 1.0}, "target": {"path": str(tiny.target)}}
    sharded = {**whole, "target": {**whole["target"], "sharding": "zero3"}}
    shape = LlamaConfig(**SMALL)
    replicated = memory.memory_estimate(planned("zero1", global_batch=2, **whole), shape, 2, on_gpu=False)
    needed = sum(replicated.values())
    config = planned("zero1", global_batch=2, **sharded)
    told = memory.replicated_note(config, shape, 2, needed + 0.01, on_gpu=False)
    assert "target.sharding=replicate sends nothing of it over the links" in told
    assert memory.replicated_note(config, shape, 2, needed - 0.01, on_gpu=False) is None
    assert memory.replicated_note(planned("zero1", **whole), shape, 1, 1e3, on_gpu=False) is None
    alone = planned("zero1", **{**sharded, "objective": {"ce": 1.0}})  # its weights are not loaded
    assert memory.replicated_note(alone, shape, 1, 1e3, on_gpu=False) is None


def test_parameters_are_counted_without_storage():
    """Llama 2 7B: 6,738,415,616 by its model card's configuration."""
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

    done = cli(*distillation(tiny, tmp_path / "run", "target.sharding=zero3", steps=1))
    lines = [line for line in done.stdout.splitlines() if line.startswith("distill: about 0.4")]
    assert len(lines) == 1 and "GiB a rank of" in lines[0]
    assert done.stdout.count("distill: the target fits whole on each rank (0.4") == 1


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_the_estimate_is_what_a_run_at_real_shape_takes(shared, cli, tmp_path):
    """The drafter of 115M beside a target of a billion parameters, 2,048 tokens of 32,000, two ranks, three steps."""
    import torch
    from transformers import LlamaForCausalLM

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
