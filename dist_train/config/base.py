"""What every stage's tree is made of: the docstring under a field is its help text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Precision = Literal["auto", "bf16", "fp32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
ConfigType = TypeVar("ConfigType", bound="Section")


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error line about an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known are {', '.join(known)}" if known else ""


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, docstrings under fields are their descriptions.

    Numbers are finite: infinity is no temperature, and no JSON file holds it.
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class TargetSection(Section):
    """The chat LLM that the drafter is aligned with."""

    path: str
    """Hugging Face folder, hub id, or GGUF file, which is unpacked once, to four bytes a weight"""
    revision: str | None = None
    precision: Precision = "auto"
    """auto: bf16 where the device multiplies it, else fp32"""
    sharding: Literal["replicate", "zero3", "tp"] = "replicate"
    """replicate: every rank holds it whole; zero3: DeepSpeed partitions it over all ranks; tp: groups of tp_size ranks
    hold it tensor-parallel"""
    tp_size: PositiveInt = 2
    """ranks of a tensor-parallel group; keep it within a node"""
    offload: bool = False
    """zero3: keep the partitions in the host's memory"""
    trust_remote_code: bool = False
    """run model code that comes with the weights"""
    attention: Attention = "auto"
    """in training; auto: packed documents without masks, each by itself or all in one variable-length kernel, where the
    model's family allows it; else as transformers names it"""
    compile: bool = False
    """in training, replicate: torch.compile its blocks: pays on a GPU after a minute or two of compiling"""

    @model_validator(mode="after")
    def _whole_where_compiled(self) -> TargetSection:
        if self.compile and self.sharding != "replicate":
            raise ValueError(f"compile: blocks of a target that is cut by {self.sharding} run eagerly; set it to false")
        return self


class DatasetSection(Section):
    """A dataset as `datasets.load_dataset` names it."""

    path: str
    """hub id, or a folder"""
    name: str | None = None
    """configuration, where there are several"""
    split: str = "train"
    revision: str | None = None


class ReadFaultsSection(Section):
    """Records that cannot be used: stop with an error that names file and line, or skip them, counted and named."""

    malformed: Literal["stop", "skip"] = "stop"
    """a line that is not a JSON object, or a record without what is wanted of it, such as a text where a number is"""
    encoding: Literal["stop", "skip"] = "stop"
    """text that is not UTF-8"""
    too_long: Literal["stop", "skip"] = "stop"
    """a line, or a row of Parquet, longer than max_bytes"""
    max_bytes: PositiveInt = 50_000_000


class SeedsSection(Section):
    """Instructions that the target answers, or prompts of an evaluation."""

    inputs: str | list[str] = Field(default=[])
    """files, folders, globs or URLs: JSONL or JSON arrays (.gz, .zst), or Parquet"""
    dataset: DatasetSection | None = None
    """instead of inputs: anything that `datasets` loads, from the hub or a folder"""
    format: Literal["prompt", "chat", "oig", "openassistant", "dolly", "alpaca"] = "prompt"
    """prompt: prompt_field; chat: messages or conversations (ShareGPT); oig: OIG-small-chip2; openassistant: the
    messages of OASST's trees; dolly: instruction and context; alpaca: instruction and input"""
    prompt_field: str = "prompt"
    """field with the instruction, or with chat messages"""
    turns: Literal["first", "last", "each", "regenerate"] | None = None
    """of a conversation: its first user message; all up to its last one; or each with what goes before, as seeds of
    their own; regenerate: generate answers each in turn, after its own earlier answers in place of those given (other
    commands: as first). null: first for openassistant, last for others"""
    where: dict[str, str | int | float | bool] = Field(default={})
    """use records with these values alone, such as {lang: en}"""
    split: Literal["all", "train", "held_out"] = "all"
    """one side of a division by a hash of the conversation's first user message: no prompt is ever in both"""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """share of prompts that are held out; the same wherever the two sides are used"""
    min_tokens: NonNegativeInt = 0
    """leave out prompts of fewer tokens, chat template included"""
    max_tokens: PositiveInt | None = None
    """leave out prompts of more tokens, chat template included"""
    limit: PositiveInt | None = None
    """use the first so many"""
    faults: ReadFaultsSection = ReadFaultsSection()

    @model_validator(mode="after")
    def _one_source(self) -> SeedsSection:
        if bool(self.inputs) == bool(self.dataset):
            raise ValueError("inputs is required, or dataset, and not both")
        return self

    @property
    def source(self) -> Any:
        """What messages call it."""
        return self.dataset.path if self.dataset else self.inputs
