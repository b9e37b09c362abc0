"""Configuration of `dist-train prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from dist_train.config.base import DatasetSection, ReadFaultsSection, Section


class FaultsSection(ReadFaultsSection):
    """Records that cannot be used: stop with an error that names file and line, or skip them, counted and named."""

    empty: Literal["stop", "skip"] = "skip"
    """no text, or no response"""


class PrepareConfig(Section):
    """dist-train prepare: text or conversations to token shards."""

    inputs: str | list[str] = Field(default=[])
    """files, folders, globs or URLs (hf://datasets/..., https://...): JSONL or JSON arrays (.gz, .zst), Parquet, text
    (one document a line)"""
    dataset: DatasetSection | None = None
    """instead of inputs: a dataset of the hub, its files read as they are, as a stream"""
    tokenizer: str = ""
    """sentencepiece .model file, Hugging Face folder or hub id"""
    chat_template: str | None = None
    """chat: Jinja file, or llama2: the template of prompts given as text, instead of the tokenizer's own, or where it
    has none"""
    verify: bool = False
    """--verify: read every byte of the corpus `out` and compare checksums, and the tokenizer if one is named"""
    out: Path
    """folder of the corpus"""
    format: Literal["text", "chat"] = "text"
    """chat: conversations (messages, or ShareGPT's conversations), or pairs of prompt and response: packed, and trained
    on every answer, to the end of its turn, only"""
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    """a record without it has messages; prompt_ids and response_ids, where both are there (what generate writes), go
    before the texts"""
    bos: bool | None = None
    """begin each text document with BOS; null: where the tokenizer itself puts one before a text"""
    eos: bool | None = None
    """end each text document with EOS; null: with what ends a text in the target's own pretraining, which is
    <|endoftext|> or <|end_of_text|> where the tokenizer has one beside an EOS that ends a turn of a chat, else EOS"""
    sequence_length: PositiveInt = 2048
    """tokens per sequence into which conversations are packed"""
    shard_bytes: PositiveInt = 64 << 20
    """input bytes per shard; a compressed file, or a JSON array, is one shard"""
    faults: FaultsSection = FaultsSection()

    @model_validator(mode="after")
    def _something_to_make_it_of(self) -> PrepareConfig:
        if not self.verify and bool(self.inputs) == bool(self.dataset):
            raise ValueError("inputs is required, or dataset, and not both")
        if not self.verify and not self.tokenizer:
            raise ValueError("tokenizer is required")
        return self
