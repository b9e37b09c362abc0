"""What every stage's tree is made of: the docstring under a field is its help text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

Precision = Literal["bf16", "fp32"]


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error line about an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known are {', '.join(known)}" if known else ""


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, docstrings under fields are their descriptions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class TargetSection(Section):
    """The chat LLM that the drafter is aligned with."""

    path: str
    """Hugging Face folder or hub id"""
    revision: str | None = None
    precision: Precision = "bf16"
    sharding: Literal["replicate", "zero3", "tp"] = "replicate"
    """replicate: every rank holds it whole; zero3: DeepSpeed partitions it over all ranks; tp: groups of tp_size ranks
    hold it tensor-parallel"""
    tp_size: PositiveInt = 2
    """ranks of a tensor-parallel group; keep it within a node"""
    offload: bool = False
    """zero3: keep the partitions in the host's memory"""
    trust_remote_code: bool = False
    """run model code that comes with the weights"""


class SeedsSection(Section):
    """Instructions that the target answers, or prompts of an evaluation."""

    inputs: str | list[str]
    """files, folders or globs: JSONL (.gz, .zst) or Parquet"""
    prompt_field: str = "prompt"
    """field with the instruction, or with chat messages"""
    limit: PositiveInt | None = None
    """use the first so many"""
