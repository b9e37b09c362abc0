"""What a drafter must agree with: the target's vocabulary, special ids, chat template and length."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import first_line
from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.models.load import SPECIAL, read_generation_config, read_target_config
from dist_train.models.target_tokenizer import named_tokenizer
from dist_train.tokenizer import Templates, Tokenizer, refuse_torn


@dataclass(frozen=True)
class Reference:
    """Of a target, or where there is none of the tokenizer alone."""

    source: str
    tokenizer: Tokenizer
    vocab_size: int | None
    """exactly the drafter's; None: at least the tokenizer's"""
    special: dict[str, Any]
    """`SPECIAL` as config.json has them; an id, a list of ids, or None"""
    generation: dict[str, Any]
    """`SPECIAL` as generation_config.json has them"""
    chat_template: Templates
    max_positions: int | None


def reference_of_target(section: TargetSection, chat_template: str | None = None) -> Reference:
    """Read a target's configuration and tokenizer, not its weights. Raises UserError where one is missing.

    `chat_template`: file or name of the one that its server is given, if it is not the tokenizer's own.
    """
    config = read_target_config(section)
    special = {name: _known(getattr(config, name, None), config.vocab_size) for name in SPECIAL}
    tokenizer = named_tokenizer(section, None, chat_template)
    return Reference(
        source=section.path,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        special=special,
        generation=_generation_ids(section, special, config.vocab_size),
        chat_template=tokenizer.chat_template,
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def reference_of_tokenizer(tokenizer: Tokenizer) -> Reference:
    """What the tokenizer alone tells."""
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    return Reference(
        source=tokenizer.source,
        tokenizer=tokenizer,
        vocab_size=None,
        special=special,
        generation=copy.deepcopy(special),
        chat_template=tokenizer.chat_template,
        max_positions=None,
    )


def token_ids(ids: int | list[int] | None) -> list[int]:
    """One id, several or none, as a sorted list."""
    return [] if ids is None else sorted(ids) if isinstance(ids, list) else [ids]


def served_chat_template(folder: Path) -> Templates:
    """The chat template that transformers, and with it a server, finds in `folder`."""
    from transformers import AutoTokenizer

    refuse_torn(folder)
    try:
        found: Templates = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template
        return found
    except Exception as error:  # what tokenizers raises for a torn file is no narrower
        reason = first_line(error)
        raise UserError(f"{folder}: transformers loads no tokenizer from it: {reason}") from error


def _known(ids: Any, vocab_size: int) -> Any:
    """None for an id that no token has, such as a padding id of -1: older configurations say "none" so."""
    return ids if all(0 <= i < vocab_size for i in token_ids(ids)) else None


def _generation_ids(section: TargetSection, special: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """generation_config.json may end texts at more ids than config.json; without one config.json's count."""
    found = read_generation_config(section)
    if found is None:
        return copy.deepcopy(special)
    known = {name: _known(getattr(found, name), vocab_size) for name in SPECIAL}
    return {name: special[name] if known[name] is None else known[name] for name in SPECIAL}
