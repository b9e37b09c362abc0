"""The table of stages: a name, a configuration class, and a module with `check(config)` and `run(config)`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config import Section


@dataclass(frozen=True)
class Stage:
    """A stage: `module` has `check(config)`, which is quick, and `run(config)`, which every rank calls.

    `mpi`: its processes are MPI's. `trains`: it writes a run folder. `alone`: one process runs it.
    """

    name: str
    module: str
    config: str
    mpi: bool = False
    trains: bool = False
    alone: bool = False

    @property
    def config_class(self) -> type[Section]:
        """The configuration's class."""
        from dist_train import config

        return getattr(config, self.config)

    def load(self) -> ModuleType:
        """Import the stage's module, and with it PyTorch where the stage needs it."""
        return importlib.import_module(self.module)

    def read(self, words: Sequence[str]) -> Any:
        """The configuration that a file, if the first word is one, and overrides give. Raises UserError."""
        from dist_train.config import load_config

        named = words[:1] if words and "=" not in words[0] else []
        return load_config(self.config_class, Path(named[0]) if named else None, words[len(named) :])

    def folder(self, config: Any) -> Path:
        """Where the stage writes."""
        return config.run.dir if self.trains else config.out


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", "dist_train.prepare.stage", "PrepareConfig", mpi=True),
        Stage("pretrain", "dist_train.train.stage", "PretrainConfig", trains=True),
        Stage("generate", "dist_train.generate.stage", "GenerateConfig"),
        Stage("distill", "dist_train.train.stage", "DistillConfig", trains=True),
        Stage("evaluate", "dist_train.evaluate.stage", "EvaluateConfig"),
        Stage("export", "dist_train.export.stage", "ExportConfig", alone=True),
    )
}
SERVED = Stage("evaluate", "dist_train.evaluate.served", "ServedConfig", alone=True)
"""`evaluate --server`: another configuration, and what a server counts instead of what is decoded here."""


def stage_of(config: Section) -> Stage:
    """The stage that a configuration is of. Raises TypeError where it is of none."""
    for stage in (*STAGES.values(), SERVED):
        if stage.config == type(config).__name__:
            return stage
    raise TypeError(f"{type(config).__name__} is no stage's configuration")
