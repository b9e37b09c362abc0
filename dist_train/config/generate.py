"""Configuration of `dist-train generate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveInt

from dist_train.config.base import Section, SeedsSection, TargetSection


class GenerateConfig(Section):
    """dist-train generate: the target answers seed instructions."""

    target: TargetSection
    tokenizer: str | None = None
    """null: the target's own"""
    seeds: SeedsSection
    out: Path
    """folder of the answers, Parquet"""
    temperatures: list[float] = Field(default=[0.0, 0.3, 0.7, 1.0], min_length=1)
    """each seed is answered once at each"""
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 32
    """answers decoded together; part of what fixes the random numbers"""
    seed: int = 0
