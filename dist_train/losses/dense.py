"""The readable reference: losses of whole logit tensors, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.losses.head import working_dtype
from dist_train.losses.output import DivergenceOutput, make_output, statistics
from dist_train.losses.terms import Distributions, Options, advantage_deviation, needs_target, parse


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
    loss is 0 with zero gradients. `options` are those of `terms.Options`. From the logits on everything is fp32, or
    fp64 for fp64 logits. `linear_divergence` computes the same from hidden states, in chunks.
    """
    terms, settings = parse(name), Options(**options)
    vocab = drafter_logits.shape[-1]
    keep = slice(None) if mask is None else mask.reshape(-1).bool()
    z = drafter_logits.reshape(-1, vocab)[keep]
    z = z.to(working_dtype(z)) / settings.drafter_temperature
    if target_logits is None:
        if needs_target(terms):
            raise ValueError(f"{', '.join(terms)}: a divergence needs the target's logits")
        y = None
    else:
        y = target_logits.detach().reshape(-1, vocab)[keep].to(z.dtype) / settings.target_temperature
    d = Distributions(z, y, None if labels is None else labels.reshape(-1)[keep])
    rows = torch.stack([weight * _value(term, d, settings) for term, weight in terms.items()]).sum(0)
    count = len(rows) if num_positions is None else num_positions
    sums = None if target_logits is None else statistics(d)
    return make_output(rows.sum() / max(count, 1), sums, len(rows))


def _value(term: str, d: Distributions, options: Options) -> Tensor:
    """The loss at each position, [N], written so that autograd finds the gradient that `terms` gives in closed form."""
    if term == "ce":
        if d.labels is None:
            raise ValueError("ce needs labels")
        return -d.log_p.gather(1, d.labels[:, None])[:, 0]
    # Entries masked out of the vocabulary have probability 0 and log-probability -inf; 0 * -inf must be 0.
    log_p = d.log_p.masked_fill(d.p == 0, 0)
    log_q = d.log_q.masked_fill(d.q == 0, 0)
    acceptance = torch.where(d.q > d.p, d.p, d.q).sum(-1)  # at a tie the gradient is 0, as r = 1[q > p] says
    match term:
        case "kld":
            return (d.q * (log_q - d.log_p.masked_fill(d.q == 0, 0))).sum(-1)
        case "rkl":
            return (d.p * (log_p - d.log_q.masked_fill(d.p == 0, 0))).sum(-1)
        case "jsd":
            mixture = options.beta * d.q + (1 - options.beta) * d.p
            log_m = mixture.masked_fill(mixture == 0, 1).log()
            target_side = (d.q * (log_q - log_m)).sum(-1)
            return options.beta * target_side + (1 - options.beta) * (d.p * (log_p - log_m)).sum(-1)
        case "tvd":
            return 1 - acceptance
        case "tvdpp":
            return (1 - acceptance) / advantage_deviation(d.mu, options).detach()
        case _:
            if options.decay is None:
                return -torch.log(acceptance.clamp_min(torch.finfo(acceptance.dtype).tiny))
            weight = torch.exp(-options.decay * acceptance.detach())
            return weight * _value("kld", d, options) + (1 - weight) * (1 - acceptance)
