"""What a training needs on each rank, before anything is started."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.config import TrainConfig
from dist_train.losses.linear import chunk_rows
from dist_train.target import DTYPES, read_target_config
from dist_train.train.engine import deepspeed_config

_GIB = 2**30


def memory_estimate(config: TrainConfig, shape: Any, world_size: int) -> dict[str, float]:
    """GiB a rank of each kind, for a drafter of the Hugging Face configuration `shape`.

    Weights, gradients and optimizer state are counted (Rajbhandari et al. 2020, ZeRO, section 3.1); activations are
    those that a Llama block keeps for its backward pass with an attention that stores no matrix of scores.
    """
    stage = deepspeed_config(config.train, world_size).get("zero_optimization", {}).get("stage", 0)
    width = 2 if config.train.precision == "bf16" else 4
    drafter = parameters(shape)
    kinds = ("optimizer", "gradients", "weights")  # what ZeRO 1, 2 and 3 each add to what is sharded
    shard = {kind: world_size if stage >= first else 1 for first, kind in enumerate(kinds, start=1)}
    tokens = config.train.micro_batch * config.data.sequence_length
    block = 8 * shape.hidden_size + 4 * shape.intermediate_size
    kept = shape.hidden_size if config.train.gradient_checkpointing else block
    rows = config.loss.chunk_size or chunk_rows(shape.vocab_size, torch.cuda.is_available())
    estimate = {
        "drafter weights": width * drafter / shard["weights"],
        "drafter gradients": width * drafter / shard["gradients"],
        # AdamW's two moments in fp32, and beside bf16 weights an fp32 copy of them.
        "optimizer": (12 if width == 2 else 8) * drafter / shard["optimizer"],
        "activations": width * tokens * (shape.num_hidden_layers * kept + block),
        "logit chunks": 8 * 4 * min(rows, tokens) * shape.vocab_size,
    }
    if config.target is not None and set(config.objective) != {"ce"}:
        target = read_target_config(config.target)
        size = DTYPES[config.target.precision].itemsize
        holders = world_size if config.target.sharding == "zero3" else 1
        mlp = getattr(target, "intermediate_size", 4 * target.hidden_size)
        estimate["target weights"] = size * parameters(target) / holders
        estimate["target activations"] = size * tokens * (2 * target.hidden_size + 3 * mlp)  # one block at a time
    return {kind: amount / _GIB for kind, amount in estimate.items()}


def parameters(shape: Any) -> int:
    """Number of parameters of a Hugging Face configuration, counted on a model without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(shape).num_parameters())
