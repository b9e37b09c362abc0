"""Configuration of `dist-train evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dist_train.config.address import refuse_secrets
from dist_train.config.base import Section, TargetSection

Engine = Literal["vllm", "llama.cpp"]
Drafting = Literal["sampled", "greedy", "vllm", "llama.cpp"]
Preset = Literal["dolly", "xsum", "cnn_dailymail", "wmt18-de-en", "questions"]


def _once(values: list[Any] | None) -> list[Any] | None:
    """A condition measured twice would count its prompts twice, as if they were more."""
    return values and list(dict.fromkeys(values))


Once = AfterValidator(_once)


class TaskSection(Section):
    """A set of evaluation prompts: a dataset that is known by name, or any file of prompts."""

    name: str = ""
    """empty: the preset's"""
    preset: Preset | None = None
    """columns, prompt, hub id and sampling of a known dataset; questions: MT-bench's and Spec-Bench's question.jsonl,
    first turns"""
    inputs: str | list[str] | None = None
    """files, folders or globs: JSONL (.gz, .zst) or Parquet, in the preset's own columns; null: from the hub"""
    prompt_field: str = "prompt"
    """without a preset: field with the instruction, or with chat messages"""
    template: str | None = None
    """prompt with a record's fields in braces, such as 'Summarise: {article}'"""
    split: Literal["all", "train", "held_out"] = "all"
    """one side of the division by a hash of a conversation's first user message that the seeds of generate have"""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """share of prompts that are held out; the same wherever the two sides are used"""
    max_tokens: PositiveInt | None = None
    """leave out prompts of more tokens, chat template included"""
    limit: PositiveInt | None = None
    """use the first so many"""
    temperatures: Annotated[list[NonNegativeFloat] | None, Once] = Field(default=None, min_length=1)
    """null: the preset's, or else the evaluation's; likewise top_p and max_new_tokens"""
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_new_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _somewhere_to_read_from(self) -> TaskSection:
        self.name = self.name or self.preset or ""
        if not self.name:
            raise ValueError("name is required")
        if not self.inputs and self.preset in (None, "questions"):
            raise ValueError(f"task {self.name}: inputs is required")
        return self


class TokenRateSection(Section):
    """Wall-clock measurement, apart from the statistics."""

    prompts: NonNegativeInt = 8
    """prompts timed; 0: none"""
    batch_size: PositiveInt = 1
    """of plain and of speculative decoding alike"""
    repeats: PositiveInt = 3
    """the median of so many rounds counts; in each every one has its turn"""


class PredictionSection(Section):
    """Speed-ups predicted from measured acceptance and measured costs of single calls."""

    batch_sizes: Annotated[list[PositiveInt], Once] = Field(default=[1, 4, 16, 64], min_length=1)
    """at which calls are timed, as far as memory and time allow"""
    seconds: NonNegativeFloat = 20.0
    """for timing all calls, on rank 0: batch sizes that do not fit are left out; the smallest is timed if calls take
    longer, too; 0: no prediction"""


class ServeSection(Section):
    """A real server on this machine, started with each drafter and without one, on the prompts of the evaluation."""

    engine: Engine
    program: Path | None = None
    """vllm: the Python that it is installed for; null: DIST_TRAIN_VLLM_PYTHON, else that of the vllm on PATH.
    llama.cpp: its built source folder, or a llama-server; null: DIST_TRAIN_LLAMA_CPP, else the one on PATH"""
    concurrency: Annotated[list[PositiveInt], Once] = Field(default=[1, 4], min_length=1)
    """requests under way at once"""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """of both models; null: the target's precision; a GGUF file is served as it is"""
    gguf: Path | None = None
    """llama.cpp: the target; null: target.path where that is a GGUF file, else what is made of it"""
    arguments: list[str] = Field(default=[])
    """further options of the server, which have the last word"""
    patience: PositiveInt = 900
    """seconds until it serves"""
    timeout: PositiveInt = 600
    """seconds for one whole answer"""


class EvaluateConfig(Section):
    """dist-train evaluate: block efficiency, MBSU and token rate of drafters with a target."""

    target: TargetSection
    drafters: dict[str, Path] = Field(min_length=1)
    """name to Hugging Face folder, run folder or checkpoint; the first is the one that the others are compared with"""
    tokenizer: str | None = None
    """null: the target's own"""
    chat_template: str | None = None
    """Jinja file, or llama2: the chat template instead of the target's own, or where it has none"""
    tasks: list[TaskSection] = Field(min_length=1)
    out: Path
    """folder of the results"""
    gammas: Annotated[list[PositiveInt], Once] = Field(default=[3, 5], min_length=1)
    """tokens drafted per block"""
    drafting: Annotated[list[Drafting], Once] = Field(default=["sampled", "greedy"], min_length=1)
    """sampled: drafts drawn under the target's temperature and top-p, accepted with probability sum min(p, q); greedy:
    the drafter's likeliest token, as servers do by default, accepted with q(argmax p); at temperature 0 one and the
    same. As these servers draft and count, the first token of an answer coming from the prefill: vllm: drafts drawn
    under the temperature alone (its probabilistic ones); llama.cpp: likeliest tokens, the last block cut at the end of
    the text"""
    temperatures: Annotated[list[NonNegativeFloat], Once] = Field(default=[0.0, 0.6], min_length=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 32
    """prompts decoded at a time"""
    token_rate: TokenRateSection = TokenRateSection()
    prediction: PredictionSection = PredictionSection()
    serve: ServeSection | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _the_way_of_the_server(self) -> EvaluateConfig:
        """What is served stands beside what is drafted and counted alike here."""
        if self.serve is not None:
            if self.serve.engine not in self.drafting:
                self.drafting = [*self.drafting, self.serve.engine]
            if self.serve.gguf is None and Path(self.target.path).suffix == ".gguf":
                self.serve.gguf = Path(self.target.path)  # before it is unpacked
        return self


class ServedConfig(EvaluateConfig):
    """dist-train evaluate --server URL: what a server's own counters say on the same prompts."""

    server: str
    """address of an OpenAI-compatible vLLM server"""
    drafters: dict[str, Path] = Field(default={})
    """not used: the server has its own"""
    model: str | None = None
    """name under which the server has the target; null: the first that it lists"""
    concurrency: PositiveInt = 32
    """requests under way at once"""
    beside: Path | None = None
    """results folder of `evaluate`, shown beside the served figures"""
    timeout: PositiveInt = 600
    """seconds for one whole answer"""

    @model_validator(mode="after")
    def _address_without_secrets(self) -> ServedConfig:
        try:
            refuse_secrets(self.server)
        except ValueError as error:
            raise ValueError(f"server {error}") from None
        return self
