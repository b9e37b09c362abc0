"""Rounding: how far fp32 and bf16 are from float64 closed forms that start from the same rounded logits.

With -s this prints the table of worst errors. An error is the norm of the difference over the norm of the reference,
for each position by itself, and where that norm is below 1e-2, over 1e-2.
"""

from __future__ import annotations

import pytest
import torch
from loss_regimes import CASES, closed_form, regimes, worst
from torch import Tensor

from dist_train.losses import divergence, linear_divergence

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def measured(
    path: str, name: str, z: Tensor, y: Tensor, labels: Tensor, options: dict, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Mean, and gradient of the sum [N, V]; the chunked head's weight is the logits, its hidden states unit vectors."""
    if device != "cpu":
        value, gradient = measured(path, name, z.to(device), y.to(device), labels.to(device), options)
        return value.cpu(), gradient.cpu()
    if path == "dense":
        z = z.clone().requires_grad_()
        output = divergence(name, z, y, labels=labels, **options)
        (gradient,) = torch.autograd.grad(output.loss * len(z), z)
        return output.loss.detach(), gradient
    # Zero times -inf is nan: what is masked out goes through the product as the lowest number.
    lowest = torch.finfo(z.dtype).min
    weight, target_weight = z.T.clamp_min(lowest).contiguous().requires_grad_(), y.T.clamp_min(lowest).contiguous()
    unit = torch.eye(len(z), dtype=z.dtype, device=z.device)
    output = linear_divergence(name, unit, weight, unit, target_weight, None, 4, labels=labels, **options)
    (gradient,) = torch.autograd.grad(output.loss * len(z), weight)
    return output.loss.detach(), gradient.T


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("path", ["dense", "chunked"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_and_gradients_are_the_closed_forms(path, dtype, device, capsys):
    table = {}
    for regime, (z, y) in regimes().items():
        z, y = z.to(dtype), y.to(dtype)
        labels = z.argmax(-1) if regime.startswith("masked") else torch.arange(len(z)) * 7
        for name, options in CASES:
            value, gradient = closed_form(name, z, y, labels, **options)
            if value.isinf().any():
                assert measured(path, name, z, y, labels, options, device)[0] == torch.inf
                continue  # the gradient's bounds are tested below
            if regime == "log-ratios of 1e-3" and dtype == torch.bfloat16:
                continue  # rounds to ties
            found_value, found_gradient = measured(path, name, z, y, labels, options, device)
            label = " ".join([name, *(f"{key}={option}" for key, option in options.items())])
            table[regime, label] = (worst(found_value[None], value.mean()[None]), worst(found_gradient, gradient))
    with capsys.disabled():
        print(f"\n{path}, {dtype}, {device}: worst relative error over {len(table)} cases, value and gradient")
        for label in dict.fromkeys(label for _, label in table):
            of_label = {regime: errors for (regime, other), errors in table.items() if other == label}
            regime_of = [max(of_label, key=lambda r, k=k: of_label[r][k]) for k in (0, 1)]
            print(f"  {label:24}" + "".join(f"{of_label[r][k]:10.1e}  {r:22}" for k, r in enumerate(regime_of)))
    assert all(error <= BOUNDS[dtype] for errors in table.values() for error in errors)
