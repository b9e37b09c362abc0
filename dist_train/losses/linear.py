"""Losses from hidden states, with logits alive for one chunk of rows at a time.

At a vocabulary of 32,000 the two fp32 logit tensors of 16,384 positions take 4 GiB, their softmaxes and gradients
several times that. Here both heads are multiplied for a chunk of rows, the loss and its closed-form logit gradient are
taken at once, and only the gradients of hidden states [N, D] and head weight [V, D] are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_train.losses.block import Block
from dist_train.losses.compiled import Compile, compiled
from dist_train.losses.head import Head, working_dtype
from dist_train.losses.output import STATISTICS, DivergenceOutput, make_output
from dist_train.losses.products import add_outer, linear, linear_into
from dist_train.losses.sizes import affordable_rows, block_rows
from dist_train.losses.terms import Options, advantage_deviation, needs_target, parse


def linear_divergence(
    name: str | Mapping[str, float],
    drafter_hidden: Tensor,
    drafter_weight: Tensor | Head,
    target_hidden: Tensor | None,
    target_weight: Tensor | Head | None,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    labels: Tensor | None = None,
    num_positions: int | Tensor | None = None,
    unmasked: int | None = None,
    compile: Compile = False,
    **options: Any,
) -> DivergenceOutput:
    """`divergence` of `hidden @ weight.T`, value and gradients, without a tensor of size [N, V].

    `drafter_hidden` [N, D] or [B, T, D], `target_hidden` [N, E] or [B, T, E] (None where only ce is asked for); each
    head a weight, [V, D] and [V, E], or a `Head`. The drafter's hidden states, head weight and bias get gradients, the
    target's nothing; the backward pass can be gone through once. `chunk_size` is in rows (None: from the vocabulary,
    and less where memory is short). With tvdpp's `normalize="batch"` and no `batch_mu` the batch is what is at hand.
    Where it is one of several losses, the chunks are then gone through twice, first for the statistics.

    `compile`: see `losses.compiled`; the eager form is the reference. The host waits for the device only to count
    `mask`: not where `unmasked` says how many positions are not masked. `num_positions` and `batch_mu` may be on the
    device, too.

    Raises ValueError for an unknown name, what is missing, and heads of different vocabularies; UserError where
    `compile` is True and cannot be heeded.
    """
    terms, settings = parse(name), Options(**options)
    if target_hidden is None and needs_target(terms):
        raise ValueError(f"{', '.join(terms)}: a divergence needs the target's hidden states")
    whole = drafter_weight if isinstance(drafter_weight, Head) else Head(drafter_weight)
    drafter = whole.detached(settings.vocab_size)
    target = None
    if target_hidden is not None and target_weight is not None:
        target = target_weight if isinstance(target_weight, Head) else Head(target_weight)
        target = target.detached(settings.vocab_size)
        if len(drafter.weight) != len(target.weight):
            raise ValueError(
                f"the drafter's head has {len(drafter.weight)} rows, the target's {len(target.weight)}; "
                "vocab_size= leaves padding out"
            )
    positions = drafter_hidden.shape[:-1].numel()
    for argument, found in (
        ("mask", None if mask is None else mask.numel()),
        ("labels", None if labels is None else labels.numel()),
        ("target_hidden", None if target_hidden is None else target_hidden.shape[:-1].numel()),
    ):
        if found not in (None, positions):
            raise ValueError(f"{argument} has {found} positions, drafter_hidden {positions}")
    keep = None if mask is None else _unmasked(mask, unmasked)
    hidden = _rows(drafter_hidden, keep)
    batch_mode = settings.normalize == "batch" and settings.batch_mu is None and "tvdpp" in terms
    only_tvdpp = batch_mode and len(terms) == 1 and not settings.z_loss
    device, vocab_size = drafter.weight.device, len(drafter.weight)
    size = chunk_size or affordable_rows(vocab_size, device, alone=target is None, fused=bool(compile))
    block = min(block_rows(vocab_size, device, fused=bool(compile)), size, max(positions, 1))
    batch_mu = None if settings.batch_mu is None else _scalar(settings.batch_mu, device)
    chunks = _Chunks(
        work=Block(
            terms=(("tvd", terms["tvdpp"]),) if only_tvdpp else tuple(terms.items()),
            options=replace(settings, batch_mu=None, vocab_size=None),
            drafter=drafter.finish,
            target=None if target is None else target.finish,
        ),
        drafter=drafter,
        target=target,
        hidden=hidden.detach(),
        target_hidden=None if target is None or target_hidden is None else _rows(target_hidden, keep).detach(),
        labels=None if labels is None else _rows(labels[..., None], keep)[:, 0],
        size=size // block * block,
        block=block,
        scale=1 / _scalar(len(hidden) if num_positions is None else num_positions, device).clamp_min(1),
        batch_mu=batch_mu,
        compile=compile,
    )
    if batch_mode and not only_tvdpp:
        chunks = replace(chunks, batch_mu=chunks.mean_mu())
    loss, sums = _LinearDivergence.apply(hidden, whole.weight, whole.bias, chunks)
    if only_tvdpp:  # TVD over a scale that is known only now
        mu = sums[STATISTICS.index("mu")] / max(len(hidden), 1)
        loss = loss / advantage_deviation(mu, 1 - mu, settings).to(loss.dtype)
    return make_output(loss, None if target is None else sums, len(hidden))


def _rows(values: Tensor, keep: Tensor | None) -> Tensor:
    """[..., D] as [N, D], of the kept positions; masked ones are never multiplied with a head."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if keep is None else flat.index_select(0, keep)


