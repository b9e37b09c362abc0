"""Losses from hidden states, with logits alive for one chunk of rows at a time.

At a vocabulary of 32,000 the two fp32 logit tensors of 16,384 positions take 4 GiB, their softmaxes and gradients
several times that. Here both heads are multiplied for a chunk of rows, the loss and its closed-form logit gradient are
taken at once, and only the gradients of hidden states [N, D] and head weight [V, D] are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_train.losses.distributions import Distributions
from dist_train.losses.head import Head, working_dtype
from dist_train.losses.output import STATISTICS, DivergenceOutput, make_output, statistics
from dist_train.losses.terms import TERMS, Options, advantage_deviation, needs_target, parse, z_loss

# A chunk is what the heads are multiplied for: two tensors of logits are alive. Fewer rows than the least would leave
# the products waiting for the weights to be read and the weight's gradient to be written.
_CHUNK_ELEMENTS = {"cpu": 5 << 20, "cuda": 1 << 24}
_LEAST_ROWS = {"cpu": 704, "cuda": 512}
# Without a target, whose head is the wide one.
_LEAST_ROWS_ALONE = {"cpu": 240, "cuda": 512}
# A chunk's share of the free memory, of which it takes two tensors in fp32.
_FREE_SHARE = 1 / 4
# A block is what the losses are taken for, a dozen tensors: as many rows of a chunk as a cache holds of them, and not
# fewer than keep every core of a CPU busy with rows of its own.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}
_ROWS_PER_THREAD = 6


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
    target's nothing; the backward pass can be gone through once. `chunk_size` is in rows (None: from the vocabulary,
    and less where memory is short). With tvdpp's `normalize="batch"` and no `batch_mu` the batch is what is at hand.
    Where it is one of several losses, the chunks are then gone through twice, first for the statistics. Raises
    ValueError for an unknown name, what is missing, and heads of different vocabularies.
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
    keep = None if mask is None else mask.reshape(-1).nonzero()[:, 0]
    hidden = _rows(drafter_hidden, keep)
    batch_mode = settings.normalize == "batch" and settings.batch_mu is None and "tvdpp" in terms
    only_tvdpp = batch_mode and len(terms) == 1 and not settings.z_loss
    chunks = _Chunks(
        terms={"tvd": terms["tvdpp"]} if only_tvdpp else terms,
        options=settings,
        drafter=drafter,
        target=target,
        hidden=hidden.detach(),
        target_hidden=None if target is None or target_hidden is None else _rows(target_hidden, keep).detach(),
        labels=None if labels is None else _rows(labels[..., None], keep)[:, 0],
        size=chunk_size or affordable_rows(len(drafter.weight), drafter.weight.device, alone=target is None),
        count=max(len(hidden) if num_positions is None else num_positions, 1),
    )
    if batch_mode and not only_tvdpp:
        chunks = replace(chunks, options=replace(settings, batch_mu=chunks.mean_mu()))
    loss, sums = _LinearDivergence.apply(hidden, whole.weight, whole.bias, chunks)
    if only_tvdpp:  # TVD over a scale that is known only now
        mu = sums[STATISTICS.index("mu")] / max(len(hidden), 1)
        loss = loss / advantage_deviation(mu, 1 - mu, settings).to(loss.dtype)
    return make_output(loss, None if target is None else sums, len(hidden))


def _rows(values: Tensor, keep: Tensor | None) -> Tensor:
    """[..., D] as [N, D], of the kept positions; masked ones are never multiplied with a head."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if keep is None else flat.index_select(0, keep)


