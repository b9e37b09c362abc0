"""What a training needs on each rank, before anything is started."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.config import TargetSection, TrainConfig, resolve_precision
from dist_train.errors import UserError
from dist_train.losses import needs_target
from dist_train.losses.sizes import chunk_rows
from dist_train.models.load import DTYPES, ZERO3_AHEAD, read_target_config, target_bytes
from dist_train.models.sizes import parameters
from dist_train.runtime.free_memory import free_bytes
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.world import local_world_size
from dist_train.train.engine import deepspeed_config

_GIB = 2**30
_PROCESS = 450 * 2**20  # PyTorch, DeepSpeed and transformers, imported
# Of a GPU besides tensors, assumed and not measured here: the context with its kernels, 0.3 to 1 GB a process by the
# NAIRR pilot's guide to GPU estimates; with several ranks the channels and buffers of a NCCL communicator, with which a
# process was seen to take 1.6 GB in all after its first all-reduce (NVIDIA/nccl, issue 864).
_CONTEXT = 512 * 2**20
_NCCL = 1024 * 2**20
_MENDS = {
    "drafter weights": "train.deepspeed=zero3",
    "drafter gradients": "train.deepspeed=zero2",
    "gradients on their way": "a smaller reduce_bucket_size in the DeepSpeed configuration",
    "optimizer": "train.deepspeed=zero2, or zero2-offload",
    "averaged weights": "train.deepspeed=zero2",
    "activations": "a smaller train.micro_batch, or train.gradient_checkpointing=true",
    "logit chunks": "a smaller loss.chunk_size",
    "target weights": "target.sharding=zero3 or tp, more ranks, or target.offload=true",
    "target head": "more GPU memory",
    "target layers gathered": "target.sharding=tp",
    "target activations": "a smaller train.micro_batch",
    "copies for checkpoints": "more ranks",
    "the process itself": "fewer ranks a node",
    "NCCL": "NCCL_MAX_NCHANNELS=8 in the environment",
}


def memory_estimate(
    config: TrainConfig, shape: Any, world_size: int, *, on_gpu: bool | None = None
) -> dict[str, float]:
    """GiB a rank of each kind, for a drafter of the Hugging Face configuration `shape`; `on_gpu`: None asks PyTorch.

    Weights, gradients and optimizer state are counted (Rajbhandari et al. 2020, ZeRO, section 3.1), and activations as
    `activation_bytes` has them. A step and the copies that a checkpoint is written from do not meet: what is more
    counts.
    """
    config = resolve_precision(config, "bf16" if on_gpu else None)
    deepspeed = deepspeed_config(config.train, world_size)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    width = 2 if config.train.precision == "bf16" else 4
    drafter = parameters(shape)
    kinds = ("optimizer", "gradients", "weights")  # what ZeRO 1, 2 and 3 each add to what is sharded
    shard = {kind: world_size if stage >= first else 1 for first, kind in enumerate(kinds, start=1)}
    tokens = config.train.micro_batch * config.data.sequence_length
    estimate = {
        "drafter weights": width * drafter / shard["weights"],
        "drafter gradients": _gradient_width(deepspeed, width) * drafter / shard["gradients"],
        "gradients on their way": _on_their_way(deepspeed, shape, drafter, width, on_gpu),
        # AdamW's two moments in fp32, and beside them an fp32 copy of the weights, save for fp32 without ZeRO;
        # and the average of the weights, where one is kept.
        "optimizer": ((12 if width == 2 or stage else 8) + (4 if config.train.ema_decay else 0))
        * drafter
        / shard["optimizer"],
    }
    target = config.target if needs_target(config.objective) else None
    if target is not None:
        estimate |= _target_bytes(target, world_size, on_gpu)
    step = _step_bytes(config, shape, target, tokens, width, on_gpu)
    copies = 4 * drafter * (4 if config.train.ema_decay else 3) / world_size
    estimate |= step
    estimate["copies for checkpoints"] = max(0.0, copies - sum(step.values()))
    estimate["the process itself"] = _CONTEXT if on_gpu else _PROCESS
    if on_gpu and world_size > 1:
        estimate["NCCL"] = _NCCL
    return {kind: amount / _GIB for kind, amount in estimate.items()}


def _step_bytes(
    config: TrainConfig, shape: Any, target: TargetSection | None, tokens: int, width: int, on_gpu: bool
) -> dict[str, float]:
    """Of each kind at the moment of a micro-batch of `tokens` tokens that takes most: what comes and goes with it.

    The target's pass ends before the drafter's begins; the loss is taken, and differentiated to the hidden states and
    the head, while all that the blocks keep is there; then block after block is differentiated.
    """
    train, parallel = config.train, config.drafter.parallel
    drafted = int(tokens * parallel.positions) if parallel else tokens
    rows = min(config.loss.chunk_size or chunk_rows(shape.vocab_size, on_gpu, alone=target is None), drafted)
    head_gradient = 4 * shape.vocab_size * shape.hidden_size
    kept, differentiated = activation_bytes(
        shape, width, checkpointing=train.gradient_checkpointing, compiled=train.compile is True
    )
    # What each position of a sequence and its chains sees, as bool and as the kernel takes it.
    seen = drafted * drafted // train.micro_batch * (1 + width) if parallel else 0
    moments = [
        {
            "activations": drafted * kept + seen,
            "logit chunks": 4 * shape.vocab_size * (2 if target else 1) * rows + head_gradient,
        },
        {"activations": drafted * differentiated + seen, "logit chunks": head_gradient},
    ]
    if target is not None:
        states, block = _target_activation_bytes(target, tokens)
        states += states // tokens * (drafted - tokens)
        moments = [moment | {"target activations": states} for moment in moments]
        moments.append({"target activations": states + block})
    return max(moments, key=lambda moment: sum(moment.values()))


def _gradient_width(deepspeed: dict[str, Any], width: int) -> int:
    """Bytes of a number that gradients are accumulated in."""
    return _dtype_bytes(deepspeed.get("data_types", {}).get("grad_accum_dtype"), width)


def _dtype_bytes(name: str | None, width: int) -> int:
    """Of what a DeepSpeed configuration calls `name`; `width` where it says nothing."""
    return width if name is None else {"fp32": 4, "bf16": 2, "fp16": 2}.get(name, width)


def _on_their_way(deepspeed: dict[str, Any], shape: Any, drafter: int, width: int, on_gpu: bool) -> int:
    """Bytes of the buckets that gradients are reduced in from ZeRO 1 on (deepspeed.runtime.zero.stage_1_and_2).

    They are as large as `reduce_bucket_size` says, however small the drafter is; on a CPU pages that nothing is written
    to take no memory. One more is filled while the first is sent; ZeRO 1 fills them with what was accumulated, ZeRO 2
    with what the backward pass gives; ZeRO 3 has one, as wide as what is sent. That is a copy, of one bucket or of the
    largest weight, whichever is larger.
    """
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0:
        return 0
    size = int(zero.get("reduce_bucket_size", 500_000_000))
    filled = min(size, drafter)
    buckets = 2 if zero.get("overlap_comm") and stage < 3 else 1
    sent = min(drafter, max(filled, shape.vocab_size * shape.hidden_size))
    sent_width = _dtype_bytes(deepspeed.get("communication_data_type"), width)
    staged = {1: _gradient_width(deepspeed, width), 2: width, 3: sent_width}[stage]
    return buckets * staged * (size if on_gpu else filled) + sent_width * sent


def activation_bytes(shape: Any, width: int, *, checkpointing: bool = False, compiled: bool = False) -> tuple[int, int]:
    """Bytes a token, in numbers of `width` bytes: what a Llama's blocks keep for their backward pass; the most then.

    With an attention that stores no matrix of scores. RMSNorm computes in fp32 and keeps its input so, whatever the
    precision; compiled, it takes that again from what the block before gave. The backward pass begins with the last
    block, when the final norm's share is gone: with checkpointing that block is computed again and keeps everything,
    otherwise the gradients of its MLP come on top.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    head = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    queries, keys = head * shape.num_attention_heads, head * shape.num_key_value_heads
    norm = 4 * hidden + 2 * width * hidden  # its input in fp32; normalised, and times its weight
    attention = width * (2 * queries + 2 * keys)  # queries and their outputs, keys and values
    block = 2 * norm + attention + 4 * width * mlp  # gate before and after SiLU, up, and their product
    if compiled:
        block -= 2 * 4 * hidden
    blocks = shape.num_hidden_layers * (width * hidden if checkpointing else block)
    return blocks + norm, blocks + (block if checkpointing else 2 * width * mlp)


