"""Configuration of `dist-train export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, model_validator

from dist_train.config.base import Section, SeedsSection, TargetSection


class ExportConfig(Section):
    """dist-train export: a drafter as a Hugging Face folder that servers load."""

    drafter: Path
    """run folder, checkpoint or Hugging Face folder"""
    tokenizer: str | None = None
    """what the drafter was trained with; has to be the target's, which is the one written; null: the target's own"""
    chat_template: str | None = None
    """Jinja file, or llama2: written instead of the target's own chat template, or where it has none"""
    out: Path | None = None
    """folder to write; one that dist-train export wrote is replaced, any other is refused"""
    target: TargetSection | None = None
    """every check is against it, and assisted generation has to give its own greedy output"""
    prompts: SeedsSection | None = None
    """on these prompts"""
    max_new_tokens: PositiveInt = 64
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """what the weights are cast to"""
    serving_length: PositiveInt | None = None
    """longest sequence that will be served, where that is less than the target's, null: the drafter needs as many
    positions, and the model card's commands keep servers to it"""
    results: Path | None = None
    """folder that dist-train evaluate wrote, for the model card"""
    gguf: bool | None = None
    """write drafter.gguf as well, through llama.cpp's converter; null: where the target is a GGUF file"""
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """of its weights; null: as dtype"""
    llama_cpp: Path | None = None
    """llama.cpp's source folder, with convert_hf_to_gguf.py"""
    check: str | None = None
    """--check: the target, folder or hub id, that the existing folder `drafter` is checked against"""

    @model_validator(mode="after")
    def _fits_together(self) -> ExportConfig:
        if self.check is not None:
            return self
        if self.out is None:
            raise ValueError("out is required")
        if self.target is None and self.tokenizer is None:
            raise ValueError("target.path is required, or tokenizer where there is no target")
        if self.gguf is None:
            self.gguf = self.target is not None and Path(self.target.path).suffix == ".gguf"
        if self.gguf and self.llama_cpp is None:
            raise ValueError("gguf: name llama.cpp's source folder, llama_cpp=PATH; or set gguf=false")
        return self

    @property
    def outtype(self) -> str:
        """The type of a GGUF file's weights, as llama.cpp's converter calls it."""
        return self.gguf_type or {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[self.dtype]
