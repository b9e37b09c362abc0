"""The matrix products of a head: logits, and the gradients of hidden states and weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the vocabulary, at once, where a product is made in parts: what is copied or converted is still in a cache.
_SLICE = 4096


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`values @ weight.T + bias`, [R, V] from [R, D] and [V, D], outside of the autograd graph.

    On a CPU fp32 goes to oneDNN, as Inductor's own products do: torch.mm calls MKL, which was half as fast on AMD.
    """
    if _by_onednn(values):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
        return product
    return F.linear(values, weight, bias)


def linear_into(space: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, *, fast: bool) -> Tensor:
    """The same into `space` [R, V], which is returned; `fast`: as `linear` does it, else by torch.mm.

    What a CPU's allocator is given back in pieces as large as a chunk it does not find again: RSS would grow.
    """
    if fast and _by_onednn(values):
        biases = [None] * len(weight) if bias is None else bias.split(_SLICE)
        for part, rows, shift in zip(space.split(_SLICE, dim=1), weight.split(_SLICE), biases, strict=False):
            part.copy_(linear(values, rows, shift))
        return space
    if bias is None:
        return torch.mm(values, weight.T, out=space)
    return torch.addmm(bias, values, weight.T, out=space)


def _by_onednn(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """`total += gradient.T @ hidden`, [V, D] from [R, V] and [R, D], rounded to nothing below the total's precision."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    elif gradient.device.type == "cuda":
        total += torch.mm(gradient.T, hidden, out_dtype=total.dtype)
    else:
        wide = hidden.to(total.dtype)
        for part, columns in zip(total.split(_SLICE), gradient.split(_SLICE, dim=1), strict=True):
            part.addmm_(columns.T.to(total.dtype), wide)