def _target_bytes(section: TargetSection, world_size: int, on_gpu: bool) -> dict[str, float]:
    """Of each kind that stays on a rank."""
    target = read_target_config(section)
    size, whole = DTYPES[section.precision].itemsize, target_bytes(section)
    holders = {"replicate": 1, "zero3": world_size, "tp": section.tp_size}[section.sharding]
    stays = {"target weights": 0 if section.offload and on_gpu else whole / holders}
    if holders > 1:
        stays["target head"] = size * target.vocab_size * target.hidden_size
    if section.sharding == "zero3":
        # One calculates; those that DeepSpeed's prefetch bucket holds are gathered meanwhile.
        stays["target layers gathered"] = (1 + ZERO3_AHEAD) * whole / target.num_hidden_layers
    return stays


def _target_activation_bytes(section: TargetSection, tokens: int) -> tuple[int, int]:
    """Of the target over a micro-batch of `tokens` tokens: its last hidden states, and the block that is alive."""
    target = read_target_config(section)
    size = DTYPES[section.precision].itemsize
    mlp = getattr(target, "intermediate_size", 4 * target.hidden_size)
    together = section.tp_size if section.sharding == "tp" else 1  # a group's sequences
    states = size * tokens * target.hidden_size
    return states, size * together * tokens * (2 * target.hidden_size + 3 * mlp)


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


