"""Values and gradients of the losses against float64 formulas written down once more, by hand, and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_train.losses import NAMES, Head, divergence, linear_divergence

ROWS, VOCAB = 12, 23


def by_hand(name: str, p: Tensor, q: Tensor, labels: Tensor, **options: object) -> Tensor:
    """One position's loss, [N], from the definitions, in plain float64 loops over the vocabulary."""
    found = []
    for pn, qn, label in zip(p.tolist(), q.tolist(), labels.tolist(), strict=True):
        pairs = list(zip(pn, qn, strict=True))
        tvd = 0.5 * sum(abs(a - b) for a, b in pairs)
        mu = sum(a for a, b in pairs if b > a)
        kld = sum(b * math.log(b / a) for a, b in pairs)
        beta = float(options.get("beta", 0.5))  # type: ignore[arg-type]
        mixed = [(1 - beta) * a + beta * b for a, b in pairs]
        match name:
            case "kld":
                value = kld
            case "rkl":
                value = sum(a * math.log(a / b) for a, b in pairs)
            case "jsd":
                value = sum(
                    beta * b * math.log(b / m) + (1 - beta) * a * math.log(a / m)
                    for (a, b), m in zip(pairs, mixed, strict=True)
                )
            case "tvd":
                value = tvd
            case "tvdpp":
                value = tvd / math.sqrt(mu * (1 - mu))
            case "lk" if "decay" in options:
                w = math.exp(-float(options["decay"]) * (1 - tvd))  # type: ignore[arg-type]
                value = w * kld + (1 - w) * tvd
            case "lk":
                value = -math.log(1 - tvd)
            case "ce":
                value = -math.log(pn[label])
        found.append(value)
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Drafter and target logits and labels, float64; no two probabilities of a position are near a tie."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=generator)
    y = torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=generator) * 1.5
    gap = (torch.softmax(z, -1) - torch.softmax(y, -1)).abs().min()
    assert gap > 1e-5
    return z.requires_grad_(), y, torch.randint(VOCAB, (ROWS,), generator=generator)


CASES = [(name, {}) for name in NAMES] + [("jsd", {"beta": 0.2}), ("lk", {"decay": 3.0})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_is_the_definitions(name, options, logits):
    z, y, labels = logits
    expected = by_hand(name, torch.softmax(z.detach(), -1), torch.softmax(y, -1), labels, **options).mean()
    found = divergence(name, z, y, labels=labels, **options)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("tvdpp", "lk")])
def test_gradient_is_the_central_difference(name, options, logits):
    z, y, labels = logits
    (found,) = torch.autograd.grad(divergence(name, z, y, labels=labels, **options).loss, z)
    step = 1e-6
    for row, column in ((0, 0), (3, 7), (11, 22), (5, 1)):
        moved = []
        for sign in (1, -1):
            there = z.detach().clone()
            there[row, column] += sign * step
            p, q = torch.softmax(there, -1), torch.softmax(y, -1)
            moved.append(by_hand(name, p, q, labels, **options).mean())
        assert found[row, column].item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).item(), abs=1e-8)


def policy_gradient(p: Tensor, q: Tensor, sigma: Tensor) -> Tensor:
    """E_{x~p}[grad_z log p(x) * (-(r(x) - mu) / sigma)], term by term over x, for each row: [N, V]."""
    reward = (q > p).double()
    mu = (p * reward).sum(-1)
    gradient = torch.zeros_like(p)
    for x in range(p.shape[1]):
        grad_log_p = -p.clone()
        grad_log_p[:, x] += 1
        advantage = -(reward[:, x] - mu) / sigma
        gradient += (p[:, x] * advantage)[:, None] * grad_log_p
    return gradient


@pytest.mark.parametrize("normalize", ["position", "batch"])
def test_tvdpp_is_the_policy_gradient_with_normalised_advantages(normalize, logits):
    z, y, _ = logits
    p, q = torch.softmax(z.detach(), -1), torch.softmax(y, -1)
    mu = (p * (q > p)).sum(-1)
    mean = mu if normalize == "position" else mu.mean().expand_as(mu)
    expected = policy_gradient(p, q, torch.sqrt(mean * (1 - mean))) / ROWS
    (found,) = torch.autograd.grad(divergence("tvdpp", z, y, normalize=normalize).loss, z)
    assert torch.allclose(found, expected, atol=1e-14)


def test_tvdpp_without_the_weight_p_is_another_gradient(logits):
    """A public look-alike uses -A/V as gradient of the logits; it must not pass for TVD++."""
    z, y, _ = logits
    p, q = torch.softmax(z.detach(), -1), torch.softmax(y, -1)
    reward = (q > p).double()
    mu = (p * reward).sum(-1, keepdim=True)
    look_alike = -(reward - mu) / torch.sqrt(mu * (1 - mu)) / VOCAB / ROWS
    (found,) = torch.autograd.grad(divergence("tvdpp", z, y).loss, z)
    assert torch.cosine_similarity(found.flatten(), look_alike.flatten(), 0) < 0.9


def test_batch_tvdpp_is_parallel_to_tvd(logits):
    z, y, _ = logits
    (tvd,) = torch.autograd.grad(divergence("tvd", z, y).loss, z)
    (tvdpp,) = torch.autograd.grad(divergence("tvdpp", z, y, normalize="batch").loss, z)
    assert torch.cosine_similarity(tvd.flatten(), tvdpp.flatten(), 0).item() == pytest.approx(1, abs=1e-12)


