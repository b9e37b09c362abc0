"""The divergences: which there are, their options, and for each the value and its closed-form logit gradient.

Notation: q target, p drafter, both [N, V]; sums over the vocabulary are exact. Every gradient is with respect to the
drafter's logits z (after its temperature), p = softmax(z). For a loss f(p) with g = df/dp it is p * (g - sum(p * g)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

NAMES = ("kld", "rkl", "jsd", "tvd", "tvdpp", "lk", "ce")


@dataclass(frozen=True)
class Options:
    """What the losses can be told.

    `normalize`, `clamp` (least sigma) and `batch_mu` (mean reward of the batch, where the caller knows it) are for
    tvdpp; `beta` is the target's weight in jsd's mixture; `decay` turns lk into the hybrid; the temperatures divide
    the logits.
    """

    normalize: Literal["batch", "position"] = "position"
    clamp: float = 1e-6
    batch_mu: Tensor | float | None = None
    beta: float = 0.5
    decay: float | None = None
    drafter_temperature: float = 1.0
    target_temperature: float = 1.0


class Distributions:
    """Both distributions at N positions and what the losses need of them, each taken when first asked for.

    Made from drafter logits `z` and target logits `y` (None where no loss compares), both [N, V], after their
    temperatures; `labels`: the tokens that came next, [N], or None.
    """

    def __init__(self, z: Tensor, y: Tensor | None, labels: Tensor | None) -> None:
        self._z, self._y, self.labels = z, y, labels
        self.has_target = y is not None

    @cached_property
    def log_p(self) -> Tensor:
        """The drafter's log-probabilities, [N, V]."""
        return torch.log_softmax(self._z, -1)

    @cached_property
    def p(self) -> Tensor:
        """The drafter's probabilities, [N, V]."""
        return self.log_p.exp()

    @cached_property
    def log_q(self) -> Tensor:
        """The target's log-probabilities, [N, V]."""
        if self._y is None:
            raise ValueError("a divergence needs the target")
        return torch.log_softmax(self._y, -1)

    @cached_property
    def q(self) -> Tensor:
        """The target's probabilities, [N, V]."""
        return self.log_q.exp()

    @cached_property
    def reward(self) -> Tensor:
        """TVD's reward r = 1[q > p], [N, V]."""
        return (self.q > self.p).to(self.p.dtype)

    @cached_property
    def mu(self) -> Tensor:
        """The drafter's expected reward, sum p r, [N]."""
        return (self.p * self.reward).sum(-1)

    @cached_property
    def acceptance(self) -> Tensor:
        """Probability that a drafted token is accepted, sum min(p, q), [N]."""
        return torch.minimum(self.p, self.q).sum(-1)


Term = Callable[[Distributions, Options], tuple[Tensor, Tensor]]


def parse(name: str | Mapping[str, float]) -> dict[str, float]:
    """Loss names and weights. Raises ValueError for a name that is none."""
    terms = {name: 1.0} if isinstance(name, str) else dict(name)
    for term in terms:
        if term not in NAMES:
            raise ValueError(f"no loss {term!r}; there are {', '.join(NAMES)}")
    return terms


def needs_target(terms: Mapping[str, float]) -> bool:
    """Whether any of the losses compares with the target."""
    return any(term != "ce" for term in terms)


def through_softmax(p: Tensor, g: Tensor) -> Tensor:
    """p * (g - sum(p * g)): from a gradient at the probabilities to one at the logits, [N, V]."""
    weighted = p * g
    return weighted - p * weighted.sum(-1, keepdim=True)


