"""What came of a step, on its way from the device to the host while the next step is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.train.timing import Mark


class Outcome:
    """Figures of step `step`, counted from 1: `known` to the host, and `values`, scalars that are still being made.

    On a GPU the copy to the host is queued behind the step, and `read` waits for it alone; read one step late, it keeps
    the device busy. `marks`: where the step's time went.
    """

    def __init__(self, step: int, known: dict[str, float], values: Mapping[str, Tensor], marks: list[Mark]) -> None:
        self.step, self.known, self.marks = step, known, marks
        self._names = tuple(values)
        self._values = torch.stack([value.double() for value in values.values()])
        self._arrived: Any = None
        if self._values.is_cuda:
            host = torch.empty(self._values.shape, dtype=torch.float64, pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The values, by name. The one place where a step's host waits for its device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