def test_acceptance_is_the_overlap(logits):
    z, y, _ = logits
    p, q = torch.softmax(z.detach(), -1), torch.softmax(y, -1)
    out = divergence("kld", z, y)
    assert out.acceptance.item() == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), rel=1e-12)
    assert out.acceptance.item() == pytest.approx(1 - divergence("tvd", z, y).loss.item(), rel=1e-12)
    greedy = torch.stack([q[n, p[n].argmax()] for n in range(ROWS)]).mean()
    assert out.greedy_acceptance.item() == pytest.approx(greedy.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_added_to_logits_changes_nothing(name, logits):
    z, y, labels = logits
    a = divergence(name, z, y, labels=labels).loss
    b = divergence(name, z + 7, y - 3, labels=labels).loss
    assert a.item() == pytest.approx(b.item(), rel=1e-10)


# -- reduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_halves_with_the_global_count_are_the_whole(name, logits):
    z, y, labels = logits
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1])
    whole = divergence(name, z, y, mask, labels=labels)
    halves = [
        divergence(name, z[part], y[part], mask[part], labels=labels[part], num_positions=int(mask.sum()))
        for part in (slice(0, 5), slice(5, ROWS))
    ]
    assert sum(half.loss.item() for half in halves) == pytest.approx(whole.loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunked", [False, True])
def test_all_masked_is_zero_with_zero_gradients(name, chunked, logits):
    z, y, labels = logits
    mask = torch.zeros(ROWS, dtype=torch.bool)
    if chunked:
        identity = torch.eye(VOCAB, dtype=torch.float64)
        loss = linear_divergence(name, z, identity, y, identity, mask, labels=labels).loss
    else:
        loss = divergence(name, z, y, mask, labels=labels).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0
    assert not gradient.any()


# -- the chunked head -------------------------------------------------------------------------------------------

MIXED = {"ce": 0.1, "tvdpp": 0.9}


@pytest.mark.parametrize("name", [*NAMES, MIXED], ids=str)
@pytest.mark.parametrize("options", [{}, {"normalize": "batch"}, {"drafter_temperature": 0.7, "target_temperature": 2}])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_chunked_head_equals_dense(name, options, chunk_size):
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight, bias = random(2, 9, 6).requires_grad_(), random(VOCAB, 6).requires_grad_(), random(VOCAB)
    bias.requires_grad_()
    target_hidden, target_weight = random(2, 9, 10), random(VOCAB, 10)
    drafter = Head(weight, bias, scale=0.8, softcap=5.0)
    target = Head(target_weight, scale=0.5, softcap=8.0)
    mask, labels = torch.rand(2, 9, generator=generator) > 0.3, torch.randint(VOCAB, (2, 9), generator=generator)
    inputs = (hidden, weight, bias)

    def logits(head: Head, states: Tensor) -> Tensor:
        raw = states @ head.weight.T
        raw = raw if head.bias is None else raw + head.bias
        return head.softcap * torch.tanh(raw * head.scale / head.softcap)

    dense = divergence(name, logits(drafter, hidden), logits(target, target_hidden), mask, labels=labels, **options)
    chunked = linear_divergence(
        name, hidden, drafter, target_hidden, target, mask, chunk_size, labels=labels, **options
    )
    assert chunked.loss.item() == pytest.approx(dense.loss.item(), rel=1e-12)
    for statistic in ("acceptance", "greedy_acceptance", "top1_agreement", "mu"):
        assert getattr(chunked, statistic).item() == pytest.approx(getattr(dense, statistic).item(), rel=1e-12)
    for found, expected in zip(
        torch.autograd.grad(3 * chunked.loss, inputs), torch.autograd.grad(3 * dense.loss, inputs), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_chunked_head_never_holds_all_logits():
    """No tensor of [N, V] is made, whatever its type: the largest seen is a chunk or a weight."""
    rows, vocab, width, chunk = 512, 1000, 8, 16
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    target_hidden, target_weight = torch.randn(rows, width), torch.randn(vocab, width)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            nonlocal largest
            out = function(*arguments, **(options or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    with Watch():
        labels = torch.zeros(rows, dtype=torch.long)
        out = linear_divergence(MIXED, hidden, weight, target_hidden, target_weight, None, chunk, labels=labels)
        out.loss.backward()
    assert largest <= chunk * vocab


# -- regimes that break kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["saturated", "identical", "masked vocabulary", "single position"])
def test_losses_stay_finite_and_gradients_bounded(name, dtype, regime):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(6, 50, generator=generator)
    y = torch.randn(6, 50, generator=generator)
    if regime == "saturated":
        z, y = (torch.where(torch.rand(6, 50, generator=generator) > 0.9, 1e4, -1e4) for _ in range(2))
    elif regime == "identical":
        y = z.clone()
    elif regime == "masked vocabulary":
        z[:, 40:] = y[:, 40:] = -torch.inf
    elif regime == "single position":
        z, y = z[:1], y[:1]
    z = z.to(dtype).requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.long)
    out = divergence(name, z, y.to(dtype), labels=labels)
    (gradient,) = torch.autograd.grad(out.loss, z)
    assert gradient.isfinite().all()
    saturated_ratio = regime == "saturated" and name in ("kld", "rkl", "ce")  # a ratio of 0 to 1: about 2e4
    assert out.loss.isfinite() or saturated_ratio
    if regime == "identical" and name != "ce":
        assert gradient.abs().max() < 1e-6