def replicated_note(
    config: TrainConfig, shape: Any, world_size: int, available: float, *, on_gpu: bool | None = None
) -> str | None:
    """A line that says so where a target that is cut over ranks would fit whole on each, in `available` GiB."""
    target = config.target
    if target is None or target.sharding == "replicate" or not needs_target(config.objective):
        return None
    whole = config.model_copy(update={"target": target.model_copy(update={"sharding": "replicate", "offload": False})})
    needed = sum(memory_estimate(whole, shape, world_size, on_gpu=on_gpu).values())
    if needed > available:
        return None
    return (
        f"the target fits whole on each rank ({needed:.1f} GiB of {available:.1f}): target.sharding=replicate sends "
        f"nothing of it over the links, {target.sharding} does in each micro-batch"
    )


def available_gib(runtime: Runtime) -> float:
    """What is free for this rank: of its GPU, with what its context has there, or its share of the host's memory."""
    if runtime.device.type == "cuda":
        return (free_bytes(runtime.device) + _CONTEXT) / _GIB
    return free_bytes(runtime.device) / _GIB / local_world_size(runtime.world)


def checkpoint_bytes(config: TrainConfig, parameters: int) -> float:
    """Size of one checkpoint of a drafter of so many parameters."""
    return 4.0 * parameters * (4 if config.train.ema_decay else 3)


def kept_checkpoints(config: TrainConfig) -> int:
    """Checkpoints on disk at the most, with the one that is being written."""
    every = config.checkpoint.keep_every
    return config.checkpoint.keep + 1 + (config.train.steps // every if every else 0)
