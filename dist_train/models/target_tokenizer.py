"""The tokenizer through which a target is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.models.load import check_vocabulary, read_target_config
from dist_train.runtime.world import tell_once
from dist_train.tokenizer import PROBES, Tokenizer, differences, load_tokenizer, piece_difference

_UNSEEN = "taken for the target's without a look"


def named_tokenizer(section: TargetSection | None, source: str | None, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer at `source`, or where that is None the target's own, at its revision; compared with nothing.

    `chat_template`: as for `load_tokenizer`.
    """
    if section is not None and source in (None, section.path):
        return load_tokenizer(section.path, section.revision, chat_template)
    return load_tokenizer(str(source), chat_template=chat_template)


def load_target_tokenizer(
    section: TargetSection | None, source: str | None, chat_template: str | None = None, *, strict: bool = True
) -> Tokenizer:
    """As `named_tokenizer`, and the target's, if there is a target; no model is loaded.

    Where no `chat_template` is named, it is the target's, which its server renders, if it has one. Raises UserError
    where `source` is not what the target has beside it, or has ids that the target does not know. Not `strict`: where
    the same id stands for another piece. A target whose tokenizer got more of them, or cuts texts in another way, can
    judge the ids of a corpus all the same.
    """
    tokenizer = named_tokenizer(section, source, chat_template)
    if section is None:
        return tokenizer
    if read_target_config(section).vocab_size < tokenizer.vocab_size:
        check_vocabulary(section, tokenizer.vocab_size, tokenizer.source)
    if source in (None, section.path):
        return tokenizer
    try:
        own = named_tokenizer(section, None)
    except UserError as error:
        tell_once(f"{source}: {_UNSEEN}: {error}")
        return tokenizer
    _refuse_unlike(tokenizer, own, str(source), section, strict=strict)
    if chat_template is None:
        _take_chat_template(tokenizer, own)
    return tokenizer


def _take_chat_template(tokenizer: Tokenizer, own: Tokenizer) -> None:
    """Give a tokenizer the chat template of the target's own."""
    if not own.chat_template or own.chat_template == tokenizer.chat_template:
        return
    if tokenizer.chat_template:
        tell_once(f"{tokenizer.source}: its chat template is not that of {own.source}, which is used")
    tokenizer.use_chat_template(own.chat_template)


def compare_with_target(tokenizer: Tokenizer, source: str, section: TargetSection, *, strict: bool) -> str | None:
    """Raise UserError where the tokenizer of `source` is not the target's; say why not where that cannot be told."""
    try:
        own = named_tokenizer(section, None)
    except UserError as error:
        return f"{_UNSEEN}: {error}"
    _refuse_unlike(tokenizer, own, source, section, strict=strict)
    return None


def _refuse_unlike(tokenizer: Tokenizer, own: Tokenizer, source: str, section: TargetSection, *, strict: bool) -> None:
    found = differences(tokenizer, own, PROBES) if strict else [piece_difference(tokenizer, own)]
    if why := "; ".join(filter(None, found)):
        raise UserError(f"{source} is not the tokenizer of {section.path}: {why}; set tokenizer={section.path}")


def end_ids(tokenizer: Tokenizer, generation: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence and what a GenerationConfig (or None) has beside it."""
    stops: int | Sequence[int] | None = getattr(generation, "eos_token_id", None)
    return list(dict.fromkeys([tokenizer.eos_id, *([stops] if isinstance(stops, int) else stops or [])]))
