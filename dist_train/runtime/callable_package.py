"""A stage's package that is also the function that runs the stage."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """`dist_train.generate` holds modules, as any package, and `dist_train.generate(config)` runs the stage."""

    def __call__(self, config: Any) -> int:
        """Run the stage in this process: see `dist_train.api.run`, which stands above the stages."""
        name = self.__name__.rpartition(".")[2]
        return importlib.import_module("dist_train.api.run").stage_function(name)(config)


def make_callable(package: str) -> None:
    """Let the package of this name be called, by the class of its module object (Python's data model, 3.3.2.1)."""
    sys.modules[package].__class__ = _CallablePackage