def _log_ratio(weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a - b where `weights` is above 0, else 0: a vocabulary entry masked on both sides gives -inf - -inf."""
    return torch.where(weights > 0, a - b, torch.zeros_like(a))


def kld(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Forward KL, sum q log(q/p); gradient p - q."""
    return (d.q * _log_ratio(d.q, d.log_q, d.log_p)).sum(-1), d.p - d.q


def rkl(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Reverse KL, k = sum p log(p/q); gradient p * (log(p/q) - k)."""
    ratio = _log_ratio(d.p, d.log_p, d.log_q)
    value = (d.p * ratio).sum(-1)
    return value, d.p * (ratio - value[:, None])


def jsd(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon: beta KL(q|m) + (1-beta) KL(p|m), m = beta q + (1-beta) p (Agarwal et al., 2024).

    The derivative of the mixture cancels, which leaves g = (1-beta) log(p/m).
    """
    beta = options.beta
    log_m = torch.log(beta * d.q + (1 - beta) * d.p)
    target_side = (d.q * _log_ratio(d.q, d.log_q, log_m)).sum(-1)
    ratio = _log_ratio(d.p, d.log_p, log_m)
    value = beta * target_side + (1 - beta) * (d.p * ratio).sum(-1)
    return value, through_softmax(d.p, (1 - beta) * ratio)


def tvd(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Total variation, 1/2 sum |p - q| = 1 - sum min(p, q); gradient -p * (r - mu), r = 1[q > p], mu = sum p r."""
    return 1 - d.acceptance, -d.p * (d.reward - d.mu[:, None])


def tvdpp(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """TVD++ (Goel et al., 2024): total variation as a policy gradient with normalised advantages.

    Minimising TVD(p, q) is maximising the expected reward E_{x~p}[r(x)] with r(x) = 1[q(x) > p(x)] held fixed:
        grad TVD = -sum_x p(x) r(x) grad log p(x) = E_{x~p}[grad log p(x) * (-r(x))].
    Variance reduction puts the advantage (r - mu) / sigma in place of r:
        grad TVD++ = E_{x~p}[grad log p(x) * (-(r(x) - mu) / sigma)].
    Summed exactly over the vocabulary the baseline mu drops out (E_p[grad log p] = 0), and with
    grad_z log p(x) = 1_x - p the gradient at logit j is  -p_j (r_j - mu_n) / sigma,  mu_n = sum_j p_j r_j:
    TVD's gradient over sigma. What remains of TVD++ is where sigma is taken:
        position: sigma_n^2 = mu_n (1 - mu_n), the reward's own variance at that position: positions at which drafter
                  and target nearly agree or nearly exclude each other weigh more than in TVD;
        batch:    sigma^2 = m (1 - m), m = mean of mu_n over the global batch: one scale for all, which Adam cancels,
                  save for its change over time and its weight against other terms of a sum.
    The value is TVD / sigma with sigma held fixed. `clamp` only guards 0/0: the gradient is bounded by 1/2 anyway.
    """
    value, gradient = tvd(d, options)
    sigma = advantage_deviation(d.mu, options)
    return value / sigma, gradient / (sigma[:, None] if sigma.ndim else sigma)


def advantage_deviation(mu: Tensor, options: Options) -> Tensor:
    """TVD++'s sigma: [N] per position, a scalar for the batch."""
    if options.normalize == "position":
        mean = mu
    elif options.batch_mu is not None:
        mean = torch.as_tensor(options.batch_mu, dtype=mu.dtype, device=mu.device)
    else:
        mean = mu.mean()
    return torch.sqrt((mean * (1 - mean)).clamp_min(options.clamp**2))  # rounding can put the mean above 1


def lk(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """-log(acceptance), gradient TVD's over acceptance; with `decay` the hybrid w KL + (1-w)(1-acceptance).

    w = exp(-decay * acceptance), held fixed: KL while the two are far apart, acceptance itself once they are close.
    """
    distance, gradient = tvd(d, options)
    if options.decay is None:
        floor = d.acceptance.clamp_min(torch.finfo(d.acceptance.dtype).tiny)
        return -torch.log(floor), gradient / floor[:, None]
    w = torch.exp(-options.decay * d.acceptance)
    kl, kl_gradient = kld(d, options)
    return w * kl + (1 - w) * distance, w[:, None] * kl_gradient + (1 - w)[:, None] * gradient


def ce(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels, -log p[label]; gradient p - onehot(label)."""
    if d.labels is None:
        raise ValueError("ce needs labels")
    labels = d.labels[:, None]
    gradient = d.p.clone()
    gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=d.p.dtype))
    return -d.log_p.gather(1, labels)[:, 0], gradient


TERMS: dict[str, Term] = {"kld": kld, "rkl": rkl, "jsd": jsd, "tvd": tvd, "tvdpp": tvdpp, "lk": lk, "ce": ce}
