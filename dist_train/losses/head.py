"""From final hidden states to logits, for every family of causal language models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh((hidden @ weight.T + bias) * scale / softcap).

    `weight` [V, D]; `bias` [V] (Phi); `scale` (Cohere, Granite); `softcap` (Gemma 2), None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def detached(self, vocab_size: int | None) -> Head:
        """The same head outside of the autograd graph, without the rows that are padding."""
        bias = None if self.bias is None else self.bias.detach()[:vocab_size]
        return replace(self, weight=self.weight.detach()[:vocab_size], bias=bias)

    @property
    def finish(self) -> Finish:
        """What comes after the product."""
        return Finish(self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in fp32 (fp64 for fp64 input), [..., V], of `hidden` [..., D]; the product is in the head's dtype."""
        raw = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.finish.finished(raw)


@dataclass(frozen=True)
class Finish:
    """From a head's raw product, `hidden @ weight.T + bias`, to its logits, and back."""

    scale: float
    softcap: float | None

    def finished(self, raw: Tensor) -> Tensor:
        """Logits in fp32 or fp64; the same tensor where nothing is left to do."""
        logits = raw.to(working_dtype(raw)) * self.scale if self.scale != 1.0 else raw.to(working_dtype(raw))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def raw_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient at the raw product for a gradient at the logits, both [..., V]."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient


def working_dtype(values: Tensor) -> torch.dtype:
    """fp32 from the logits on, fp64 where the input has it."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
