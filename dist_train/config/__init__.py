"""One typed configuration tree for every stage.

A stage reads a YAML file, then `section.key=value` overrides, into its class. Unknown keys are errors with a
suggestion; the resolved tree is saved beside every run.
"""

from dist_train.config.base import Section, SeedsSection, TargetSection
from dist_train.config.evaluate import (
    Engine,
    EvaluateConfig,
    PredictionSection,
    ServedConfig,
    ServeSection,
    TaskSection,
    TokenRateSection,
)
from dist_train.config.export import ExportConfig
from dist_train.config.generate import GenerateConfig
from dist_train.config.precision import resolve_precision
from dist_train.config.prepare import PrepareConfig
from dist_train.config.read import describe, dump_config, load_config, save_config
from dist_train.config.slurm import PipelineConfig, PipelineStage, SlurmSection
from dist_train.config.train import (
    LOSS_NAMES,
    CheckpointSection,
    DataSection,
    DistillConfig,
    DrafterSection,
    HeldOutSection,
    LogSection,
    LossSection,
    OnPolicySection,
    PretrainConfig,
    RunSection,
    SourceSection,
    TrainConfig,
    TrainSection,
)

__all__ = [
    "LOSS_NAMES",
    "CheckpointSection",
    "DataSection",
    "DistillConfig",
    "DrafterSection",
    "Engine",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "HeldOutSection",
    "LogSection",
    "LossSection",
    "OnPolicySection",
    "PipelineConfig",
    "PipelineStage",
    "PredictionSection",
    "PrepareConfig",
    "PretrainConfig",
    "RunSection",
    "Section",
    "SeedsSection",
    "ServeSection",
    "ServedConfig",
    "SlurmSection",
    "SourceSection",
    "TargetSection",
    "TaskSection",
    "TokenRateSection",
    "TrainConfig",
    "TrainSection",
    "describe",
    "dump_config",
    "load_config",
    "resolve_precision",
    "save_config",
]