def chunk_rows(vocab_size: int, on_gpu: bool, *, alone: bool = False) -> int:
    """Rows of logits alive at once where none are asked for and memory is not short; `alone`: without a target."""
    kind = "cuda" if on_gpu else "cpu"
    least = _LEAST_ROWS_ALONE if alone else _LEAST_ROWS
    return max(least[kind], _CHUNK_ELEMENTS[kind] // vocab_size // 32 * 32)


def affordable_rows(vocab_size: int, device: torch.device, *, alone: bool = False) -> int:
    """`chunk_rows`, halved until two fp32 tensors of them take no more than a share of the GPU's free memory.

    On a CPU a chunk is small beside what a model needs. Sizes change in such steps only, because the order in which
    sums are rounded changes with them.
    """
    rows = chunk_rows(vocab_size, device.type != "cpu", alone=alone)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while rows > 16 and 2 * 4 * rows * vocab_size > _FREE_SHARE * free:
            rows //= 2
    return rows


def _block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows for which the losses are taken at once."""
    if device.type == "cpu":
        return max(_ROWS_PER_THREAD * torch.get_num_threads(), _BLOCK_ELEMENTS["cpu"] // vocab_size)
    return max(1, _BLOCK_ELEMENTS["cuda"] // vocab_size)


@dataclass(frozen=True)
class _Chunks:
    """The rows of one call, chunk by chunk. Heads and hidden states are outside of the autograd graph."""

    terms: dict[str, float]
    options: Options
    drafter: Head
    target: Head | None
    hidden: Tensor
    target_hidden: Tensor | None
    labels: Tensor | None
    size: int
    count: int

    def raw_logits(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The rows of each chunk, and what the drafter's and the target's heads give for them, as `Head.raw` does.

        [R, V] each, in memory that the next chunk's take over: a CPU's allocator would keep some of every chunk's.
        """
        z = self.drafter.space(min(self.size, len(self.hidden)))
        y = None if self.target is None else self.target.space(len(z))
        for first in range(0, len(self.hidden), self.size):
            rows = slice(first, min(first + self.size, len(self.hidden)))
            used = slice(rows.stop - rows.start)
            self.drafter.raw_into(z[used], self.hidden[rows])
            if self.target is not None and self.target_hidden is not None and y is not None:
                self.target.raw_into(y[used], self.target_hidden[rows])
            yield rows, z[used], None if y is None else y[used]

    def blocks(self, rows: slice, z: Tensor, y: Tensor | None) -> Iterator[tuple[slice, Tensor, Distributions]]:
        """(rows of the chunk, drafter logits before their temperature, both distributions) of each block."""
        labels = None if self.labels is None else self.labels[rows]
        size = _block_rows(z.shape[1], z.device)
        for first in range(0, len(z), size):
            block = slice(first, first + size)
            logits = self.drafter.finished(z[block])
            target_logits = None
            if self.target is not None and y is not None:
                target_logits = self.target.finished(y[block]).to(logits.dtype)
                target_logits = _heated(target_logits, self.options.target_temperature)
            heated = _heated(logits, self.options.drafter_temperature)
            yield block, logits, Distributions(heated, target_logits, None if labels is None else labels[block])

    def differentiate(self, rows: slice, z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """A chunk's loss and sums of its statistics; `z` becomes the gradient at the drafter's raw logits."""
        loss = torch.zeros((), dtype=torch.float64, device=z.device)
        sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=z.device)
        for block, logits, d in self.blocks(rows, z, y):
            value, gradient = self._weighted_sum(d)
            loss += value
            if d.has_target:
                sums += statistics(d)
            z[block] = self.drafter.raw_gradient(gradient, logits)  # in place of the logits, which are done with
            del d, gradient  # before the next block's are made
        return loss, sums

    def _weighted_sum(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """The losses of a block added up, and their gradient at the logits before their temperature."""
        weighted = [(TERMS[term], weight) for term, weight in self.terms.items()]
        if self.options.z_loss:
            weighted.append((z_loss, self.options.z_loss))
        loss, total = torch.zeros((), dtype=torch.float64, device=d.p.device), None
        for term, weight in weighted:
            value, gradient = term(d, self.options)
            factor = weight / self.count
            loss = loss + factor * value.sum()
            gradient.mul_(factor / self.options.drafter_temperature)
            total = gradient if total is None else total.add_(gradient)
        assert total is not None
        return loss, total

    @torch.no_grad()
    def mean_mu(self) -> Tensor:
        """TVD++'s mean reward over the rows, fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.hidden.device)
        for chunk in self.raw_logits():
            for _, _, d in self.blocks(*chunk):
                total += d.mu.sum()
        return total / max(len(self.hidden), 1)


def _heated(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


class _LinearDivergence(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass scales them and hands them on."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks
    ) -> tuple[Tensor, Tensor]:
        """`hidden` [N, D], `weight` [V, D]; returns the loss and the sums of the statistics."""
        hidden_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        dtype, used = working_dtype(weight), slice(chunks.options.vocab_size)
        hidden_gradient = torch.empty_like(hidden) if hidden_wanted else None
        weight_gradient = torch.zeros_like(weight, dtype=dtype) if weight_wanted else None
        bias_gradient = torch.zeros_like(bias, dtype=dtype) if bias_wanted and bias is not None else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=hidden.device)
        for rows, gradient, y in chunks.raw_logits():
            chunk_loss, chunk_sums = chunks.differentiate(rows, gradient, y)
            loss += chunk_loss
            sums += chunk_sums
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ weight[used]
            if weight_gradient is not None:
                _add_product(weight_gradient[used], gradient.T, hidden[rows].to(weight.dtype))
            if bias_gradient is not None:
                bias_gradient[used] += gradient.sum(0, dtype=dtype)
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return loss.to(working_dtype(hidden)), sums

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


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the total's precision where that is theirs, else with the product rounded to theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
