"""Figures of a run: TensorBoard, one JSON line per step, and a line or a bar on the screen."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.progress import Progress
from dist_train.run_folder import METRICS, TENSORBOARD, read_metrics

if TYPE_CHECKING:
    from dist_train.config import LogSection
    from dist_train.runtime import Runtime


class Metrics:
    """Writes on rank 0, is silent elsewhere. A resumed run goes on with the same curves: what a killed run had written
    beyond its newest checkpoint is cut off.
    """

    def __init__(self, run: Path, name: str, steps: int, log: LogSection, runtime: Runtime) -> None:
        self._run, self._name, self._steps, self._log = run, name, steps, log
        self._device, self._enabled = runtime.device, runtime.is_first
        self._writer: Any = None

    @contextmanager
    def going_on_from(self, step: int) -> Iterator[None]:
        """Keep the files open for the length of a `with` block, in which the steps after `step` are logged."""
        if not self._enabled:
            yield
            return
        _cut(self._run / METRICS, step)
        if self._log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # A small queue: a kill must not take a thousand points with it.
            folder = str(self._run / TENSORBOARD)
            self._writer = SummaryWriter(folder, purge_step=step + 1, max_queue=10, flush_secs=30)
        with (
            (self._run / METRICS).open("a") as self._lines,
            Progress(self._name, self._steps, "step", first=step) as self._bar,
        ):
            try:
                yield
            finally:
                if self._writer is not None:
                    self._writer.close()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures (`group/name`) of step `step`, counted from 1."""
        if not self._enabled:
            return
        figures = {**figures, "perf/memory_gib": self._memory_gib()}
        self._lines.write(json.dumps({"step": step, "time": time.time(), **figures}) + "\n")
        if self._writer is not None:
            for tag, value in figures.items():
                self._writer.add_scalar(tag, value, step)
        shown = {"loss": "train/loss", "acceptance": "train/acceptance", "tokens/s": "perf/tokens_per_s"}
        self._bar.update(step, **{name: figures[tag] for name, tag in shown.items() if tag in figures})

    def flush(self) -> None:
        """Called at every checkpoint, so that curves and weights go together."""
        if self._enabled:
            self._lines.flush()
            if self._writer is not None:
                self._writer.flush()

    def _memory_gib(self) -> float:
        """Peak memory of rank 0: of the device, or of the process where there is none."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _cut(path: Path, first_step: int) -> None:
    """Drop the lines of steps after `first_step`: they are about to be made again."""
    kept = [line for line in read_metrics(path.parent) if line["step"] <= first_step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
