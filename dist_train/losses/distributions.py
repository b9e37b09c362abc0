"""Softmax in fp32 without losing the digits that a difference of two distributions needs.

What is wide, [N, V], stays in the logits' precision; fp64 is for columns, [N]. The same code runs eagerly and is traced
for torch.compile (`traced`), which wants other forms in a few places: eagerly a pass over memory is what costs, and
there passes are free while what is fused cannot be written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOWEST = -1e30
"""What a logit of -inf counts as: its probability is 0 to the last bit, and 0 times its logarithm is 0, not nan."""


@dataclass(frozen=True)
class Softmax:
    """A distribution in parts that round off less than its logarithm does.

    `logits` [N, V] as they came; `shifted` [N, V]: less the row's largest, -inf as LOWEST; `p` [N, V]; `top` [N, 1]:
    the likeliest token; `largest`, `log_sum` [N], fp64: log p = logits - largest - log_sum.
    """

    logits: Tensor
    shifted: Tensor
    p: Tensor
    top: Tensor
    largest: Tensor
    log_sum: Tensor

    @staticmethod
    def of(logits: Tensor, row_total: Callable[[Tensor], Tensor]) -> Softmax:
        """Of logits [N, V], which are left as they are; `row_total` adds up over the vocabulary."""
        largest, top = logits.max(-1, keepdim=True)
        shifted = (logits - largest).clamp_(min=LOWEST)
        p = shifted.exp()  # torch.softmax takes an exponential of fewer digits
        total = row_total(p)
        p.div_(total.to(p.dtype)[:, None])
        return Softmax(logits, shifted, p, top, largest[:, 0].double(), total.log())

    def log_p(self, origin: Tensor) -> Tensor:
        """log p - `origin` [N], fp64: [N, V], in the logits' precision with all its digits where it is near 0."""
        offset = (self.largest + self.log_sum + origin)[:, None]
        rounded = offset.to(self.logits.dtype)
        rest = (offset - rounded.double()).to(self.logits.dtype)
        return (self.logits - rounded).sub_(rest).clamp_(min=LOWEST)

    def log_p_of(self, token: Tensor) -> Tensor:
        """log p of one token at each position, [N, 1]: [N], fp64, at least LOWEST."""
        return (self.logits.gather(1, token)[:, 0].double() - self.largest - self.log_sum).clamp_min(LOWEST)


class Distributions:
    """Drafter p and target q at N positions, and what several losses need of them, taken when first asked for.

    Made from drafter logits `z` and target logits `y` (None where no loss compares), both [N, V], after their
    temperatures; `labels`: the tokens that came next, [N], or None. Sums over the vocabulary are [N] and fp64.
    `traced`: for torch.compile.
    """

    def __init__(self, z: Tensor, y: Tensor | None, labels: Tensor | None, *, traced: bool = False) -> None:
        self.traced, self.labels = traced, labels
        self.drafter = Softmax.of(z, self.row_total)
        self.p = self.drafter.p
        self._target = None if y is None else Softmax.of(y, self.row_total)

    def row_sum(self, values: Tensor) -> Tensor:
        """Sums over the vocabulary, [N], fp64: what they are added to or taken from may be nearly as large.

        Added up in fp32, in many partial sums. Inductor's C++ keeps too few of them for that; there each lane adds up
        in a register of fp64.
        """
        if self.traced and values.device.type == "cpu":
            return values.sum(-1, dtype=torch.float64)
        return values.sum(-1).double()

    def row_total(self, values: Tensor) -> Tensor:
        """`row_sum` where the whole row is divided by it: its error would be every entry's."""
        return self.row_sum(values) if self.traced else values.sum(-1, dtype=torch.float64)

    @property
    def has_target(self) -> bool:
        """Whether there is anything to compare with."""
        return self._target is not None

    @property
    def target(self) -> Softmax:
        """The target's distribution. Raises ValueError where there is none."""
        if self._target is None:
            raise ValueError("a divergence needs the target")
        return self._target

    @property
    def q(self) -> Tensor:
        """The target's probabilities, [N, V]."""
        return self.target.p

    # Of TVD. Where most of p lies on one side, 1 - mu would lose its digits: both sides are added up, each by itself.
    # Masks are floats: on a CPU selecting by booleans takes ten times as long as multiplying.

    @cached_property
    def _surplus(self) -> Tensor:
        return (self.q - self.p).clamp_(min=0)

    @cached_property
    def rewarded(self) -> Tensor:
        """p * r, where r = 1[q > p] is TVD's reward, [N, V]."""
        return self._surplus.sign().mul_(self.p)

    @cached_property
    def unrewarded(self) -> Tensor:
        """p * (1 - r), [N, V]."""
        return self.p - self.rewarded

    @cached_property
    def tvd(self) -> Tensor:
        """Total variation, sum max(q - p, 0): no difference of nearly equal sums."""
        return self.row_sum(self._surplus)

    @cached_property
    def mu(self) -> Tensor:
        """The drafter's expected reward, sum p r."""
        return self.row_sum(self.rewarded)

    @cached_property
    def one_minus_mu(self) -> Tensor:
        """sum p (1 - r)."""
        return self.row_sum(self.unrewarded)

    @property
    def acceptance(self) -> Tensor:
        """Probability that a drafted token is accepted, sum min(p, q)."""
        return self.row_sum(torch.minimum(self.p, self.q))

    def entropy(self, of: Softmax) -> Tensor:
        """-sum p log p in nats of either, [N]."""
        return of.log_sum - self.row_sum(of.p * of.shifted)
