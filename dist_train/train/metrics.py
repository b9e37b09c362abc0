"""Figures of a run: TensorBoard, one JSON line per step, and a line or a bar on the screen."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards import DataError
from data_shards.files import write_atomically
from dist_train.errors import UserError
from dist_train.runtime.progress import Progress
from dist_train.runtime.run_folder import LOGS, METRICS, PROFILE, TENSORBOARD, read_metrics

if TYPE_CHECKING:
    from dist_train.config import LogSection
    from dist_train.runtime.process_group import Runtime
    from dist_train.train.timing import Throughput


rank_log = logging.getLogger("dist_train.rank")


class Metrics:
    """Writes on rank 0, is silent elsewhere. A resumed run goes on with the same curves: what a killed run had written
    beyond its newest checkpoint is cut off.
    """

    def __init__(
        self, run: Path, name: str, steps: int, log: LogSection, runtime: Runtime, throughput: Throughput
    ) -> None:
        self._run, self._name, self._steps, self._log = run, name, steps, log
        self._device, self._rank, self._enabled = runtime.device, runtime.rank, runtime.is_first
        self._throughput = throughput
        self._writer: Any = None

    @contextmanager
    def going_on_from(self, step: int) -> Iterator[None]:
        """Keep the files open for the length of a `with` block, in which the steps after `step` are logged."""
        rank_log.info("begins at step %d of %d", step, self._steps)
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
                    with suppress(OSError):  # a full disk, which the lines tell
                        self._writer.close()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures (`group/name`) of step `step`, counted from 1."""
        if step % self._log.every == 0:
            shares = {tag: value for tag, value in figures.items() if tag.startswith("perf/")}
            rank_log.info("step %d: loss %.6g, %s", step, figures["train/loss"], _listed(shares))
        if not self._enabled:
            return
        figures = {**figures, "perf/memory_gib": self._memory_gib()}
        self._lines.write(json.dumps({"step": step, "time": time.time(), **figures}) + "\n")
        if self._writer is not None:
            for tag, value in figures.items():
                self._writer.add_scalar(tag, value, step)
        shown = {"loss": "train/loss", "acceptance": "train/acceptance", "tokens/s": "perf/tokens_per_s"}
        self._bar.update(step, **{name: figures[tag] for name, tag in shown.items() if tag in figures})

    def pace(self, phases: dict[str, float]) -> dict[str, float]:
        """`perf/...` of a step by the seconds of its phases, and of "step", the whole: throughput, and their shares."""
        work, seconds = self._throughput, phases.pop("step")
        figures = {"perf/tokens_per_s": work.tokens / seconds}
        if work.peak_flops is not None:
            figures["perf/mfu"] = work.flops / seconds / work.peak_flops
        return figures | {f"perf/{phase}": spent / seconds for phase, spent in phases.items()}

    @contextmanager
    def profiler(self, step: int) -> Iterator[Callable[[], None]]:
        """What is to be called after each step; traces a few of them where `log.profile` says so."""
        if self._log.profile is None:
            yield lambda: None
            return
        from torch.profiler import profile, schedule, tensorboard_trace_handler

        handler = tensorboard_trace_handler(str(self._run / PROFILE), worker_name=f"rank-{self._rank:05d}-step-{step}")
        plan = schedule(wait=2, warmup=1, active=self._log.profile, repeat=1)
        with profile(schedule=plan, on_trace_ready=handler, record_shapes=True) as profiler:
            yield profiler.step

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
    """Drop the lines of steps after `first_step`: they are about to be made again.

    A new file takes the old one's name: what a left-over process still appends goes to the old one, and nowhere.
    """
    kept = [line for line in read_metrics(path.parent) if line["step"] <= first_step]
    write_atomically(path, ["".join(json.dumps(line) + "\n" for line in kept).encode()])


def _listed(figures: dict[str, float]) -> str:
    return ", ".join(f"{tag.removeprefix('perf/')} {value:.4g}" for tag, value in figures.items())


@contextmanager
def rank_log_file(run: Path, rank: int) -> Iterator[None]:
    """RUN/logs/rank-N.log for the length of a `with` block: what this rank did, warnings, how it ended."""
    folder = run / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = _QuietHandler(folder / f"rank-{rank:05d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    rank_log.setLevel(logging.INFO)
    rank_log.propagate = False
    loggers = (rank_log, logging.getLogger("py.warnings"))
    for logger in loggers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    rank_log.info("process %d on %s", os.getpid(), socket.gethostname())
    try:
        yield
    except BaseException as error:
        rank_log.error("ends: %s", error, exc_info=not isinstance(error, UserError | DataError))
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _QuietHandler(logging.FileHandler):
    """A log that cannot be written must not hide why a run ends."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's own name
        """Nothing: what is missing in the log is not worth a run."""
