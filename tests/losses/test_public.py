"""Against public implementations that run on a CPU, where they are installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_train.losses import linear_divergence

# Their beta runs from forward KL at 0 to reverse KL at 1.
BETAS = [("kld", 0.0), ("rkl", 1.0), ("jsd", 0.5), ("jsd", 0.2)]


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, D], drafter head [V, D], target's hidden states [N, E], its head [V, E]."""
    g = torch.Generator().manual_seed(7)
    shapes = (20, 16), (101, 16), (20, 24), (101, 24)
    hidden, weight, target_hidden, target_weight = (torch.randn(*shape, generator=g) * 0.6 for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), target_hidden, target_weight


def assert_same(loss: Tensor, name: str, beta: float, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ours = linear_divergence(name, *inputs, **({"beta": beta} if name == "jsd" else {})).loss
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    pairs = (torch.autograd.grad(one, inputs[:2]) for one in (ours, loss))
    for found, expected in zip(*pairs, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("name", "beta"), BETAS)
def test_trl_generalised_jsd(name, beta):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL, a comparison only, is not installed")
    hidden, weight, target_hidden, target_weight = inputs = problem()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(hidden @ weight.T, target_hidden @ target_weight.T, beta=beta)
    assert_same(theirs, name, beta, inputs)


@pytest.mark.parametrize(("name", "beta"), BETAS)
def test_liger_chunked_jsd(name, beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger, a comparison only, is not installed")
    inputs = problem()
    loss = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    theirs = loss(*inputs, torch.zeros(len(inputs[0]), dtype=torch.long))
    assert_same(theirs[0] if isinstance(theirs, tuple) else theirs, name, beta, inputs)
