"""Inputs at which losses break: ties, masked vocabulary, padding, and what is missing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_train.losses import NAMES, Head, divergence, linear_divergence

ROWS, VOCAB, WIDTH = 6, 50, 8
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked_columns(*columns: slice) -> Tensor:
    bias = torch.zeros(VOCAB)
    for column in columns:
        bias[column] = -torch.inf
    return bias


MASKED = {
    "in both": (masked_columns(slice(40, 50)), masked_columns(slice(40, 50))),
    "in the drafter": (masked_columns(slice(10, 20)), masked_columns()),
    "in the target": (masked_columns(), masked_columns(slice(10, 20))),
    "in either": (masked_columns(slice(10, 20), slice(30, 35)), masked_columns(slice(20, 35))),
    "all but one in the target": (masked_columns(), masked_columns(slice(1, 50))),
    "all but one in both": (masked_columns(slice(1, 50)), masked_columns(slice(1, 50))),
    "without anything in common": (masked_columns(slice(0, 25)), masked_columns(slice(25, 50))),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", MASKED)
@pytest.mark.parametrize("options", [{}, {"decay": 3.0}], ids=str)
def test_masked_vocabulary_never_gives_nan(name, dtype, where, options):
    """A loss is inf where one side excludes what the other says, as its definition has it; gradients stay numbers."""
    drafter_bias, target_bias = MASKED[where]
    hidden, weight = normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=3)
    target_hidden, target_weight = normal(ROWS, WIDTH, seed=4).to(dtype), normal(VOCAB, WIDTH, seed=5).to(dtype)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    drafter, target = Head(weight, drafter_bias.to(dtype)), Head(target_weight, target_bias.to(dtype))
    labels = torch.zeros(ROWS, dtype=torch.long)
    chunked = linear_divergence(name, hidden, drafter, target_hidden, target, None, 4, labels=labels, **options)
    dense = divergence(name, drafter.logits(hidden), target.logits(target_hidden), labels=labels, **options)
    drafter_excludes = bool((drafter_bias.isinf() & target_bias.isfinite()).any())
    target_excludes = bool((target_bias.isinf() & drafter_bias.isfinite()).any())
    hybrid = name == "lk" and bool(options)
    infinite = {
        "kld": drafter_excludes,
        "rkl": target_excludes,
        "ce": bool(drafter_bias[0].isinf()),
        "lk": drafter_excludes if hybrid else where == "without anything in common",
    }.get(name, False)
    for output in (chunked, dense):
        assert output.loss.isinf() if infinite else output.loss.isfinite()
        for gradient in torch.autograd.grad(output.loss, (hidden, weight)):
            assert gradient.isfinite().all()
        for statistic in ("acceptance", "tvd", "drafter_entropy", "target_entropy"):
            assert getattr(output, statistic).isfinite()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ce"])
@pytest.mark.parametrize("normalize", ["position", "batch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_ties_are_finite_and_bounded(name, normalize, dtype, chunked):
    """Half of the logits are equal, in one position all: p = q there, and TVD, TVD++ and LK have a kink."""
    z = normal(ROWS, VOCAB).to(dtype)
    y = torch.where(torch.arange(VOCAB) % 2 == 0, z, z.roll(2, -1))  # equal sums, so that equal logits are equal p, q
    y[0] = z[0]
    z.requires_grad_()
    identity = torch.eye(VOCAB, dtype=dtype)
    if chunked:
        loss = linear_divergence(name, z, identity, y, identity, normalize=normalize).loss
    else:
        loss = divergence(name, z, y, normalize=normalize).loss
    (gradient,) = torch.autograd.grad(loss * ROWS, z)
    assert loss.isfinite()
    assert loss >= 0
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1
    assert gradient[0].abs().max() < 1e-6


def test_identical_distributions_leave_only_the_clamp_of_sigma():
    z = normal(ROWS, VOCAB).requires_grad_()
    for clamp in (1e-6, 1e-2):
        loss = divergence("tvdpp", z, z.detach(), clamp=clamp).loss
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("clamp", [0.2, 0.4])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_clamp_is_the_least_sigma(clamp, chunked):
    """One token of two: mu = p(0) = 0.02, sigma = sqrt(0.02 * 0.98) = 0.14, below either clamp."""
    z, y = torch.tensor([[0.02, 0.98]]).log(), torch.tensor([[0.5, 0.5]]).log()
    identity = torch.eye(2)
    for least, sigma in ((clamp, clamp), (1e-6, math.sqrt(0.02 * 0.98))):
        if chunked:
            loss = linear_divergence("tvdpp", z, identity, y, identity, clamp=least).loss
        else:
            loss = divergence("tvdpp", z, y, clamp=least).loss
        assert loss.item() == pytest.approx(0.48 / sigma, rel=1e-5)


# -- statistics, z-loss, padding --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_statistics_are_the_definitions(chunked):
    p, q = [[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]], [[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]
    z, y = torch.tensor(p, dtype=torch.float64).log() + 3, torch.tensor(q, dtype=torch.float64).log() - 2
    identity = torch.eye(3, dtype=torch.float64)
    found = linear_divergence("kld", z, identity, y, identity) if chunked else divergence("kld", z, y)

    def entropy(rows: list[list[float]]) -> float:
        return -sum(x * math.log(x) for row in rows for x in row) / len(rows)

    expected = {
        "tvd": (0.6 + 0.25) / 2,
        "acceptance": (0.4 + 0.75) / 2,
        "greedy_acceptance": (0.1 + 0.25) / 2,
        "top1_agreement": 0,
        "mu": (0.3 + 0.25) / 2,
        "drafter_entropy": entropy(p),
        "target_entropy": entropy(q),
    }
    assert {name: getattr(found, name).item() for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunked", [False, True])
def test_z_loss_is_the_square_of_the_normaliser(chunked):
    z = (normal(ROWS, VOCAB).double() + 4).requires_grad_()
    labels = torch.arange(ROWS)
    identity = torch.eye(VOCAB, dtype=torch.float64)

    def loss(z_loss: float, logits: Tensor) -> Tensor:
        if chunked:
            return linear_divergence("ce", logits, identity, None, None, labels=labels, z_loss=z_loss).loss
        return divergence("ce", logits, None, labels=labels, z_loss=z_loss).loss

    added = loss(0.3, z) - loss(0.0, z)
    by_hand = [0.3 * math.log(sum(math.exp(x) for x in row)) ** 2 for row in z.tolist()]
    assert added.item() == pytest.approx(sum(by_hand) / ROWS, rel=1e-12)
    (gradient,) = torch.autograd.grad(added, z)
    step = 1e-5
    for row, column in ((0, 0), (3, 7), (5, 49)):
        moved = torch.zeros_like(z)
        moved[row, column] = step
        difference = [loss(0.3, z + s * moved) - loss(0.0, z + s * moved) for s in (1, -1)]
        assert gradient[row, column].item() == pytest.approx(
            (difference[0] - difference[1]).item() / 2 / step, rel=1e-6
        )


@pytest.mark.parametrize("name", NAMES)
def test_padding_columns_count_for_nothing(name):
    """Heads padded to different sizes, with rows of nan: as if they had never been there."""
    hidden, target_hidden = normal(ROWS, WIDTH).double(), normal(ROWS, WIDTH, seed=4).double()
    weight, target_weight = normal(VOCAB, WIDTH, seed=3).double(), normal(VOCAB, WIDTH, seed=5).double()
    bias = normal(VOCAB, seed=6).double()
    labels = torch.arange(ROWS)

    def padded(part: Tensor, rows: int) -> Tensor:
        return torch.cat([part, part.new_full((rows, *part.shape[1:]), torch.nan)])

    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    plain = linear_divergence(name, inputs[0], Head(inputs[1], inputs[2]), target_hidden, target_weight, labels=labels)
    expected = torch.autograd.grad(plain.loss, inputs)
    inputs = [x.requires_grad_() for x in (hidden.clone(), padded(weight, 14), padded(bias, 14))]
    drafter, target = Head(inputs[1], inputs[2]), Head(padded(target_weight, 30))
    with pytest.raises(ValueError, match=r"64 rows, the target's 80.*vocab_size"):
        linear_divergence(name, inputs[0], drafter, target_hidden, target, labels=labels)
    options = {"labels": labels, "vocab_size": VOCAB}
    chunked = linear_divergence(name, inputs[0], drafter, target_hidden, target, **options)
    dense = divergence(name, drafter.logits(inputs[0]), target.logits(target_hidden), **options)
    assert chunked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert dense.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    for found, reference in zip(torch.autograd.grad(chunked.loss, inputs), expected, strict=True):
        assert torch.allclose(found[: len(reference)], reference, rtol=1e-12, atol=1e-15)
        assert not found[len(reference) :].any()


# -- the chunked head's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, {"ce": 0.1, "tvdpp": 0.9}], ids=str)
def test_gradients_behind_the_head_are_those_of_its_rounded_logits(name, dtype):
    """Hidden states and weight in bf16 or fp32, target of another width: against float64 from the same logits."""
    hidden, weight = normal(40, 64).to(dtype).requires_grad_(), (normal(300, 64, seed=3) / 4).to(dtype).requires_grad_()
    target_hidden, target_weight = normal(40, 96, seed=4), normal(300, 96, seed=5) / 5
    labels = torch.arange(40)
    z = Head(weight).logits(hidden).detach().double().requires_grad_()
    reference = divergence(name, z, Head(target_weight).logits(target_hidden), labels=labels)
    (at_logits,) = torch.autograd.grad(reference.loss, z)
    expected = (at_logits @ weight.detach().double(), at_logits.T @ hidden.detach().double())
    found = linear_divergence(name, hidden, weight, target_hidden, target_weight, None, 40, labels=labels)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    for gradient, exact in zip(torch.autograd.grad(found.loss, (hidden, weight)), expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - exact).norm() <= bound * exact.norm()


def test_batch_tvdpp_by_itself_and_in_a_sum_is_the_same():
    """By itself it is TVD over a scale that is known at the end; in a sum the scale is measured first."""
    hidden, weight = normal(ROWS, WIDTH).double().requires_grad_(), normal(VOCAB, WIDTH, seed=3).double()
    others = (weight, normal(ROWS, WIDTH, seed=4).double(), normal(VOCAB, WIDTH, seed=5).double())
    losses = [
        linear_divergence(name, hidden, *others, None, 4, normalize="batch", labels=torch.arange(ROWS)).loss
        for name in ({"tvdpp": 0.5}, {"tvdpp": 0.5, "ce": 0.0})
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-16)


def test_gradients_are_handed_over_once():
    hidden, weight = normal(ROWS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH, seed=3)
    loss = linear_divergence("kld", hidden, weight, hidden, weight.roll(1, 0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        loss.backward()


def test_only_what_wants_a_gradient_gets_one():
    hidden, weight = normal(ROWS, WIDTH).requires_grad_(), normal(VOCAB, WIDTH, seed=3)
    linear_divergence("kld", hidden, weight, hidden.detach(), weight.roll(1, 0)).loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert linear_divergence("kld", hidden, weight, hidden, weight.roll(1, 0)).loss > 0


@pytest.mark.parametrize("name", ["kld", "tvdpp"])
def test_what_is_missing_is_said(name):
    z = normal(ROWS, VOCAB)
    with pytest.raises(ValueError, match="needs the target"):
        divergence(name, z, None)
    with pytest.raises(ValueError, match="needs the target"):
        linear_divergence(name, z, torch.eye(VOCAB), None, None)
    with pytest.raises(ValueError, match="ce needs labels"):
        linear_divergence("ce", z, torch.eye(VOCAB), None, None)
    with pytest.raises(ValueError, match="no loss 'kl'"):
        divergence("kl", z, z)
