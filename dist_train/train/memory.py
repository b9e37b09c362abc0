"""What a training needs on each rank, before anything is started."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dist_train.config import TargetSection, TrainConfig, resolve_precision
from dist_train.errors import UserError
from dist_train.losses import needs_target
from dist_train.losses.sizes import chunk_rows
from dist_train.models.load import DTYPES, read_target_config, target_bytes
from dist_train.models.sizes import parameters
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.world import local_world_size
from dist_train.train.engine import deepspeed_config

_GIB = 2**30
_PROCESS = 450 * 2**20  # PyTorch, DeepSpeed and transformers, imported
_MENDS = {
    "drafter weights": "train.deepspeed=zero3",
    "drafter gradients": "train.deepspeed=zero2",
    "gradients on their way": "a smaller reduce_bucket_size in the DeepSpeed configuration",
    "optimizer": "train.deepspeed=zero2, or zero2-offload",
    "activations": "a smaller train.micro_batch, or train.gradient_checkpointing=true",
    "logit chunks": "a smaller loss.chunk_size",
    "target weights": "target.sharding=zero3 or tp, more ranks, or target.offload=true",
    "target head": "more GPU memory",
    "target layers gathered": "target.sharding=tp",
    "target activations": "a smaller train.micro_batch",
    "copies for checkpoints": "more ranks",
    "the process itself": "fewer ranks a node",
}


def memory_estimate(
    config: TrainConfig, shape: Any, world_size: int, *, on_gpu: bool | None = None
) -> dict[str, float]:
    """GiB a rank of each kind, for a drafter of the Hugging Face configuration `shape`; `on_gpu`: None asks PyTorch.

    Weights, gradients and optimizer state are counted (Rajbhandari et al. 2020, ZeRO, section 3.1), and activations as
    `activation_bytes` has them. From ZeRO 1 on DeepSpeed copies gradients into a bucket before it sends them. A step
    and the copies that a checkpoint is written from do not meet: what is more counts.
    """
    config = resolve_precision(config, "bf16" if on_gpu else None)
    configuration = deepspeed_config(config.train, world_size).get("zero_optimization", {})
    stage = configuration.get("stage", 0)
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    width = 2 if config.train.precision == "bf16" else 4
    drafter = parameters(shape)
    kinds = ("optimizer", "gradients", "weights")  # what ZeRO 1, 2 and 3 each add to what is sharded
    shard = {kind: world_size if stage >= first else 1 for first, kind in enumerate(kinds, start=1)}
    tokens = config.train.micro_batch * config.data.sequence_length
    buckets = 2 if configuration.get("overlap_comm") else 1  # one is filled while the other is sent
    bucket = min(drafter, configuration.get("reduce_bucket_size", 500_000_000)) if stage >= 1 else 0
    estimate = {
        "drafter weights": width * drafter / shard["weights"],
        "drafter gradients": width * drafter / shard["gradients"],
        "gradients on their way": width * bucket * buckets,
        # AdamW's two moments in fp32, and beside them an fp32 copy of the weights, save for fp32 without ZeRO;
        # and the average of the weights, where one is kept.
        "optimizer": ((12 if width == 2 or stage else 8) + (4 if config.train.ema_decay else 0))
        * drafter
        / shard["optimizer"],
    }
    target = config.target if needs_target(config.objective) else None
    rows = min(config.loss.chunk_size or chunk_rows(shape.vocab_size, on_gpu, alone=target is None), tokens)
    step = {
        "activations": tokens * activation_bytes(shape, width, checkpointing=config.train.gradient_checkpointing),
        # Both heads' chunks, and the fp32 gradient of the drafter's head.
        "logit chunks": 4 * shape.vocab_size * ((2 if target else 1) * rows + shape.hidden_size),
    }
    if target is not None:
        stays, comes = _target_bytes(target, tokens, world_size, on_gpu)
        estimate |= stays
        step |= comes
    copies = 4 * drafter * (4 if config.train.ema_decay else 3) / world_size
    estimate |= step
    estimate["copies for checkpoints"] = max(0.0, copies - sum(step.values()))
    if not on_gpu:
        estimate["the process itself"] = _PROCESS
    return {kind: amount / _GIB for kind, amount in estimate.items()}


def activation_bytes(shape: Any, width: int, *, checkpointing: bool = False) -> int:
    """Bytes a token that a Llama's blocks keep for their backward pass, in numbers of `width` bytes, and its gradients.

    With an attention that stores no matrix of scores. RMSNorm computes in fp32 and keeps its input so, whatever the
    precision. While one block is differentiated its gradients, or with checkpointing what is computed again, take about
    what it kept.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    head = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    queries, keys = head * shape.num_attention_heads, head * shape.num_key_value_heads
    norm = 4 * hidden + 2 * width * hidden  # its input in fp32; normalised, and times its weight
    attention = width * (2 * queries + 2 * keys)  # queries and their outputs, keys and values
    block = 2 * norm + attention + 4 * width * mlp  # gate before and after SiLU, up, and their product
    kept = width * hidden if checkpointing else block
    return int(shape.num_hidden_layers * kept + norm + block)


def _target_bytes(
    section: TargetSection, tokens: int, world_size: int, on_gpu: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each kind: what stays on a rank, and what comes with a step over `tokens` tokens of each rank."""
    target = read_target_config(section)
    size, whole = DTYPES[section.precision].itemsize, target_bytes(section)
    holders = {"replicate": 1, "zero3": world_size, "tp": section.tp_size}[section.sharding]
    stays = {"target weights": 0 if section.offload and on_gpu else whole / holders}
    if holders > 1:
        stays["target head"] = size * target.vocab_size * target.hidden_size
    if section.sharding == "zero3":
        stays["target layers gathered"] = 2 * whole / target.num_hidden_layers
    mlp = getattr(target, "intermediate_size", 4 * target.hidden_size)
    together = section.tp_size if section.sharding == "tp" else 1  # a group's sequences
    a_block = size * together * tokens * (2 * target.hidden_size + 3 * mlp)  # one is alive at a time
    return stays, {"target activations": a_block}


def check_fit(estimate: dict[str, float], available: float) -> None:
    """Raise UserError when a rank needs more than the GiB that are free for it, with what to change."""
    needed = sum(estimate.values())
    if needed <= available:
        return
    largest = sorted(estimate, key=lambda kind: -estimate[kind])[:2]
    raise UserError(
        f"a rank needs about {needed:.1f} GiB and {available:.1f} GiB are free: most for {' and '.join(largest)}; "
        f"{'; '.join(dict.fromkeys(_MENDS[kind] for kind in largest))}; or run.check_memory=false"
    )


def available_gib(runtime: Runtime) -> float:
    """What is free for this rank: of its GPU, or its share of the host's memory."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free / _GIB
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)
    return found / _GIB / local_world_size(runtime.world)


def checkpoint_bytes(config: TrainConfig, parameters: int) -> float:
    """Size of one checkpoint of a drafter of so many parameters."""
    return 4.0 * parameters * (4 if config.train.ema_decay else 3)


def kept_checkpoints(config: TrainConfig) -> int:
    """Checkpoints on disk at the most, with the one that is being written."""
    every = config.checkpoint.keep_every
    return config.checkpoint.keep + 1 + (config.train.steps // every if every else 0)
