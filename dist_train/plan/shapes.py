"""How large the models of a plan are: from configurations where they can be read, else from what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config import TargetSection, TrainConfig
from dist_train.config.yaml_text import parse_yaml
from dist_train.errors import UserError

_MOST_PARAMETERS = 1e15  # far above any model, and far below where torch's sizes overflow


@dataclass(frozen=True)
class Size:
    """A model of the Hugging Face configuration `shape`, counted without storage."""

    shape: Any
    parameters: int
    matrix_parameters: int
    """those that a token is multiplied with: all but the embedding table"""

    @property
    def head_parameters(self) -> int:
        """Those of the output head."""
        return int(self.shape.vocab_size * self.shape.hidden_size)


def measure(shape: Any, *, trust_remote_code: bool = False) -> Size:
    """The `Size` of a Hugging Face configuration."""
    from dist_train.models.sizes import matrix_parameters, num_parameters, skeleton

    model = skeleton(shape, trust_remote_code=trust_remote_code)
    return Size(shape, num_parameters(model), matrix_parameters(model))


def llama_of(parameters: float, vocab_size: int) -> Any:
    """A Llama's configuration of so many parameters: as deep as a 128th of its width, as those of 7B and 70B are.

    12 x layers x width^2 parameters of its blocks give the depth, and the MLP takes up what is then missing. Raises
    UserError where a Llama of that size has no sensible shape.
    """
    from transformers import LlamaConfig

    if parameters > _MOST_PARAMETERS:
        raise UserError(f"a target of {parameters:.3g} parameters: too large to plan, at most {_MOST_PARAMETERS:.0e}")
    layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    width = 128 * layers
    left = parameters - 2 * vocab_size * width - 4 * layers * width**2
    if left < 3 * layers * width:
        raise UserError(f"a target of {parameters:.3g} parameters and a vocabulary of {vocab_size}: too small to plan")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=round(left / (3 * layers * width)),
        num_hidden_layers=layers,
        num_attention_heads=layers,
    )


def target_size(section: TargetSection) -> Size:
    """The target's `Size`. Raises UserError that names the flag for targets that are not at hand."""
    from dist_train.models.load import read_target_config

    try:
        return measure(read_target_config(section), trust_remote_code=section.trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}; or plan without it: --target-parameters 7e9") from error


def drafter_shape(config: TrainConfig, vocab_size: int) -> Any:
    """The drafter's configuration: of the weights that it starts from if they are there, else by `drafter`'s sizes."""
    from dist_train.models.drafter import drafter_config, read_drafter_config

    start = config.drafter.init_from
    if start is not None and start.exists():
        return read_drafter_config(start)
    return drafter_config(config.drafter, vocab_size, bos_id=1, eos_id=2)


def tokenizer_vocabulary(tokenizer: str) -> int:
    """Pieces of the tokenizer. Raises UserError that names the flag for one that is not at hand."""
    from dist_train.tokenizer import load_tokenizer

    try:
        return load_tokenizer(tokenizer).vocab_size
    except UserError as error:
        raise UserError(f"{error}; or plan without it: --vocab-size 32000") from error


def stage_of(path: Path | None, words: Sequence[str]) -> str:
    """The stage that a configuration is of, by the keys that only this one has; pretrain if there are none."""
    tree: Any = {}
    if path is not None and path.is_file():
        try:
            tree = parse_yaml(path.read_text())
        except ValueError:
            tree = {}  # told when it is loaded
    keys = {*(tree if isinstance(tree, dict) else {}), *(word.split("=")[0].split(".")[0] for word in words)}
    telling = {"seeds": "generate", "drafters": "evaluate", "inputs": "prepare", "dataset": "prepare"}
    for key, stage in telling.items():
        if key in keys:
            return stage
    return "distill" if "target" in keys and "objective" not in keys else "pretrain"
