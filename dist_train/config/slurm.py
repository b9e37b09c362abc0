"""Configuration of `dist-train submit`: what is asked of SLURM, and a chain of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dist_train.config.base import Section, suggest

# What sbatch takes as a text may look like a number, and need no quotes in a file.
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
StageName = Literal["prepare", "pretrain", "generate", "distill", "evaluate"]


class SlurmSection(Section):
    """What is asked of SLURM for a job; null leaves the template's or the site's default."""

    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt | None = None
    """tasks per node too: one task a GPU; 0: no GPUs are asked for, and one task a node runs on its processor"""
    tasks_per_node: PositiveInt | None = None
    """instead of one a GPU"""
    cpus_per_task: PositiveInt | None = None
    time: Word | None = None
    """as sbatch takes it; the job saves, requeues and goes on when it is over"""
    notice: PositiveInt | None = None
    """seconds before the time limit at which the stage is told to save"""
    partition: Word | None = None
    account: Word | None = None
    array: Word | None = None
    """generate: elements, 0-15 say, that share the work"""
    env: Path | None = None
    """the site's own version of slurm/env.sh"""
    options: list[str] = Field(default=[])
    """further options of sbatch, such as --qos=high"""


class PipelineStage(Section):
    """One job of a pipeline."""

    stage: StageName | None = None
    """null: the section's own name"""
    config: str | dict[str, Any]
    """the stage's configuration: a file, or its keys"""
    after: list[str] | None = None
    """sections that must have ended well; null: the one before; []: none"""
    slurm: SlurmSection = SlurmSection()
    """what differs from the pipeline's own slurm section"""


class PipelineConfig(Section):
    """dist-train submit pipeline: stages, one job each, in the order of the file."""

    slurm: SlurmSection = SlurmSection()
    """of all stages; each may change it"""
    stages: dict[str, PipelineStage] = Field(min_length=1)

    @model_validator(mode="after")
    def _resolve(self) -> PipelineConfig:
        """Write out what was left to the order of the file. Raises ValueError on unknown names."""
        earlier: list[str] = []
        for name, section in self.stages.items():
            known = StageName.__args__  # type: ignore[attr-defined]
            if section.stage is None:
                if name not in known:
                    raise ValueError(f"stages.{name}: no stage of that name; add stage: one of {', '.join(known)}")
                section.stage = name  # type: ignore[assignment]
            section.after = earlier[-1:] if section.after is None else section.after
            for other in section.after:
                if other not in earlier:
                    raise ValueError(f"stages.{name}.after: {other} is not before it{suggest(other, earlier)}")
            earlier.append(name)
        return self

    def job(self, name: str) -> SlurmSection:
        """What is asked for one stage."""
        own = self.stages[name].slurm
        return self.slurm.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})
