"""Sentencepiece's ids at several times its speed: each distinct word is encoded once, and the rest is array work.

In a Llama-2-style vocabulary no piece has a space marker after another character. A merge of byte-pair encoding joins
two neighbours into a piece, so none ever joins the end of a word with the marker that begins the next: a text may be
cut before each such marker, and its ids are those of its words, one after the other. Likewise it may be cut on both
sides of a character that no longer piece contains: in Llama 2's a line feed, a tab, each digit. `can_split` checks
everything that this rests on; where it does not hold, sentencepiece encodes whole texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Array = npt.NDArray[Any]

_MARKER = "\u2581"
_SPACE = 0x20
_TABLE_BYTES = 256 << 20  # the table of known words is emptied when it has grown to this


def can_split(processor: SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words under this model."""
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = protocol.ModelProto.FromString(processor.serialized_model_proto())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    return (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback  # else neighbouring unknown characters of two words become one id
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap  # the identity: text is not rewritten before it is cut
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not any(piece.type == piece.USER_DEFINED for piece in model.pieces)  # these are found across words
        and not any(_MARKER in piece.piece.lstrip(_MARKER) for piece in model.pieces)
    )


class WordwiseEncoder:
    """Encodes batches of texts with a model for which `can_split` holds."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self._lone_marker = processor.piece_to_id(_MARKER)
        self._stands_alone = _standing_alone(processor)
        alone = np.flatnonzero(self._stands_alone)
        # Before a word without a space goes a character that never joins it; its ids are then taken off again.
        self._before = chr(alone[0]) if len(alone) else ""
        self._before_length = len(processor.encode(self._before))
        self._forget()

    def _forget(self) -> None:
        """Empty the table: from a word (UTF-8, with its spaces) to its number, and from that to its ids' place."""
        self._numbers: dict[bytes, int] = {}
        self._ids = np.empty(0, np.int32)
        self._starts = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)
        self._bytes = 0

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Ids of all texts one after the other, int32 [tokens], and how many each has, int64 [texts]."""
        # To sentencepiece a space and the marker that stands for it are the same; each text begins with one more.
        documents = [text.replace(_MARKER, " ").encode() if _MARKER in text else text.encode() for text in texts]
        sizes = np.fromiter((len(document) + 1 if document else 0 for document in documents), np.int64, len(documents))
        data = b"".join(b" " + document for document in documents if document)
        if not data:
            return np.empty(0, np.int32), np.zeros(len(texts), np.int64)
        text_ends = np.cumsum(sizes)
        word_starts = _word_starts(data, text_ends - sizes, self._stands_alone)
        words = _words(data, word_starts).dictionary_encode()
        numbers = self._look_up(words.dictionary)[words.indices.to_numpy()]

        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        ids = self._ids[np.repeat(self._starts[numbers] - (ends - lengths), lengths) + np.arange(ends[-1])]
        last_words = np.searchsorted(word_starts, text_ends)  # of each text: the words that begin before its end
        token_ends = np.concatenate([[0], ends])[last_words]
        return ids, np.diff(token_ends, prepend=0)

    def _look_up(self, words: pa.Array) -> Array:
        """The numbers of distinct words; unknown ones are encoded and remembered."""
        if self._bytes > _TABLE_BYTES:
            self._forget()
        listed = words.to_pylist()
        numbers = np.fromiter(map(self._numbers.get, listed, itertools.repeat(-1)), np.int64, len(listed))
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            first = len(self._numbers)
            self._learn([listed[i] for i in unknown.tolist()])
            numbers[unknown] = np.arange(first, len(self._numbers))
        return numbers

    def _learn(self, words: list[bytes]) -> None:
        # The model puts a marker before each text, which stands for a word's first space.
        encoded = self._processor.encode(
            [(word[1:] if word[0] == _SPACE else self._before.encode() + word).decode() for word in words]
        )
        for number, word in enumerate(words):
            if word[0] != _SPACE:
                del encoded[number][: self._before_length]
            elif len(word) == 1:
                encoded[number] = [self._lone_marker]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int32, int(lengths.sum()))
        self._numbers.update(zip(words, range(len(self._numbers), len(self._numbers) + len(words)), strict=True))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])
        self._bytes += sum(map(len, words)) + 150 * len(words) + ids.nbytes  # 150: a dictionary's entry, measured


def _standing_alone(processor: SentencePieceProcessor) -> Array:
    """Which bytes are characters, other than the space, that no longer piece contains; bool [256]."""
    plain = (
        piece for i in range(processor.vocab_size()) if not processor.is_byte(i) for piece in [processor.id_to_piece(i)]
    )
    joined = {character for piece in plain if len(piece) > 1 for character in piece}
    alone = np.zeros(256, bool)
    alone[[code for code in range(128) if chr(code) not in joined and code != _SPACE]] = True
    return alone


def _word_starts(data: bytes, text_starts: Array, stands_alone: Array) -> Array:
    """Where words begin in `data`: at a space after another character, around one standing alone, with each text."""
    codes = np.frombuffer(data, np.uint8)
    is_space, is_alone = codes == _SPACE, stands_alone[codes]
    begins = is_space | is_alone
    begins[1:] &= ~is_space[:-1] | is_alone[1:]
    begins[1:] |= is_alone[:-1]
    begins[text_starts[text_starts < len(data)]] = True
    return np.flatnonzero(begins)


def _words(data: bytes, starts: Array) -> pa.LargeBinaryArray:
    """The words as an Arrow array over the same bytes."""
    offsets = np.append(starts, len(data))
    return pa.Array.from_buffers(pa.large_binary(), len(starts), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
