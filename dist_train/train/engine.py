"""The drafter under DeepSpeed: weights, gradients and optimizer state sharded as the named configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.config import TrainSection
from dist_train.errors import UserError
from dist_train.resources import resource
from dist_train.runtime import Runtime


def build_engine(drafter: nn.Module, train: TrainSection, runtime: Runtime) -> Any:
    """A DeepSpeed engine around the drafter, with PyTorch's AdamW. Collective. Raises UserError on a bad batch size."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        _parameter_groups(drafter, train.weight_decay),
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=True,  # one pass over memory, on a CPU too
    )
    configuration = deepspeed_config(train, runtime.world_size)
    engine, *_ = deepspeed.initialize(
        model=drafter, optimizer=optimizer, config=configuration, dist_init_required=False
    )
    return engine


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON that `train.deepspeed` names, its `"auto"` values filled in from the run."""
    accumulation, rest = divmod(train.global_batch, train.micro_batch * world_size)
    if rest or not accumulation:
        raise UserError(
            f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} "
            f"x {world_size} ranks; change one of them"
        )
    is_path = train.deepspeed.endswith(".json")
    path = Path(train.deepspeed) if is_path else resource("ds_configs", f"{train.deepspeed}.json")
    try:
        configuration: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a DeepSpeed configuration: {error}") from error
    return _fill(
        configuration,
        {
            "train_micro_batch_size_per_gpu": train.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": train.gradient_clip,
            "enabled": train.precision == "bf16",
        },
    )


def zero_stage(engine: Any) -> int:
    """0 to 3."""
    return int(engine.zero_optimization_stage())


def _fill(node: Any, values: dict[str, Any]) -> Any:
    if not isinstance(node, dict):
        return node
    return {
        key: values[key] if value == "auto" and key in values else _fill(value, values) for key, value in node.items()
    }


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
