"""Steps that must not move the weights: judged and left out on the device, so that the host waits for no loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dist_train.errors import UserError
from dist_train.train.state import EMA, inner_optimizer

_WINDOW = 128  # losses that a spike is judged by
_LEAST_LOSSES = 32
_DEVIATIONS = 6.0
_LEAST_DEVIATION = 0.01  # of the mean: where the loss hardly moves any more, nothing is a spike


class StepControl:
    """Hooks on AdamW's step, which every ZeRO stage goes through: leaves a step out, clips, and averages the weights.

    It does so as torch.amp's GradScaler does, by the `found_inf` and `grad_scale` of the fused AdamW, which are tensors
    on the device. `norm`: of the gradients of the last step, where it clips; `left_out`: 1.0 if it moved nothing, else
    0.0.

    `clip`: largest gradient norm; None where DeepSpeed clips, and leaves a step of non-finite gradients out by itself.
    """

    def __init__(self, engine: Any, clip: float | None, ema_decay: float | None, device: torch.device) -> None:
        self._engine, self._clip, self._ema_decay = engine, clip, ema_decay
        optimizer = inner_optimizer(engine)
        self._wanted = torch.zeros((), device=device)
        self.left_out = self._wanted
        self.norm: Tensor | None = None
        self._found: Tensor | None = None
        self._scale: Tensor | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def begin(self, leave_out: Tensor) -> None:
        """The engine's step that comes next moves nothing where `leave_out`, a bool on the device, is true."""
        self._wanted, self._found, self.norm = leave_out.float(), None, None
        self.left_out = torch.ones_like(self._wanted)  # unless AdamW is reached, which DeepSpeed decides, too

    def _before(self, optimizer: Any, *_: Any) -> None:
        if self._found is None:  # ZeRO steps group by group
            self._found = self._wanted
            if self._clip is not None:
                self.norm = norm = self._measure_norm(optimizer)
                # DeepSpeed writes -1 for a norm that is not finite.
                self._found = torch.maximum(self._found, (~norm.isfinite() | (norm < 0)).float())
                if self._clip:
                    self._scale = ((norm + 1e-6) / self._clip).clamp_min(1)
        # Not left to AdamW, which would copy them to an optimizer on the CPU without waiting for them to arrive.
        device = next(tensor.device for group in optimizer.param_groups for tensor in group["params"])
        optimizer.found_inf = self._found.to(device)
        optimizer.grad_scale = None if self._scale is None else self._scale.to(device)

    def _measure_norm(self, optimizer: Any) -> Tensor:
        if self._engine.optimizer is not optimizer:
            return self._engine.optimizer._global_grad_norm.float().to(self._wanted.device)
        gradients = [tensor.grad for group in optimizer.param_groups for tensor in group["params"]]
        return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])

    def _after(self, optimizer: Any, *_: Any) -> None:
        assert self._found is not None
        self.left_out = self._found
        if self._ema_decay is None:
            return
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                share = ((1 - self._ema_decay) * (1 - self._found)).to(tensor)
                optimizer.state[tensor][EMA].lerp_(tensor.detach(), share)


class LossGuard:
    """Judges the loss of each global step: all ranks see the same loss, so they judge alike.

    A step whose loss or gradient is not finite is left out; too many on end stop the run. A spike, a loss further above
    the last ones than chance brings, is told, and with `skip_spikes` left out too.
    """

    def __init__(self, max_skipped: int, *, skip_spikes: bool, device: torch.device) -> None:
        self._max_skipped, self._skip_spikes = max_skipped, skip_spikes
        self._losses = torch.full((_WINDOW,), math.nan, dtype=torch.float64, device=device)  # newest last
        self._skipped_on_end = 0
        self.skipped = 0
        self.spikes = 0

    def judge(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the optimizer must leave this step out, and whether its loss is a spike: bools on the device."""
        finite, spike = loss.isfinite(), self._is_spike(loss)
        self._losses = torch.where(finite, torch.cat([self._losses[1:], loss.double()[None]]), self._losses)
        return ~finite | (spike & self._skip_spikes), spike

    def _is_spike(self, loss: Tensor) -> Tensor:
        known = ~self._losses.isnan()
        mean = self._losses.nanmean()
        deviation = (self._losses - mean).square().nanmean().sqrt()
        limit = mean + _DEVIATIONS * torch.maximum(deviation, _LEAST_DEVIATION * mean.abs())
        return (known.sum() >= _LEAST_LOSSES) & (loss > limit) & loss.isfinite()

    def count(self, *, applied: bool, spike: bool, loss: float, step: int, samples: str) -> None:
        """Take note of how a step went; `step` counts from 1. Raises UserError after too many were left out."""
        self.spikes += spike
        if applied:
            self._skipped_on_end = 0
            return
        self.skipped += 1
        self._skipped_on_end += 1
        if self._skipped_on_end >= self._max_skipped:
            reason = f"the loss {loss:.4g} is a spike" if spike else "the gradient is not finite"
            if not math.isfinite(loss):
                reason = f"the loss is {loss}"
            raise UserError(
                f"step {step}: {reason}, and {self._skipped_on_end} steps in a row were left out ({samples}); the "
                "newest checkpoint is from before or among them; lower train.learning_rate, or look at these samples"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the next judgement depends on."""
        return {
            "losses": [loss for loss in self._losses.tolist() if not math.isnan(loss)],
            "skipped_on_end": self._skipped_on_end,
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        missing = [math.nan] * (_WINDOW - len(state["losses"]))
        self._losses = self._losses.new_tensor([*missing, *state["losses"]])
        self._skipped_on_end, self.skipped, self.spikes = state["skipped_on_end"], state["skipped"], state["spikes"]
