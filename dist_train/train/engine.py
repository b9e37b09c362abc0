"""The drafter under DeepSpeed: weights, gradients and optimizer state sharded as the named configuration says."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config import TrainSection
from dist_train.errors import UserError
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.resources import resource


def build_engine(drafter: nn.Module, train: TrainSection, runtime: Runtime) -> Any:
    """A DeepSpeed engine around the drafter, with PyTorch's AdamW. Collective. Raises UserError on a bad batch size.

    Without ZeRO PyTorch's DistributedDataParallel reduces the gradients while the backward pass goes on, and keeps them
    where they are reduced; DeepSpeed would copy all of them together after it, and back. See `reducing`, `drafter_of`.
    """
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2

    stage_1_and_2.mask_nan_or_inf_with_val_inplace = mask_norm
    optimizer = torch.optim.AdamW(
        _parameter_groups(drafter, train.weight_decay),
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=True,  # one pass over memory, on a CPU too
    )
    configuration = deepspeed_config(train, runtime.world_size)
    with _accumulating_in_fp32():
        engine, *_ = deepspeed.initialize(
            model=drafter, optimizer=optimizer, config=configuration, dist_init_required=False
        )
    if zero_stage(engine) == 0 and runtime.world_size > 1:
        engine.enable_backward_allreduce = False
        engine.module = DistributedDataParallel(engine.module, broadcast_buffers=False, gradient_as_bucket_view=True)
    return engine


def _accumulating_in_fp32() -> AbstractContextManager[Any]:
    """While an engine is made: ZeRO 1 of bf16 weights is DeepSpeed's own, with gradients in fp32, too.

    For fp32 gradients DeepSpeed 0.19.8 takes its BF16_Optimizer there, which keeps all gradients flat on every rank,
    reduces them after the backward pass and has the host wait for their norm. Its ZeRO 1 optimizer accumulates in fp32
    as well, and reduces while the backward pass goes on.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(engine: Any, optimizer: Any) -> Any:
        wrapper = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if wrapper == BFLOAT16 else wrapper

    return mock.patch.object(DeepSpeedEngine, "_do_optimizer_sanity_check", chosen)


def mask_norm(norm: Tensor, device: torch.device | None = None, val: float = -1.0) -> None:
    """Puts `val` in the place of a norm that is not finite, as DeepSpeed's function of this signature does.

    DeepSpeed 0.19.8 copies the value from the host at each step, and the copy waits for the device.
    """
    norm.masked_fill_(~norm.isfinite(), val)


def drafter_of(engine: Any) -> Any:
    """The drafter itself, whatever reduces its gradients."""
    module = engine.module
    return module.module if isinstance(module, DistributedDataParallel) else module


def reducing(engine: Any, *, is_last: bool) -> AbstractContextManager[Any]:
    """For a micro-batch's forward and backward pass: without ZeRO ranks reduce in the last one of a step alone.

    With ZeRO DeepSpeed knows by itself.
    """
    if is_last or not isinstance(engine.module, DistributedDataParallel):
        return nullcontext()
    return engine.module.no_sync()


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON that `train.deepspeed` names, with what the run decides filled in.

    Raises UserError where it says something else than the run: the loop counts on its own batch sizes and optimizer.
    """
    accumulation, rest = divmod(train.global_batch, train.micro_batch * world_size)
    if rest or not accumulation:
        raise UserError(
            f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} "
            f"x {world_size} ranks; change one of them"
        )
    is_path = train.deepspeed.endswith(".json")
    path = Path(train.deepspeed) if is_path else resource("ds_configs", f"{train.deepspeed}.json")
    try:
        configuration = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a DeepSpeed configuration: {error}") from error
    zero = configuration.get("zero_optimization", {}) if isinstance(configuration, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in range(4):
        raise UserError(f"{path}: not a DeepSpeed configuration: it has keys, and a zero_optimization.stage of 0 to 3")
    for key in {"optimizer", "scheduler", "train_batch_size", "fp16"} & configuration.keys():
        raise UserError(f"{path}: {key} is the train section's to say; remove it")
    decided = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clip,
    }
    _decide(configuration, decided, path)
    _decide(configuration.setdefault("bf16", {}), {"enabled": train.precision == "bf16"}, path)
    if own_clipping(train, zero.get("stage", 0)) is not None:
        configuration["gradient_clipping"] = 0.0
        configuration["bf16"]["check_grad_overflow"] = False
    if world_size == 1 and "overlap_comm" in zero:
        zero["overlap_comm"] = False  # nothing to overlap, and DeepSpeed waits for the device at each bucket
    # It would wait for the device around each step.
    configuration.setdefault("timers", {"throughput": {"enabled": False}})
    return dict(configuration)


def own_clipping(train: TrainSection, stage: int) -> float | None:
    """The largest gradient norm where `StepControl` clips, without the host; None where that is left to DeepSpeed.

    DeepSpeed's ZeRO 3 steps a part of the weights at a time, and its bf16 without ZeRO parameter by parameter.
    """
    if stage in (1, 2) or (stage == 0 and train.precision == "fp32"):
        return train.gradient_clip
    return None


def _decide(node: dict[str, Any], decided: dict[str, Any], path: Path) -> None:
    """Put in what is decided. Raises UserError where another value stands there already."""
    for key, value in decided.items():
        if node.get(key, "auto") not in ("auto", value):
            raise UserError(f'{path}: {key} is {node[key]}, the train section says {value}; write "auto"')
        node[key] = value


def zero_stage(engine: Any) -> int:
    """0 to 3."""
    return int(engine.zero_optimization_stage())


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
