"""Running a stage: in this process, or in several that are started here."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.api.stages import STAGES, Stage, stage_of
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.config import Section
    from dist_train.config.base import ConfigType


def stage_function(name: str) -> Callable[[Section], int]:
    """The function `dist_train.NAME`: `run` for the configurations of one stage alone."""

    def stage(config: Section) -> int:
        if (given := stage_of(config).name) != name:
            raise TypeError(f"dist_train.{name} takes a {STAGES[name].config}, not that of {given}")
        before = signal.getsignal(signal.SIGINT)
        try:
            return run(config)
        except KeyboardInterrupt:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)  # the stage ignores it while it cleans up
            raise

    return stage


def run(config: Section) -> int:
    """Run the stage that `config` is of in this process, as a rank of its launcher's world, or alone.

    Returns 0, or the exit code that the command line would have. Raises UserError or DataError for bad input.
    """
    return stage_of(config).load().run(resolved(config)) or 0


def launch(config: Section, processes: int) -> int:
    """Run the stage that `config` is of in `processes` new processes on this machine.

    Returns 0, or the first exit code that is another; what went wrong was printed by the process that met it. Raises
    UserError or DataError for bad input, before any process starts.
    """
    from dist_train.config import save_config

    if processes < 1:
        raise UserError(f"{processes} processes: at least 1")
    with tempfile.TemporaryDirectory(prefix="dist-train-") as folder:
        path = Path(folder) / "config.yaml"
        save_config(config, path)
        return launch_stage(stage_of(config), [str(path)], processes)


def resolved(config: ConfigType, fast: str | None = None) -> ConfigType:
    """A copy of `config` that is about this machine: precision as the device is fast, GGUF files unpacked to folders.

    `fast`: the precision that other machines are fast at, where the stage will run on those.
    """
    from dist_train.config import resolve_precision
    from dist_train.models.gguf import unpack_named

    config = resolve_precision(config, fast)
    unpack_named(config)
    return config


def launch_stage(stage: Stage, words: Sequence[str], processes: int) -> int:
    """`launch` for a configuration that is still in words: a file, then overrides."""
    from dist_train.runtime.launch import launch, launch_mpi

    if stage.alone and processes > 1:
        raise UserError(f"--nproc {processes}: one process does this; leave it out")
    stage.load().check(resolved(stage.read(words)))
    start = launch_mpi if stage.mpi and processes > 1 else launch
    return start([stage.name, *words], processes)
