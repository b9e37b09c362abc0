"""Configuration of `dist-train generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dist_train.config.address import carries_openly, check_address
from dist_train.config.base import Section, SeedsSection, TargetSection


class EngineSection(Section):
    """What decodes the answers."""

    kind: Literal["transformers", "openai"] = "transformers"
    """transformers: here, on every rank; openai: a server that speaks OpenAI's protocol (vLLM, SGLang, transformers
    serve)"""
    rows: PositiveInt = 32
    """transformers: answers decoded at a time on each rank; one that ends makes room for the next of its work unit"""
    url: str = ""
    """openai: such as http://node7:8000/v1"""
    model: str | None = None
    """openai: the name under which the server has the target; null: target.path"""
    key_variable: str | None = None
    """openai: environment variable with the server's key, OPENAI_API_KEY say; null: none is sent. A key goes to https
    addresses and to this machine alone"""
    concurrency: PositiveInt = 64
    """openai: requests under way at once, of each process"""
    timeout: PositiveFloat = 600.0
    """openai: seconds until a request without its whole answer is asked again"""
    patience: NonNegativeFloat = 600.0
    """openai: seconds for which a request that fails (429, 5xx, no connection) is tried again"""

    @model_validator(mode="after")
    def _server_has_address(self) -> EngineSection:
        if self.kind == "openai" and not self.url:
            raise ValueError("kind openai needs url, such as http://127.0.0.1:8000/v1")
        if self.url:
            try:
                check_address(self.url)
            except ValueError as error:
                raise ValueError(f"url {error}") from None
        if self.key_variable and carries_openly(self.url):
            raise ValueError(
                f"url {self.url}: a key is not sent in the clear to another machine; use https or a tunnel"
            )
        return self


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class GenerateConfig(Section):
    """dist-train generate: the target answers seed instructions."""

    target: TargetSection
    tokenizer: str | None = None
    """null: the target's own"""
    chat_template: str | None = None
    """Jinja file, or llama2: the chat template instead of the target's own, or where it has none"""
    engine: EngineSection = EngineSection()
    seeds: SeedsSection
    more_seeds: list[SeedsSection] = Field(default=[])
    """further sources; a prompt that is in several counts once"""
    out: Path
    """folder of the answers, Parquet"""
    temperatures: Annotated[list[NonNegativeFloat], BeforeValidator(_listed)] = Field(
        default=[0.0, 0.3, 0.7, 1.0], min_length=1
    )
    """each seed is answered at each; 0: greedy, once whatever top_p and samples"""
    top_p: Annotated[list[Annotated[float, Field(gt=0, le=1)]], BeforeValidator(_listed)] = Field(
        default=[0.95], min_length=1
    )
    """each temperature is combined with each"""
    samples: PositiveInt = 1
    """answers to each seed at each temperature and top_p"""
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 128
    """answers of one work unit and file, which an interruption at most loses; several times engine.rows keeps the rows
    full but for the unit's end"""
    seed: NonNegativeInt = 0
