"""A micro-batch on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards import Batch, ShardedTokens, Source
from dist_train.config import DataSection
from dist_train.models.attention import Documents
from dist_train.models.chains import Chains


class DeviceBatch(NamedTuple):
    """Each [B, T]: ids and labels int64, mask bool, positions int64. `documents`: where they begin; `unmasked`: the
    number of positions that are trained, which the host knows.

    `chains`: of a drafter that drafts in one pass, what is still to be put behind the rows; `seen`: what each position
    sees, where it is more than causal.
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    documents: Documents
    unmasked: int
    chains: Chains | None = None
    seen: Tensor | None = None

    @property
    def trained(self) -> int:
        """Positions that are trained, those of the chains included."""
        return self.unmasked + (self.chains.masks if self.chains else 0)

    def unrolled(self, states: Tensor | None) -> tuple[DeviceBatch, Tensor | None]:
        """With its chains behind it, and the target's `states` [B, T, E] at the positions that each stands for."""
        if self.chains is None:
            return self, states
        chains = self.chains
        places = chains.places(self.mask.shape[1])
        batch = self._replace(
            input_ids=chains.behind(self.input_ids, chains.mask_id),
            labels=self.labels.gather(1, places),
            mask=chains.behind(self.mask, chains.offsets > 0),
            positions=chains.behind(self.positions, self.positions.gather(1, places[:, self.mask.shape[1] :])),
            unmasked=self.trained,
            chains=None,
            seen=chains.seen(self.positions),
        )
        return batch, None if states is None else states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))


def sources_of(data: DataSection) -> list[Source]:
    """The corpora of the mixture, opened. Raises DataError where one is not there."""
    return [Source(ShardedTokens(source.path), source.weight, source.epochs) for source in data.sources]


def on_device(batch: Batch, device: torch.device, chains: Chains | None = None) -> DeviceBatch:
    """The arrays of a micro-batch as tensors; copied while the host goes on, where there is a GPU."""

    def copied(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    ids, labels, mask, positions = (copied(torch.from_numpy(np.ascontiguousarray(array))) for array in batch)
    documents = Documents.of_host(batch.positions, device)
    if chains is not None:
        chains = chains._replace(anchors=copied(chains.anchors), offsets=copied(chains.offsets))
    return DeviceBatch(ids, labels, mask.bool(), positions, documents, int(batch.mask.sum()), chains)
