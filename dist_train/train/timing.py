"""Where the time of a step goes, and how much of the device's arithmetic it uses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dist_train.config import TrainConfig
from dist_train.models.sizes import matrix_parameters
from dist_train.models.target import Target
from dist_train.runtime.process_group import Runtime

# Dense bf16, 1e12 operations a second, by the vendor's data sheets; the first name found in the device's counts.
_PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}


Mark = tuple[str, Any, Any]
"""A phase, and when it began and ended: seconds, or events on a GPU."""


class Phases:
    """Seconds of a step by phase. On a GPU events are recorded, and read when the step is over: nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Mark] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The length of a `with` block counts for `name`."""
        began = self._now()
        yield
        self._marks.append((name, began, self._now()))

    def take(self) -> list[Mark]:
        """What was marked since the last call, for `seconds`."""
        marks, self._marks = self._marks, []
        return marks

    def seconds(self, marks: list[Mark]) -> dict[str, float]:
        """Seconds of each phase of a step that is over on the device."""
        found: dict[str, float] = defaultdict(float)
        for name, began, ended in marks:
            found[name] += began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Throughput:
    """What a step takes: tokens over all ranks; operations on each, and what its device is sold for, where known."""

    tokens: int
    flops: float
    peak_flops: float | None


def throughput(config: TrainConfig, drafter: Any, target: Target | None, runtime: Runtime) -> Throughput:
    """Of the drafter's forward and backward pass, three times a forward pass, and the target's forward pass."""
    length = config.data.sequence_length
    tokens = config.train.global_batch * length
    parallel = config.drafter.parallel
    each = 3 * flops_per_token(drafter.config, matrix_parameters(drafter), length)
    each *= parallel.positions if parallel else 1
    if target is not None:
        each += flops_per_token(target.config, target.matrix_parameters, length)
    return Throughput(tokens, each * tokens / runtime.world_size, peak_flops(runtime.device, config.train.precision))


def flops_per_token(shape: Any, matrix_parameters: int, sequence_length: int) -> float:
    """Multiplications and additions of a forward pass for one token (Kaplan et al., 2020, table 1; causal attention).

    Scores and their product with the values take 2 T multiplications and additions for each number of a head; half of
    them are masked.
    """
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.num_hidden_layers * sequence_length * shape.num_attention_heads * width
    return 2.0 * matrix_parameters + attention


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that the device is sold for in bf16; None where that is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for known, peak in _PEAKS.items() if known in name), None)
