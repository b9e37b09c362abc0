"""Configuration of `dist-train evaluate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from dist_train.config.base import Section, SeedsSection, TargetSection


class TaskSection(SeedsSection):
    """A set of evaluation prompts."""

    name: str


class TokenRateSection(Section):
    """Wall-clock measurement, apart from the statistics."""

    prompts: NonNegativeInt = 8
    """prompts timed; 0: none"""
    batch_size: PositiveInt = 1
    repeats: PositiveInt = 3
    """the median of so many passes counts"""


class EvaluateConfig(Section):
    """dist-train evaluate: block efficiency, MBSU and token rate of drafters with a target."""

    target: TargetSection
    drafters: dict[str, Path] = Field(min_length=1)
    """name to Hugging Face folder, run folder or checkpoint; the first is the one that the others are compared with"""
    tokenizer: str | None = None
    """null: the target's own"""
    tasks: list[TaskSection] = Field(min_length=1)
    out: Path
    """folder of the results"""
    gammas: list[PositiveInt] = Field(default=[3, 5], min_length=1)
    """tokens drafted per block"""
    temperatures: list[float] = Field(default=[0.0, 0.6], min_length=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 32
    token_rate: TokenRateSection = TokenRateSection()
    seed: int = 0
