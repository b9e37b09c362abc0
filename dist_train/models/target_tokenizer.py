"""The tokenizer through which a target is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.models.load import check_vocabulary, read_target_config
from dist_train.runtime.world import tell_once
from dist_train.tokenizer import PROBES, Tokenizer, differences, load_tokenizer, piece_difference


def named_tokenizer(section: TargetSection | None, source: str | None) -> Tokenizer:
    """The tokenizer at `source`, or where that is None the target's own, at its revision; compared with nothing."""
    if section is not None and source in (None, section.path):
        return load_tokenizer(section.path, section.revision)
    return load_tokenizer(str(source))


def load_target_tokenizer(section: TargetSection | None, source: str | None, *, strict: bool = True) -> Tokenizer:
    """As `named_tokenizer`, and the target's, if there is a target; no model is loaded.

    Raises UserError where `source` is not what the target has beside it, or has ids that the target does not know. Not
    `strict`: where the same id stands for another piece. A target whose tokenizer got more of them, or cuts texts in
    another way, can judge the ids of a corpus all the same.
    """
    tokenizer = named_tokenizer(section, source)
    if section is None:
        return tokenizer
    if read_target_config(section).vocab_size < tokenizer.vocab_size:
        check_vocabulary(section, tokenizer.vocab_size, tokenizer.source)
    if source in (None, section.path):
        return tokenizer
    if why := compare_with_target(tokenizer, str(source), section, strict=strict):
        tell_once(f"{source}: {why}")
    return tokenizer


def compare_with_target(tokenizer: Tokenizer, source: str, section: TargetSection, *, strict: bool) -> str | None:
    """Raise UserError where the tokenizer of `source` is not the target's; say why not where that cannot be told."""
    try:
        own = named_tokenizer(section, None)
    except UserError as error:
        return f"taken for the target's without a look: {error}"
    found = differences(tokenizer, own, PROBES) if strict else [piece_difference(tokenizer, own)]
    if why := "; ".join(filter(None, found)):
        raise UserError(f"{source} is not the tokenizer of {section.path}: {why}; set tokenizer={section.path}")
    return None


def end_ids(tokenizer: Tokenizer, generation: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence and what a GenerationConfig (or None) has beside it."""
    stops: int | Sequence[int] | None = getattr(generation, "eos_token_id", None)
    return list(dict.fromkeys([tokenizer.eos_id, *([stops] if isinstance(stops, int) else stops or [])]))
