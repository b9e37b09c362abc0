"""Which drafts the target keeps, and what it says after them: the rule that makes speculative decoding lossless."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.decoding.sampling import draw


def verify_greedy(drafts: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """How many `drafts` [B, gamma] are the target's likeliest, `best` [B, gamma + 1]; and its own token then, [B]."""
    accepted = (drafts == best[:, :-1]).long().cumprod(-1).sum(-1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def verify(drafts: Tensor, p: Tensor | None, q: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row accepts [B], and the token drawn after them [B].

    A draft x is accepted with probability min(1, q(x)/p(x)); the first rejected one is replaced by a draw from
    max(q - p, 0), and if all are accepted one more comes from q. `drafts` [B, gamma]; `p` [B, gamma + 1, V], the last
    of which is 0, or None where each draft was its drafter's certain choice; `q` [B, gamma + 1, V]; `chances`
    [B, gamma + 1] in [0, 1).
    """
    rows, gamma = drafts.shape
    row = torch.arange(rows, device=q.device)
    if gamma == 0:
        return torch.zeros_like(row), draw(q[:, 0], chances[:, 0])
    chosen = drafts[..., None]
    q_drafts = q[:, :-1].gather(-1, chosen)[..., 0]
    p_drafts = torch.ones_like(q_drafts) if p is None else p[:, :-1].gather(-1, chosen)[..., 0]
    accepted = (chances[:, :-1] * p_drafts < q_drafts).long().cumprod(-1).sum(-1)
    q_next = q[row, accepted]
    if p is not None:
        residual = (q_next - p[row, accepted]).clamp_min_(0)
    else:
        rejected = drafts.gather(1, accepted.clamp_max(gamma - 1)[:, None])
        kept = torch.where(accepted[:, None] < gamma, 0, q_next.gather(1, rejected))
        residual = q_next.scatter(1, rejected, kept)
    # Rounding can leave nothing of a rejected token's residual; its limit is then q.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q_next)
    return accepted, draw(residual, chances[:, -1])
