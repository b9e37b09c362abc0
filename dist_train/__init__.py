"""Draft models for speculative decoding, aligned with a chat LLM: pretrain, generate, distil, evaluate, export.

    import dist_train as dt

    config = dt.load_config(dt.DistillConfig, "distill.yaml", ["train.steps=100"])
    dt.distill(config)                # in this process, as one rank of torchrun's or srun's world, or alone
    dt.launch(config, processes=8)    # or in eight new ones on this machine

A stage returns 0, or the exit code that its command would have; bad input raises `dt.UserError` or `dt.DataError`.
Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dist_train.runtime.version import __version__

if TYPE_CHECKING:
    from data_shards.errors import DataError
    from dist_train.api.run import launch
    from dist_train.api.run import run as distill
    from dist_train.api.run import run as evaluate
    from dist_train.api.run import run as export
    from dist_train.api.run import run as generate
    from dist_train.api.run import run as prepare
    from dist_train.api.run import run as pretrain
    from dist_train.config import (
        DistillConfig,
        EvaluateConfig,
        ExportConfig,
        GenerateConfig,
        PrepareConfig,
        PretrainConfig,
        load_config,
    )
    from dist_train.errors import UserError

__all__ = [
    "DataError",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "PrepareConfig",
    "PretrainConfig",
    "UserError",
    "__version__",
    "distill",
    "evaluate",
    "export",
    "generate",
    "launch",
    "load_config",
    "prepare",
    "pretrain",
]

_PACKAGES = ("prepare", "generate", "evaluate", "export")  # callable themselves: see runtime/callable_package.py
_PLACES = {
    "DataError": "data_shards.errors",
    "UserError": "dist_train.errors",
    "launch": "dist_train.api.run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("pretrain", "distill"):
        return importlib.import_module("dist_train.api.run").stage_function(name)
    return getattr(importlib.import_module(_PLACES.get(name, "dist_train.config")), name)
