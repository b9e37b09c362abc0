"""Losses from hidden states, with logits alive for one chunk of rows at a time.

At a vocabulary of 32,000 the two fp32 logit tensors of 16,384 positions take 4 GiB, their softmaxes and gradients
several times that. Here both heads are multiplied for a chunk of rows, the loss and its closed-form logit gradient are
taken at once, and only the gradients of hidden states [N, D] and head weight [V, D] are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.losses.head import Head, working_dtype
from dist_train.losses.output import STATISTICS, DivergenceOutput, make_output, statistics
from dist_train.losses.terms import TERMS, Distributions, Options, needs_target, parse

# Elements of a chunk's logits, of which about eight tensors are alive: on a CPU they should fit its cache, on a GPU
# fill it. Fewer rows than these would leave the heads' products waiting for the weight to be read.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
_LEAST_ROWS = {"cpu": 128, "cuda": 1024}


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
    num_positions: int | None = None,
    **options: Any,
) -> DivergenceOutput:
    """`divergence` of `hidden @ weight.T`, value and gradients, without a tensor of size [N, V].

    `drafter_hidden` [N, D] or [B, T, D], `target_hidden` [N, E] or [B, T, E] (None where only ce is asked for); each
    head a weight, [V, D] and [V, E], or a `Head`. The drafter's hidden states, head weight and bias get gradients, the
    target's nothing. `chunk_size` is in rows. With tvdpp's `normalize="batch"` and no `batch_mu` the chunks are gone
    through twice, once for the batch's statistics.
    """
    terms, settings = parse(name), Options(**options)
    if target_hidden is None and needs_target(terms):
        raise ValueError(f"{', '.join(terms)}: a divergence needs the target's hidden states")
    drafter = drafter_weight if isinstance(drafter_weight, Head) else Head(drafter_weight)
    target = target_weight if isinstance(target_weight, Head) or target_weight is None else Head(target_weight)
    keep = None if mask is None else mask.reshape(-1).nonzero()[:, 0]
    hidden = _rows(drafter_hidden, keep)
    count = len(hidden) if num_positions is None else num_positions
    chunks = _Chunks(
        terms=terms,
        options=settings,
        drafter=drafter,
        target=target,
        hidden=hidden.detach(),
        target_hidden=None if target_hidden is None else _rows(target_hidden, keep).detach(),
        labels=None if labels is None else _rows(labels[..., None], keep)[:, 0],
        size=chunk_size or chunk_rows(drafter.weight.shape[0], drafter.weight.device.type != "cpu"),
    )
    if "tvdpp" in terms and settings.normalize == "batch" and settings.batch_mu is None:
        chunks.options = Options(**{**options, "batch_mu": chunks.mean_mu()})
    loss, sums = _LinearDivergence.apply(hidden, drafter.weight, drafter.bias, chunks, max(count, 1))
    return make_output(loss, None if target_hidden is None else sums, len(hidden))


def _rows(values: Tensor, keep: Tensor | None) -> Tensor:
    """[..., D] as [N, D], of the kept positions; masked ones are never multiplied with a head."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if keep is None else flat.index_select(0, keep)


def chunk_rows(vocab_size: int, on_gpu: bool) -> int:
    """Rows of logits alive at once where none are asked for."""
    kind = "cuda" if on_gpu else "cpu"
    return max(_LEAST_ROWS[kind], _CHUNK_ELEMENTS[kind] // vocab_size)


class _Chunks:
    """The rows of one call, chunk by chunk."""

    def __init__(
        self,
        *,
        terms: dict[str, float],
        options: Options,
        drafter: Head,
        target: Head | None,
        hidden: Tensor,
        target_hidden: Tensor | None,
        labels: Tensor | None,
        size: int,
    ) -> None:
        self.terms, self.options, self.size = terms, options, size
        self.drafter, self.target = drafter, target
        self.hidden, self.target_hidden, self.labels = hidden, target_hidden, labels

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Distributions]]:
        """(rows, drafter logits before their temperature, both distributions) of each chunk."""
        for first in range(0, len(self.hidden), self.size):
            rows = slice(first, first + self.size)
            logits = self.drafter.logits(self.hidden[rows])
            z = _heated(logits, self.options.drafter_temperature)
            if self.target is None or self.target_hidden is None:
                y = None
            else:
                y = self.target.logits(self.target_hidden[rows]).to(z.dtype)
                y = _heated(y, self.options.target_temperature)
            yield rows, logits, Distributions(z, y, None if self.labels is None else self.labels[rows])

    @torch.no_grad()
    def mean_mu(self) -> Tensor:
        """TVD++'s mean reward over the rows."""
        total = sum((d.mu.double().sum() for _, _, d in self), torch.zeros((), dtype=torch.float64))
        return total / max(len(self.hidden), 1)


def _heated(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


class _LinearDivergence(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks, count: int
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [N, D], `weight` [V, D]; returns the loss and the sums of the statistics."""
        dtype = working_dtype(hidden)
        wanted = any(ctx.needs_input_grad)
        ctx.hidden_gradient = torch.zeros_like(hidden) if wanted else None
        ctx.weight_gradient = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted else None
        ctx.bias_gradient = torch.zeros_like(bias, dtype=dtype) if wanted and bias is not None else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=hidden.device)
        for rows, logits, d in chunks:
            gradient = torch.zeros(())
            for term, factor in chunks.terms.items():
                value, term_gradient = TERMS[term](d, chunks.options)
                loss += factor * value.double().sum()
                gradient = term_gradient.mul_(factor / count / chunks.options.drafter_temperature).add_(gradient)
            if d.has_target:
                sums += statistics(d)
            if wanted:
                raw = chunks.drafter.raw_gradient(gradient, logits).to(weight.dtype)
                ctx.hidden_gradient[rows] = raw @ weight
                ctx.weight_gradient += raw.T @ hidden[rows].to(weight.dtype)
                if bias is not None:
                    ctx.bias_gradient += raw.sum(0, dtype=dtype)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return (loss / count).to(dtype), sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times the gradient that arrives at the loss."""
        stored = (ctx.hidden_gradient, ctx.weight_gradient, ctx.bias_gradient)
        return (
            *(g if g is None else (g * scale).to(dtype) for g, dtype in zip(stored, ctx.dtypes, strict=True)),
            None,
            None,
        )
