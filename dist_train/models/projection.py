"""The target's head and embedding on fewer dimensions, for a drafter to begin with.

h are the target's final hidden states, W its head. A drafter that keeps d directions of h makes an error e of the
logits, which to second order costs KL(q, p) = Var_q(e) / 2. With the mean over states of what q weighs the head by,
G = E[Cov_q(W_x)], and C = E[h h'], the directions that cost least are the first d eigenvectors U of C^1/2 G C^1/2
(Eckart and Young, 1936). A drafter has them where its head is W C^1/2 U and its final hidden states are U' C^-1/2 h,
whose numbers have a mean square of 1, as those after an RMSNorm. W is centred over the vocabulary first: softmax does
not see what is added to all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.losses import Head

_ROWS = 512  # of logits alive at once, and with 64 times as many of a head in fp64
_RIDGE = 1e-6  # share of the mean eigenvalue of C that each gets, so that all have an inverse
_MOST_STATES = 16_384  # whose distributions are looked at


@dataclass(frozen=True)
class Projection:
    """`head` [V, d] for a drafter, and `states` [d, E], which give its final hidden states from the target's; fp32.

    `costs` [d]: what a squared error of each number of a final hidden state costs, twice the KL divergence.
    """

    head: Tensor
    states: Tensor
    costs: Tensor

    def weights(self, power: float = 0.5) -> Tensor:
        """Costs [d] to a power, with a mean of 1, for a regression on the states.

        With 1 its loss is the KL divergence to second order, of which a few numbers have nearly all; the root, found by
        trial (tests/benchmarks/recipe.py), lets the others be learned, too.
        """
        weights = self.costs.clamp_min(0) ** power
        return weights / weights.mean()


@dataclass(frozen=True)
class Geometry:
    """What a target's states and distributions weigh directions by, each [E, E] in fp64.

    `moment`: C, with what keeps it invertible; `fisher`: G; `chances` [V]: the mean of q, how often a token comes.
    """

    moment: Tensor
    fisher: Tensor
    chances: Tensor


@torch.no_grad()
def measure(head: Head, states: Sequence[Tensor]) -> Geometry:
    """From the states [N, E] of all tensors. Raises ValueError where there are none."""
    rows = sum(map(len, states))
    if not rows:
        raise ValueError("no hidden states")
    wide = head.weight.shape[1]
    moment, outer = (torch.zeros(wide, wide, dtype=torch.float64, device=head.weight.device) for _ in range(2))
    for part in states:
        moment += part.double().T @ part.double()
    moment /= rows
    chances = torch.zeros(len(head.weight), dtype=torch.float64, device=head.weight.device)
    some = torch.cat([part[:: -(-rows // _MOST_STATES)] for part in states])
    for part in some.split(_ROWS):
        q = head.logits(part).softmax(-1)
        means = (q.to(head.weight.dtype) @ head.weight).double()
        chances += q.sum(0, dtype=torch.float64)
        outer += means.T @ means
    fisher = _gram(head.weight, chances) - outer
    ridge = torch.eye(wide, dtype=torch.float64, device=moment.device) * (_RIDGE * moment.trace() / wide)
    return Geometry(moment + ridge, fisher / len(some), chances / len(some))


@torch.no_grad()
def project_head(head: Head, geometry: Geometry, width: int) -> Projection:
    """The head of `width` dimensions that loses least; exact where `width` is E.

    A bias and a soft cap stay out of it: a drafter's head has neither.
    """
    values, vectors = torch.linalg.eigh(geometry.moment)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inverse = vectors * values.clamp_min(values[-1] * 1e-12).rsqrt() @ vectors.T
    costs, basis = torch.linalg.eigh(root @ geometry.fisher @ root)
    costs, basis = costs[-width:].flip(0), basis[:, -width:].flip(1)
    narrow = _projected(head.weight, (root @ basis) * head.scale)
    return Projection(narrow.float(), (basis.T @ inverse).float(), (costs * head.scale**2).float())


@torch.no_grad()
def project_embedding(weight: Tensor, chances: Tensor, width: int, size: float) -> Tensor:
    """The principal components [V, width] of an embedding [V, E], scaled to a root mean square of `size`; fp32.

    Tokens count by how often they come, `chances` [V], and as much again all alike.
    """
    by = (chances + 1 / len(weight)) / 2
    mean = (by.to(weight.dtype) @ weight).double()
    _, basis = torch.linalg.eigh(_gram(weight, by) - mean.outer(mean))
    projected = _projected(weight, basis[:, -width:].flip(1))
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


def _projected(weight: Tensor, directions: Tensor) -> Tensor:
    """Rows [V, E], centred, times directions [E, d]; fp64, without a copy of all rows."""
    mean = weight.mean(0, dtype=torch.float64)
    return torch.cat([(rows.double() - mean) @ directions for rows in weight.split(64 * _ROWS)])


def _gram(weight: Tensor, by: Tensor | None = None) -> Tensor:
    """W'W [E, E], or W' diag(by) W, in fp64, without a copy of W."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    by = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if by is None else by
    for rows, counts in zip(weight.split(64 * _ROWS), by.split(64 * _ROWS), strict=True):
        wide = rows.double()
        total += wide.T @ (wide * counts[:, None])
    return total
