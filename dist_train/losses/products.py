"""The matrix products of a head: logits, and the gradients of hidden states and weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the vocabulary, at once, where a product has to be converted first.
_SLICE = 4096


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`values @ weight.T + bias`, [R, V] from [R, D] and [V, D], outside of the autograd graph.

    On a CPU fp32 goes to oneDNN, as Inductor's own products do: torch.mm calls MKL, which was half as fast on AMD.
    """
    if values.device.type == "cpu" and values.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
        return product
    return F.linear(values, weight, bias)


def linear_into(space: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by torch.mm, into `space` [R, V], which is returned."""
    if bias is None:
        return torch.mm(values, weight.T, out=space)
    return torch.addmm(bias, values, weight.T, out=space)


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
