"""The drafter's weights and AdamW's moments, whole and in fp32, one parameter at a time, whatever shards them.

A checkpoint in this form knows neither ranks nor ZeRO stages: what was written by one arrangement is read by any other.
DeepSpeed's `safe_get_full_*` and `safe_set_full_*` do the work for ZeRO 1 to 3; without ZeRO every rank has all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.train.engine import zero_stage

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


class DrafterState:
    """Reads and writes the state of `model`, the drafter in a DeepSpeed engine. `get` and `set` are collective."""

    def __init__(self, engine: Any, model: nn.Module, *, has_ema: bool = False) -> None:
        self._engine = engine
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.moments = (*MOMENTS, EMA) if has_ema else MOMENTS
        self.keys = (WEIGHT, *self.moments)
        # bf16 without ZeRO: each parameter has an fp32 copy of its own.
        halves, masters = (
            [tensor for group in getattr(engine.optimizer, kind, []) if zero_stage(engine) == 0 for tensor in group]
            for kind in ("fp16_groups", "fp32_groups")
        )
        self._masters = dict(zip(halves, masters, strict=True))
        self._initialise_moments()

    def get(self, name: str, key: str) -> Tensor:
        """`WEIGHT` or a moment of a parameter, whole, fp32, on every rank; not to be changed."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if self._is_whole(parameter):
            master = self._masters.get(parameter, parameter)
            return master.detach() if key == WEIGHT else inner_optimizer(self._engine).state[master][key]
        if key == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def set(self, name: str, key: str, value: Tensor) -> None:
        """Put a whole fp32 tensor in its place; each rank takes its share. The weights' bf16 copies follow."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.parameters[name]
        value = value.to(parameter.device)
        if key == WEIGHT:
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            if self._is_whole(parameter):
                self._masters.get(parameter, parameter).data.copy_(value)
            else:
                safe_set_full_fp32_param(parameter, value)
        elif self._is_whole(parameter):
            inner_optimizer(self._engine).state[self._masters.get(parameter, parameter)][key].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    @property
    def updates(self) -> int:
        """Updates that AdamW has made; skipped steps do not count."""
        inner = inner_optimizer(self._engine)
        return int(inner.state[next(iter(optimizer_tensors(self._engine)))]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        inner = inner_optimizer(self._engine)
        for tensor in optimizer_tensors(self._engine):
            inner.state[tensor]["step"].fill_(count)

    def _is_whole(self, parameter: nn.Parameter) -> bool:
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    @torch.no_grad()
    def _initialise_moments(self) -> None:
        """What AdamW's first step would make, made now, so that it can be read and set before."""
        inner = inner_optimizer(self._engine)
        for tensor in optimizer_tensors(self._engine):
            # As torch.optim.Adam._init_group has it: the count is beside the tensor where the update is one kernel.
            device = tensor.device if inner.defaults["fused"] else "cpu"
            inner.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in MOMENTS:
                inner.state[tensor][key] = torch.zeros_like(tensor)
            if EMA in self.moments:
                inner.state[tensor][EMA] = tensor.detach().clone()
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer inside of DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def optimizer_tensors(engine: Any) -> Iterable[Tensor]:
    """What PyTorch's optimizer updates on this rank: parameters, or this rank's flat share of their fp32 copies."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 shows it one sub-group at a time
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in inner_optimizer(engine).param_groups for tensor in group["params"]]
