"""Whether a drafter trained with one tokenizer can draft for a target served with another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dist_train.tokenizer.base import Tokenizer
from dist_train.tokenizer.huggingface import HuggingFaceTokenizer
from dist_train.tokenizer.sentencepiece import SentencePieceTokenizer

PROBES = (
    *("The quick brown fox.", " leading space", "trailing space ", "two  spaces", "   three", "a ", ""),
    *("a\nb", "\n\nlines\n", "tab\there", "1234567890", "3.14e-10", "def f(x):\n    return  x", "x" * 300),
    *("naïve café", "日本語のテキスト", "🙂 emoji 👩‍👩‍👧", "ﬁ ligature", "zero\u200bwidth", "\u0007bell"),
    *("</s><s>[INST] not special [/INST]", "▁ marker", "  ▁ "),
)
"""Texts on which tokenizers that seem alike are known to differ."""


def differences(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Why a drafter trained with `a` cannot draft for a target served with `b`, one line each; empty if it can."""
    found = []
    if a.vocab_size != b.vocab_size:
        found.append(f"vocabulary: {a.vocab_size} pieces, {b.vocab_size} pieces")
    if difference := piece_difference(a, b):
        found.append(difference)
    found += [
        f"{name}: {getattr(a, name)}, {getattr(b, name)}"
        for name in ("bos_id", "eos_id", "adds_bos", "byte_fallback")
        if getattr(a, name) != getattr(b, name)
    ]
    if difference := _encoding_difference(a, b, texts):
        found.append(f"encoding: {difference}")
    return found


def piece_difference(a: Tokenizer, b: Tokenizer, but: Collection[int] = ()) -> str | None:
    """The ids that both have, `but` some, and that stand for different pieces, in one line."""
    both = range(min(a.vocab_size, b.vocab_size))
    changed = [i for i in both if a.piece(i) != b.piece(i) and i not in but]
    if not changed:
        return None
    i = changed[0]
    return f"pieces: {len(changed)} ids differ, the first is {i}: {a.piece(i)!r}, {b.piece(i)!r}"


def conversion_note(tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """What users of a folder should know that holds a sentencepiece model and another conversion of it."""
    folder = Path(tokenizer.source).parent
    if not isinstance(tokenizer, SentencePieceTokenizer) or not (folder / "tokenizer.json").exists():
        return None
    difference = _encoding_difference(tokenizer, HuggingFaceTokenizer(str(folder)), texts)
    if difference is None:
        return None
    return (
        f"note: {folder}: tokenizer.json encodes unlike tokenizer.model, which all stages use: {difference}; "
        "what dist-train export writes agrees"
    )


def _encoding_difference(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> str | None:
    different = [
        text
        for text, one, other in zip(texts, a.encode_batch(texts), b.encode_batch(texts), strict=True)
        if one != other
    ]
    if not different:
        return None
    text = different[0]
    share = f"{len(different)} of {len(texts)} texts ({len(different) / len(texts):.1%})"
    return f"{share} differ, the first is {text[:60]!r}: {_start(a, text)}, {_start(b, text)}"


def _start(tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(text)
    return f"{ids[:12]}{' ...' if len(ids) > 12 else ''}"
