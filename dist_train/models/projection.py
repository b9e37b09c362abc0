"""The target's head and embedding on fewer dimensions, for a drafter to begin with.

h are the target's final hidden states, C = E[h h'] their second moment, W its head. Among all maps of rank d, those
logits are nearest to W h, in the mean square over states and vocabulary, that keep the first d eigenvectors U of
C^1/2 W'W C^1/2 (Eckart and Young, 1936): W C^1/2 U U' C^-1/2 h. A drafter has them where its head is W C^1/2 U and its
final hidden states are U' C^-1/2 h, whose numbers have a mean square of 1, as those after an RMSNorm. W is centred
over the vocabulary first: softmax does not see what is added to all logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.losses import Head

_ROWS = 512  # of logits alive at once, and with 64 times as many of a head in fp64
_RIDGE = 1e-6  # share of the mean eigenvalue of C that each gets, so that all have an inverse


@dataclass(frozen=True)
class Projection:
    """`head` [V, d] for a drafter, and `states` [d, E], which give its final hidden states from the target's; fp32."""

    head: Tensor
    states: Tensor


def second_moment(states: Iterable[Tensor]) -> Tensor:
    """Mean of h h' over all rows h of the tensors [N, E], with what keeps it invertible; [E, E] in fp64."""
    total, rows = None, 0
    for part in states:
        wide = part.to(torch.float64)
        product = wide.T @ wide
        total, rows = product if total is None else total.add_(product), rows + len(part)
    if total is None or not rows:
        raise ValueError("no hidden states")
    moment = total / rows
    return moment + torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * (
        _RIDGE * moment.trace() / len(moment)
    )


@torch.no_grad()
def project_head(head: Head, moment: Tensor, width: int) -> Projection:
    """The best head of `width` dimensions for states of that second moment [E, E]; exact where `width` is E.

    A bias and a soft cap stay out of it: a drafter's head has neither.
    """
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inverse = vectors * values.clamp_min(values[-1] * 1e-12).rsqrt() @ vectors.T
    mean = head.weight.mean(0, dtype=torch.float64)
    gram = _gram(head.weight) - len(head.weight) * mean.outer(mean)
    _, basis = torch.linalg.eigh(root @ gram @ root)
    basis = basis[:, -width:].flip(1)
    narrow = (root @ basis) * head.scale
    projected = torch.cat([(rows.double() - mean) @ narrow for rows in head.weight.split(64 * _ROWS)])
    return Projection(projected.float(), (basis.T @ inverse).float())


@torch.no_grad()
def project_embedding(weight: Tensor, width: int, size: float) -> Tensor:
    """The principal components [V, width] of an embedding [V, E], scaled to a root mean square of `size`; fp32."""
    mean = weight.mean(0, dtype=torch.float64)
    _, basis = torch.linalg.eigh(_gram(weight) - len(weight) * mean.outer(mean))
    basis = basis[:, -width:].flip(1)
    projected = torch.cat([(rows.double() - mean) @ basis for rows in weight.split(64 * _ROWS)])
    return (projected * (size / projected.square().mean().sqrt().clamp_min(1e-12))).float()


@torch.no_grad()
def reach(head: Head, projection: Projection, states: Tensor) -> tuple[float, float]:
    """Acceptance and share of equal best tokens of a drafter that predicts the projected `states` [N, E] exactly.

    Acceptance is the mean of sum_x min(p, q), of the drafter's distribution p and the target's q at temperature 1.
    """
    accepted = equal = 0.0
    for rows in states.split(_ROWS):
        ours = rows.float() @ projection.states.T @ projection.head.T
        theirs = head.logits(rows)
        accepted += float(torch.minimum(ours.softmax(-1), theirs.softmax(-1)).sum())
        equal += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return accepted / len(states), equal / len(states)


def _gram(weight: Tensor) -> Tensor:
    """W'W [E, E] in fp64, without a copy of W."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(64 * _ROWS):
        wide = rows.double()
        total += wide.T @ wide
    return total
