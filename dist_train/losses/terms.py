"""The divergences: which there are, their options, and for each the value and its closed-form logit gradient.

Notation: q target, p drafter, both [N, V]; sums over the vocabulary are exact. Every gradient is with respect to the
drafter's logits z (after its temperature), p = softmax(z). For a loss f(p) with g = df/dp it is p * (g - sum(p * g)).
Each is a new tensor that the caller may change. The forms are chosen so that fp32 keeps its digits where drafter and
target nearly agree and where they exclude each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_train.losses.distributions import LOWEST, Distributions


@dataclass(frozen=True)
class Options:
    """What the losses can be told.

    `normalize`, `clamp` (least sigma) and `batch_mu` (mean reward of the batch, where the caller knows it) are for
    tvdpp; `beta` is the target's weight in jsd's mixture; `decay` turns lk into the hybrid; the temperatures divide
    the logits. `z_loss` is the weight of logsumexp(z)^2, which is added to whatever is named. `vocab_size`: columns
    from there on are padding on either side, and treated as if they were not there.
    """

    normalize: Literal["batch", "position"] = "position"
    clamp: float = 1e-6
    batch_mu: Tensor | float | None = None
    beta: float = 0.5
    decay: float | None = None
    drafter_temperature: float = 1.0
    target_temperature: float = 1.0
    z_loss: float = 0.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no loss knows."""
        if self.normalize not in ("batch", "position"):
            raise ValueError(f"normalize {self.normalize!r}; there are batch and position")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta {self.beta}: a weight between 0 and 1")
        for name in ("clamp", "drafter_temperature", "target_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: above 0")


Term = Callable[[Distributions, Options], tuple[Tensor, Tensor]]


def parse(name: str | Mapping[str, float]) -> dict[str, float]:
    """Loss names and weights. Raises ValueError for a name that is none, and where none is named."""
    terms = {name: 1.0} if isinstance(name, str) else dict(name)
    if not terms:
        raise ValueError("no loss is named")
    for term in terms:
        if term not in NAMES:
            raise ValueError(f"no loss {term!r}; there are {', '.join(NAMES)}")
    return terms


def needs_target(terms: Mapping[str, float]) -> bool:
    """Whether any of the losses compares with the target."""
    return any(term != "ce" for term in terms)


