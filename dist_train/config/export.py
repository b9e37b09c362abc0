"""Configuration of `dist-train export`."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveInt

from dist_train.config.base import Section, SeedsSection, TargetSection


class ExportConfig(Section):
    """dist-train export: a drafter as a Hugging Face folder that servers load."""

    drafter: Path
    """run folder, checkpoint or Hugging Face folder"""
    tokenizer: str
    out: Path
    target: TargetSection | None = None
    """checked: same vocabulary; and assisted generation gives the target's own greedy output"""
    prompts: SeedsSection | None = None
    """on these prompts"""
    max_new_tokens: PositiveInt = 64
