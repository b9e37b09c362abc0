"""Closed forms of the losses in float64, and logits at which fp32 and bf16 lose digits."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.losses import NAMES

CASES = [
    *((name, {}) for name in NAMES),
    ("jsd", {"beta": 0.1}),
    ("tvdpp", {"normalize": "batch"}),
    ("lk", {"decay": 3.0}),
    ("kld", {"z_loss": 1e-2}),
]
ROWS = 6


# -- the reference ----------------------------------------------------------------------------------------------


def closed_form(name: str, z: Tensor, y: Tensor, labels: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient at the drafter's logits [N, V], written out in float64."""
    z, y = z.double(), y.double()
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
    p, q = log_p.exp(), log_q.exp()

    def expected(weights: Tensor, values: Tensor) -> Tensor:
        return torch.where(weights > 0, weights * values, 0).sum(-1)

    r = (log_q > log_p).double()
    mu = (p * r).sum(-1, keepdim=True)
    away = (p * (1 - r)).sum(-1, keepdim=True)  # 1 - mu
    tvd, tvd_gradient = 0.5 * (p - q).abs().sum(-1), p * (1 - r) * mu - p * r * away
    kld, kld_gradient = expected(q, log_q - log_p), p - q
    match name:
        case "kld":
            value, gradient = kld, kld_gradient
        case "rkl":
            value = expected(p, log_p - log_q)
            gradient = torch.where(p > 0, p * (log_p - log_q - value[:, None]), 0)
        case "jsd":
            beta = options.get("beta", 0.5)
            log_m = torch.log(beta * q + (1 - beta) * p)
            to_drafter = expected(p, log_p - log_m)
            value = beta * expected(q, log_q - log_m) + (1 - beta) * to_drafter
            gradient = (1 - beta) * torch.where(p > 0, p * (log_p - log_m - to_drafter[:, None]), 0)
        case "tvd":
            value, gradient = tvd, tvd_gradient
        case "tvdpp":
            variance = mu * away
            if options.get("normalize") == "batch":
                variance = (mu.mean() * (1 - mu.mean())).expand_as(mu)
            sigma = variance.sqrt().clamp_min(1e-6)
            value, gradient = tvd / sigma[:, 0], tvd_gradient / sigma
        case "lk" if "decay" in options:
            w = torch.exp(-options["decay"] * (1 - tvd))
            value = w * kld + (1 - w) * tvd
            gradient = w[:, None] * kld_gradient + (1 - w)[:, None] * tvd_gradient
        case "lk":
            log_lesser = torch.minimum(log_p, log_q)
            log_acceptance = log_lesser.logsumexp(-1, keepdim=True)
            share = torch.exp(log_lesser - log_acceptance) * r  # p r / acceptance
            value, gradient = -log_acceptance[:, 0], p * share.sum(-1, keepdim=True) - share
        case "ce":
            value = -log_p.gather(1, labels[:, None])[:, 0]
            gradient = p - torch.nn.functional.one_hot(labels, z.shape[1])
    if weight := options.get("z_loss"):
        log_sum = z.logsumexp(-1)
        value = value + weight * log_sum**2
        gradient = gradient + 2 * weight * log_sum[:, None] * p
    return value, gradient


# -- the regimes ------------------------------------------------------------------------------------------------


def regimes() -> dict[str, tuple[Tensor, Tensor]]:
    """Drafter and target logits [N, V] of each regime; ties, where gradients jump, are tested apart."""
    g = torch.Generator().manual_seed(5)

    def random(rows: int = ROWS, vocab: int = 1000, scale: float = 2.0) -> Tensor:
        return torch.randn(rows, vocab, generator=g) * scale

    def near(z: Tensor, distance: float) -> Tensor:
        """Log-probabilities between one and two distances off, above and below in turn: no tie."""
        side = torch.tensor([1.0, -1.0]).repeat(z.shape[1] // 2)
        return z + distance * side * (1 + torch.rand(z.shape, generator=g))

    def saturated() -> Tensor:
        return torch.where(torch.rand(ROWS, 1000, generator=g) > 0.99, 1e4, -1e4) + random(scale=100.0)

    one_hot = torch.full((ROWS, 1000), -torch.inf)
    one_hot[torch.arange(ROWS), torch.arange(ROWS) * 7] = 0
    z, y = random(), random()
    masked_z, masked_y = random(), random()
    masked_z[:, 300:] = masked_y[:, 300:] = -torch.inf
    only_target = masked_z.clone()
    only_target[:, :100] = -torch.inf
    return {
        "random": (z, y),
        "peaked": (random(scale=9), random(scale=9)),
        "flat against peaked": (random(scale=0.1), random(scale=9)),
        "shifted by 300": (z + 300, y - 300),
        "log-ratios of 0.1": (z, near(z, 0.1)),
        "log-ratios of 1e-3": (z, near(z, 1e-3)),
        "identical": (z, z.clone()),
        "saturated, 1e4": (saturated(), saturated()),
        "saturated apart": (10 * z - 1e4 * (torch.arange(1000) < 500), 10 * y - 1e4 * (torch.arange(1000) >= 500)),
        "one-hot target": (random(), one_hot),
        "one-hot both": (one_hot.clone(), one_hot),
        "masked in both": (masked_z, masked_y),
        "masked in target": (random(), only_target),
        "masked in drafter": (only_target.clone(), random()),
        "one position": (z[:1], y[:1]),
        "vocabulary 152,064": (random(3, 152_064), random(3, 152_064)),
        "152,064, peaked": (random(3, 152_064, 8.0), random(3, 152_064, 8.0)),
    }


def worst(found: Tensor, reference: Tensor) -> float:
    """The largest relative error of rows."""
    found, reference = found.double().reshape(len(found), -1), reference.reshape(len(reference), -1)
    return float(((found - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-2)).max())