def _unmasked(mask: Tensor, count: int | None) -> Tensor:
    """Where `mask` is true, [count], in order."""
    flat = mask.reshape(-1).bool()
    count = int(flat.sum()) if count is None else count
    return torch.argsort(flat, stable=True, descending=True)[:count]


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """In fp64 on the device, where a number is filled in rather than copied to."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class _Chunks:
    """The rows of one call, chunk by chunk. Heads and hidden states are outside of the autograd graph.

    A chunk is what the heads are multiplied for, a block what the losses are taken for. All blocks have the same
    number of rows, so that one compiled region serves them: the last one is filled up, and what comes of the filling is
    cut off.
    """

    work: Block
    drafter: Head
    target: Head | None
    hidden: Tensor
    target_hidden: Tensor | None
    labels: Tensor | None
    size: int
    block: int
    scale: Tensor
    batch_mu: Tensor | None
    compile: Compile

    def differentiate(self, use: Callable[[slice, Tensor], None]) -> Tensor:
        """Hands `use` the rows of each chunk and the gradient at the drafter's raw logits there, [R, V].

        Returns what `Block` does, for all rows: [1 + len(STATISTICS), N] or [1, N].
        """
        # The memory of a chunk's logits, which the next one's take over.
        # Inductor's C++ fails on inputs that are read and written to (PyTorch issue 196570): there the gradient has
        # its own, in one piece with the logits', as glibc hands only large ones back.
        is_apart = bool(self.compile) and self.hidden.device.type == "cpu"
        z_space, *rest = self._spaces(self.drafter, 2 if is_apart else 1)
        apart = rest[0] if rest else None
        y_space = None if self.target is None else self._spaces(self.target, 1)[0]
        found = [self.hidden.new_empty((1 if self.target is None else 1 + len(STATISTICS), 0), dtype=torch.float64)]
        for first in range(0, len(self.hidden), self.size):
            rows = slice(first, min(first + self.size, len(self.hidden)))
            z = self._raw(self.drafter, self.hidden[rows], z_space)
            y = None
            if self.target is not None and self.target_hidden is not None and y_space is not None:
                y = self._raw(self.target, self.target_hidden[rows], y_space)
            labels = None if self.labels is None else self._filled(self.labels[rows])
            gradient = z if apart is None else apart[: len(z)]
            for start in range(0, len(z), self.block):
                part = slice(start, start + self.block)
                arguments = (
                    z[part],
                    None if y is None else y[part],
                    None if labels is None else labels[part],
                    self.scale,
                    self.batch_mu,
                    gradient[part],
                )
                done = compiled(self.work, arguments, self.compile) if self.compile else self.work(*arguments)
                found.append(torch.stack(list(done)))
            use(rows, gradient[: rows.stop - rows.start])
        return torch.cat(found, 1)[:, : len(self.hidden)]

    def _spaces(self, head: Head, number: int) -> tuple[Tensor, ...]:
        """Memory for so many tensors of raw logits of a chunk, each [R, V]."""
        rows = -(-min(self.size, len(self.hidden)) // self.block) * self.block
        return head.weight.new_empty(number, rows, len(head.weight)).unbind()

    def _raw(self, head: Head, hidden: Tensor, space: Tensor) -> Tensor:
        """Raw logits of whole blocks of rows, [R, V]."""
        hidden = self._filled(hidden.to(head.weight.dtype))
        return linear_into(space[: len(hidden)], hidden, head.weight, head.bias, fast=bool(self.compile))

    def _filled(self, values: Tensor) -> Tensor:
        """[R] or [R, D] with zeros up to a whole number of blocks."""
        missing = -len(values) % self.block
        return F.pad(values, (0, 0) * (values.ndim - 1) + (0, missing)) if missing else values

    @torch.no_grad()
    def mean_mu(self) -> Tensor:
        """TVD++'s mean reward over the rows, fp64."""
        work = replace(self.work, terms=(("tvd", 1.0),))
        columns = replace(self, work=work).differentiate(lambda rows, gradient: None)
        return columns[1 + STATISTICS.index("mu")].sum() / max(len(self.hidden), 1)


class _LinearDivergence(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass scales them and hands them on."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [N, D], `weight` [V, D]; returns the loss and the sums of the statistics."""
        hidden_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        dtype, used = working_dtype(weight), slice(len(chunks.drafter.weight))
        hidden_gradient = torch.empty_like(hidden) if hidden_wanted else None
        weight_gradient = torch.zeros_like(weight, dtype=dtype) if weight_wanted else None
        bias_gradient = torch.zeros_like(bias, dtype=dtype) if bias_wanted and bias is not None else None

        def use(rows: slice, gradient: Tensor) -> None:
            if hidden_gradient is not None:
                head = chunks.drafter.weight
                hidden_gradient[rows] = linear(gradient, head.T) if chunks.compile else gradient @ head
            if weight_gradient is not None:
                add_outer(weight_gradient[used], gradient, chunks.hidden[rows].to(weight.dtype))
            if bias_gradient is not None:
                bias_gradient[used] += gradient.sum(0, dtype=dtype)

        loss, *sums = chunks.differentiate(use).sum(1)
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        statistics = torch.stack(sums) if sums else loss.new_zeros(len(STATISTICS))
        ctx.mark_non_differentiable(statistics)
        return (loss * chunks.scale).to(working_dtype(hidden)), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times the gradient that arrives at the loss, in place: another [V, D] is not made."""
        if ctx.gradients is None:
            raise RuntimeError("linear_divergence: the gradients of this loss have been taken already; make it anew")
        stored, ctx.gradients = ctx.gradients, None
        return (
            *(None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(stored, ctx.dtypes, strict=True)),
            None,
        )