def kld(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Forward KL, sum q log(q/p); gradient p - q."""
    ratio = (d.target.shifted - d.drafter.shifted).mul_(d.q)
    return unbounded(d.row_sum(ratio) + d.drafter.log_sum - d.target.log_sum), d.p - d.q


def rkl(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Reverse KL, k = sum p log(p/q); gradient p * (log(p/q) - k).

    Both logarithms are counted from the drafter's likeliest token: a constant drops out of the gradient, and where the
    target excludes what the drafter says, the ratio is so large that the differences that matter would be rounded off.
    """
    origin = d.target.log_p_of(d.drafter.top)
    ratio = d.drafter.shifted - d.target.log_p(origin)
    mean = d.row_sum(d.p * ratio)
    return unbounded(mean - d.drafter.log_sum - origin), ratio.sub_(mean.to(ratio.dtype)[:, None]).mul_(d.p)


def jsd(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon: beta KL(q|m) + (1-beta) KL(p|m), m = beta q + (1-beta) p (Agarwal et al., 2024).

    The derivative of the mixture cancels, which leaves g = (1-beta) log(p/m). The logarithm is counted from the
    drafter's likeliest token, as in rkl.
    """
    beta = options.beta
    target_side = d.row_sum(_log_share(d.q, d.p, 1 - beta).mul_(d.q))
    ratio = _log_share(d.p, d.q, beta)
    origin = ratio.gather(1, d.drafter.top)
    mean = d.row_sum(ratio.sub_(origin) * d.p)
    value = beta * target_side + (1 - beta) * (mean + origin[:, 0].double())
    return value, ratio.sub_(mean.to(ratio.dtype)[:, None]).mul_(d.p).mul_(1 - beta)


def _log_share(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(a / m), m = (1 - weight) a + weight b, [N, V]; finite where both are 0."""
    return (b / a.clamp_min(torch.finfo(a.dtype).tiny)).sub_(1).mul_(weight).log1p_().neg_()


def tvd(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Total variation, 1/2 sum |p - q| = 1 - sum min(p, q); gradient -p * (r - mu), r = 1[q > p], mu = sum p r."""
    return d.tvd, _tvd_gradient(d, torch.ones_like(d.mu))


def _tvd_gradient(d: Distributions, scale: Tensor) -> Tensor:
    """TVD's gradient times `scale` [N]: p (1 - r) mu - p r (1 - mu)."""
    against, towards = ((scale * side).to(d.p.dtype)[:, None] for side in (d.mu, d.one_minus_mu))
    return (d.unrewarded * against).addcmul_(d.rewarded, towards, value=-1)


def tvdpp(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """TVD++ (Goel et al., 2024): total variation as a policy gradient with normalised advantages.

    Minimising TVD(p, q) is maximising E_{x~p}[r(x)] with the reward r(x) = 1[q(x) > p(x)] held fixed:
        grad TVD = E_{x~p}[grad log p(x) * (-r(x))].
    TVD++ puts the advantage (r - mu) / sigma in place of r. The expectation here is exact, so mu drops out of it
    (E_p[grad log p] = 0), and with grad_z log p(x) = 1_x - p the gradient at logit j is
        -p_j (r_j - mu_n) / sigma,  mu_n = sum_j p_j r_j:  TVD's gradient over sigma.
    What remains of TVD++ is where sigma is taken:
        position: sigma_n^2 = mu_n (1 - mu_n), the reward's variance at that position: positions at which drafter and
                  target nearly agree or nearly exclude each other weigh more than in TVD;
        batch:    sigma^2 = m (1 - m), m = mean of mu_n over the global batch: one scale for all, which Adam cancels,
                  save for its change over time and its weight against other terms of a sum.
    The value is TVD / sigma with sigma held fixed. `clamp` only guards 0/0: the gradient is bounded by 1/2 anyway.
    """
    scale = (1 / advantage_deviation(d.mu, d.one_minus_mu, options)).expand_as(d.mu)
    return d.tvd * scale, _tvd_gradient(d, scale)


def advantage_deviation(mu: Tensor, one_minus_mu: Tensor, options: Options) -> Tensor:
    """TVD++'s sigma from mu and 1 - mu [N], fp64: [N] per position, a scalar for the batch."""
    if options.normalize == "position":
        variance = mu * one_minus_mu
    else:
        mean = mu.mean() if options.batch_mu is None else torch.as_tensor(options.batch_mu).to(mu)
        variance = mean * (1 - mean)
    return torch.sqrt(variance.clamp_min(options.clamp**2))  # rounding can put the mean above 1


def lk(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """-log a, a = acceptance = sum min(p, q); with `decay` the hybrid w KL + (1-w)(1-a).

    The gradient is TVD's over a. With s = min(p, q) / a, itself a softmax, of the lesser log-probability, it is
    -(r s - p sum(r s)), which stays exact where a is too small for a floating-point number.
    w = exp(-decay * a), held fixed: KL while the two are far apart, acceptance itself once they are close.
    """
    if options.decay is not None:
        w = torch.exp(-options.decay * d.acceptance)
        kl, kl_gradient = kld(d, options)
        gradient = kl_gradient.mul_(w.to(d.p.dtype)[:, None]).add_(_tvd_gradient(d, 1 - w))
        return w * kl + (1 - w) * d.tvd, gradient
    # Logarithms are counted from the largest of min(p, q), which may be as low as -1e4: first roughly, then exactly.
    zero = torch.zeros_like(d.mu)
    origin = torch.minimum(d.drafter.log_p(zero), d.target.log_p(zero)).amax(-1).double()
    log_p, log_q = d.drafter.log_p(origin), d.target.log_p(origin)
    rewarded = (log_q - log_p).sign_().clamp_(min=0)
    lesser = torch.minimum(log_p, log_q).exp_()
    total = d.row_total(lesser)
    total.clamp_(min=torch.finfo(lesser.dtype).tiny)  # nothing in common: the loss is inf, its gradient 0
    rewarded.mul_(lesser.div_(total.to(lesser.dtype)[:, None]))
    gradient = (d.p * d.row_sum(rewarded).to(d.p.dtype)[:, None]).sub_(rewarded)
    return unbounded(-origin - total.log()), gradient


def ce(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels, -log p[label]; gradient p - onehot(label)."""
    if d.labels is None:
        raise ValueError("ce needs labels")
    labels = d.labels[:, None]
    if d.traced:  # what is scattered would be written to memory twice
        gradient = d.p - (torch.arange(d.p.shape[1], device=labels.device) == labels).to(d.p.dtype)
    else:
        gradient = d.p.clone()
        gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=d.p.dtype))
    return unbounded(d.drafter.log_sum - d.drafter.shifted.gather(1, labels)[:, 0].double()), gradient


def z_loss(d: Distributions, options: Options) -> tuple[Tensor, Tensor]:
    """logsumexp(z)^2, which keeps logits from drifting (Chowdhery et al., 2022, PaLM); gradient 2 logsumexp(z) p."""
    log_sum = d.drafter.largest + d.drafter.log_sum
    return log_sum**2, d.p * (2 * log_sum).to(d.p.dtype)[:, None]


TERMS: dict[str, Term] = {"kld": kld, "rkl": rkl, "jsd": jsd, "tvd": tvd, "tvdpp": tvdpp, "lk": lk, "ce": ce}
NAMES = tuple(TERMS)


def unbounded(value: Tensor) -> Tensor:
    """Values [N] with inf where one side gives weight to a token that the other has masked out with -inf."""
    return value + torch.where(value > abs(LOWEST) ** 0.5, torch.inf, 0.0)
