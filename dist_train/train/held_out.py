"""Figures on sequences that are not trained on, among them the block efficiency that the target would measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards import Batch, ShardedTokens, Source, TokenLoader
from dist_train.config import TrainConfig
from dist_train.losses import STATISTICS, Head
from dist_train.losses.sizes import affordable_rows
from dist_train.models.chains import lay_out, parallel_of
from dist_train.models.drafter import TrainableDrafter
from dist_train.runtime.process_group import Runtime
from dist_train.train.batch import on_device
from dist_train.train.objective import Objective


class HeldOut:
    """The held-out sequences of a run, the same at every look and for every number of ranks."""

    def __init__(self, config: TrainConfig, runtime: Runtime, objective: Objective) -> None:
        assert config.held_out is not None
        self.section, self.runtime, self.objective = config.held_out, runtime, objective
        loader = TokenLoader(
            [Source(ShardedTokens(self.section.path))],
            sequence_length=config.data.sequence_length,
            global_batch=self.section.sequences,
            micro_batch=config.train.micro_batch,
            seed=0,
            rank=runtime.rank,
            world_size=runtime.world_size,
            separate_documents=config.data.separate_documents,
            prefetch=0,
        )
        self._batches = runtime.everywhere(lambda: loader.step(0))

    def due(self, step: int, last_step: int) -> bool:
        """Whether to look after `step` steps."""
        return step == last_step or step % self.section.every == 0

    def measure(self, drafter: TrainableDrafter) -> dict[str, float]:
        """`eval/...` of the drafter, by all ranks together: loss, and with a target how well it drafts.

        Block efficiency is simulated: over windows of gamma tokens of the corpus, 1 + the expected number of accepted
        ones, sum_k prod_{i<=k} min(1, p(x_i) / q(x_i)); exact where the corpus was sampled from the target. For a
        drafter that drafts in one pass, p(x_i) is what it says of x_i then, and its acceptance is given by place.
        """
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        with drafter.evaluating():
            for batch in self._batches:
                for name, total, count in self._figures(drafter, batch):
                    sums[name][0] += total
                    sums[name][1] += count
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        totals = self.runtime.sum(values.to(self.runtime.device)).tolist()
        return {f"eval/{name}": total / max(count, 1) for name, (total, count) in zip(names, totals, strict=True)}

    def _figures(self, drafter: TrainableDrafter, host: Batch) -> Iterator[tuple[str, float, float]]:
        """(name, sum, number of what was summed) of each figure of a micro-batch."""
        target, parallel = self.objective.target, parallel_of(drafter.model.config)
        chains = None
        if parallel is not None:
            chains = lay_out(host.input_ids, host.positions, host.mask, parallel, 1.0, (0,))
        batch = on_device(host, self.runtime.device, chains)
        states = target(batch.input_ids, batch.positions, batch.documents) if target else None
        whole, states = batch.unrolled(states)
        positions = whole.unmasked
        loss_function = self.objective.loss(whole, states, max(positions, 1))

        def look(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
            return *loss_function(hidden, head), label_log_probs(hidden, head, whole.labels)

        loss, statistics, log_p = drafter(whole.input_ids, whole.positions, look, whole.documents, whole.seen)
        yield "loss", float(loss) * positions, positions
        if target is None or states is None:
            return
        for name, value in zip(STATISTICS, statistics.tolist(), strict=True):
            yield name, value, positions
        accepted = (log_p - label_log_probs(states, target.head, whole.labels)).clamp(max=0).exp()
        if parallel is None or batch.chains is None:
            for gamma in self.section.gammas:
                yield (
                    f"block_efficiency/gamma{gamma}",
                    *block_efficiency(accepted, batch.mask, batch.positions, gamma),
                )
            return
        by_place = batch.chains.by_place(accepted.double(), batch.mask, parallel.tokens)
        for place, chances in enumerate(by_place.unbind(-1), start=1):
            yield f"acceptance/place{place}", float(chances.nansum()), float((~chances.isnan()).sum())
        for gamma in self.section.gammas:
            windows = by_place[..., :gamma].flatten(0, -2)
            windows = windows[~windows.isnan().any(-1)]
            yield f"block_efficiency/gamma{gamma}", float((1 + windows.cumprod(-1).sum(-1)).sum()), len(windows)


def block_efficiency(accepted: Tensor, mask: Tensor, positions: Tensor, gamma: int) -> tuple[float, float]:
    """Sum and number of the expected tokens per target call, over all windows of `gamma` trained tokens of a document.

    `accepted` [B, T]: probability that the token at hand is accepted; `mask` [B, T]; `positions` [B, T] begin anew with
    each document.
    """
    windows = accepted.double().unfold(1, gamma, 1)  # [B, T - gamma + 1, gamma]
    spans = positions.unfold(1, gamma, 1)
    same_document = spans[..., -1] - spans[..., 0] == gamma - 1  # positions go up by one or begin anew
    whole = mask.unfold(1, gamma, 1).all(-1) & same_document
    expected = 1 + windows.cumprod(-1).sum(-1)
    return float(expected[whole].sum()), float(whole.sum())


def label_log_probs(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """log p of the labels [B, T] from hidden states [B, T, D], fp32; logits for a chunk of rows at a time."""
    rows = affordable_rows(len(head.weight), hidden.device, alone=True)
    chunks = zip(hidden.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    found = [-F.cross_entropy(head.logits(states), wanted, reduction="none") for states, wanted in chunks]
    return torch.cat(found).view(labels.shape)
