"""A micro-batch on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards import Batch, ShardedTokens, Source
from dist_train.config import DataSection
from dist_train.models.attention import Documents


class DeviceBatch(NamedTuple):
    """Each [B, T]: ids and labels int64, mask bool, positions int64. `documents`: where they begin; `unmasked`: the
    number of positions that are trained, which the host knows.
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    documents: Documents
    unmasked: int


def sources_of(data: DataSection) -> list[Source]:
    """The corpora of the mixture, opened. Raises DataError where one is not there."""
    return [Source(ShardedTokens(source.path), source.weight, source.epochs) for source in data.sources]


def on_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """The arrays of a micro-batch as tensors; copied while the host goes on, where there is a GPU."""
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in batch)
    if device.type == "cuda":
        tensors = (tensor.pin_memory() for tensor in tensors)
    ids, labels, mask, positions = (tensor.to(device, non_blocking=True) for tensor in tensors)
    documents = Documents.of_host(batch.positions, device)
    return DeviceBatch(ids, labels, mask.bool(), positions, documents, int(batch.mask.sum()))
