"""The readable reference: losses of whole logit tensors, in float64, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.losses.distributions import LOWEST, Distributions
from dist_train.losses.head import working_dtype
from dist_train.losses.output import DivergenceOutput, make_output, statistics
from dist_train.losses.terms import Options, advantage_deviation, needs_target, parse, unbounded


def divergence(
    name: str | Mapping[str, float],
    drafter_logits: Tensor,
    target_logits: Tensor | None,
    mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    num_positions: int | None = None,
    **options: Any,
) -> DivergenceOutput:
    """A divergence, or a weighted sum of several (`{"ce": 0.1, "tvdpp": 0.9}`), of drafter from target.

    Logits [N, V] or [B, T, V]; `mask` and `labels` [N] or [B, T]. The reduction is the sum over unmasked positions
    divided by `num_positions`, which is their number in the whole global batch (None: those at hand); with none the
    loss is 0 with zero gradients. `options` are those of `terms.Options`. A logit of -inf takes an entry out of the
    vocabulary; the loss is inf where the other side's weight on it makes it so, and never nan. Everything is computed
    in fp64 and returned in fp32 (fp64 for fp64 logits). `linear_divergence` computes the same from hidden states, in
    chunks and in fp32. Raises ValueError for an unknown name, and for logits or labels that are missing.
    """
    terms, settings = parse(name), Options(**options)
    keep = slice(None) if mask is None else mask.reshape(-1).bool()
    z = _rows(drafter_logits, keep, settings) / settings.drafter_temperature
    if target_logits is None:
        if needs_target(terms):
            raise ValueError(f"{', '.join(terms)}: a divergence needs the target's logits")
        y = None
    else:
        y = _rows(target_logits.detach(), keep, settings) / settings.target_temperature
    kept_labels = None if labels is None else labels.reshape(-1)[keep]
    rows = torch.stack([weight * _value(term, z, y, kept_labels, settings) for term, weight in terms.items()]).sum(0)
    if settings.z_loss:
        rows = rows + settings.z_loss * z.logsumexp(-1) ** 2
    count = len(rows) if num_positions is None else num_positions
    sums = None if y is None else torch.stack(statistics(Distributions(z.detach(), y, None))).sum(1)
    return make_output((rows.sum() / max(count, 1)).to(working_dtype(drafter_logits)), sums, len(rows))


def _rows(logits: Tensor, keep: slice | Tensor, options: Options) -> Tensor:
    """The unmasked positions without the padding, [N, V], fp64."""
    flat = logits.reshape(-1, logits.shape[-1])[keep, : options.vocab_size]
    return _Floor.apply(flat.double())


class _Floor(torch.autograd.Function):
    """-inf as LOWEST; the gradient is passed on, as the closed forms have it, to masked entries too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clamp(min=LOWEST)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _value(term: str, z: Tensor, y: Tensor | None, labels: Tensor | None, options: Options) -> Tensor:
    """The loss at each position, [N], written so that autograd finds the gradient that `terms` gives in closed form."""
    log_p = torch.log_softmax(z, -1)
    if term == "ce" or y is None:
        if labels is None:
            raise ValueError("ce needs labels")
        return unbounded(-log_p.gather(1, labels[:, None])[:, 0])
    log_q = torch.log_softmax(y, -1)
    p, q = log_p.exp(), log_q.exp()
    reward = log_q > log_p  # false at a tie, where the gradient is 0
    acceptance = torch.where(reward, p, q).sum(-1)
    match term:
        case "kld":
            return unbounded((q * (log_q - log_p)).sum(-1))
        case "rkl":
            return unbounded((p * (log_p - log_q)).sum(-1))
        case "jsd":
            log_m = torch.log((options.beta * q + (1 - options.beta) * p).clamp_min(torch.finfo(p.dtype).tiny))
            target_side = (q * (log_q - log_m)).sum(-1)
            return options.beta * target_side + (1 - options.beta) * (p * (log_p - log_m)).sum(-1)
        case "tvd":
            return torch.where(reward, q - p, 0).sum(-1)
        case "tvdpp":
            mu, one_minus_mu = (p.detach() * reward).sum(-1), (p.detach() * ~reward).sum(-1)
            return torch.where(reward, q - p, 0).sum(-1) / advantage_deviation(mu, one_minus_mu, options)
        case _:
            if options.decay is None:
                return unbounded(-torch.where(reward, log_p, log_q).logsumexp(-1))
            weight = torch.exp(-options.decay * acceptance.detach())
            return weight * _value("kld", z, y, labels, options) + (1 - weight) * (1 - acceptance)
