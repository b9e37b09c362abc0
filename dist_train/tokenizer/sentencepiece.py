"""A tokenizer that comes as a sentencepiece model, and its conversion for servers that read only `tokenizer.json`.

Hugging Face's own conversion of such models orders merges by id where sentencepiece orders them by score, and so cuts
runs of spaces differently. The one here is ordered by score, so that a server sees what training saw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.errors import UserError
from dist_train.tokenizer.base import Tokenizer
from dist_train.tokenizer.chat import ChatTemplate, Templates, template_reader
from dist_train.tokenizer.special import SpecialTokens
from dist_train.tokenizer.wordwise import Array, WordwiseEncoder, can_split

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers


def load_processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece's own object for a `tokenizer.model`. Raises UserError where it is torn, or is something else."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{model}: not a sentencepiece model, or a torn one; fetch it again") from error


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model`, run by sentencepiece."""

    def __init__(self, model: Path, folder: Path | None = None, *, adds_bos: bool = True) -> None:
        """`folder`: what Hugging Face has beside the model, of which the chat template is taken."""
        self._processor = load_processor(model)
        self.source = str(model)
        self._model = model.read_bytes()
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id = self._processor.eos_id()
        self.adds_bos = adds_bos and self.bos_id is not None
        self.byte_fallback = any(self._processor.is_byte(i) for i in range(self.vocab_size))
        controls = (self._processor.is_control, self._processor.is_unknown)
        self.special = SpecialTokens(
            {self.piece(i): i for i in range(self.vocab_size) if any(is_special(i) for is_special in controls)}
        )
        self._templates = template_reader(folder, self._named_special())
        self.chat = ChatTemplate(self._templates, self.source)

    def _named_special(self) -> dict[str, str]:
        """The special tokens that a chat template knows by name."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._processor.unk_id()}
        return {name: self.piece(i) for name, i in ids.items() if i is not None}

    def use_chat_template(self, templates: Templates) -> None:
        """Put another chat template in the place of the stored one."""
        self._templates.chat_template = templates
        self.chat = ChatTemplate(self._templates, self.source)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS."""
        return self._processor.encode(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """As `encode_batch`, word by word where the model allows that."""
        return super().encode_flat(texts) if self._wordwise is None else self._wordwise(texts)

    @cached_property
    def _wordwise(self) -> WordwiseEncoder | None:
        return WordwiseEncoder(self._processor) if can_split(self._processor) else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids leave no trace."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id."""
        return self._processor.id_to_piece(token_id)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`, and `tokenizer.json` with its configuration and chat template for servers."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        self.as_tokenizers().save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            "bos_token": None,
            **self._named_special(),
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "chat_template": _as_stored(self.chat_template),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def as_tokenizers(self) -> tokenizers.Tokenizer:
        """The same BPE for Hugging Face's `tokenizers`: merges in the order of sentencepiece's scores.

        Only for what Llama-2-style models are: BPE, identity normaliser, dummy prefix, no whitespace removal.
        """
        import tokenizers
        from tokenizers import decoders, models, normalizers, processors

        pieces = [self.piece(i) for i in range(self.vocab_size)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        plain = {
            piece: self._processor.get_score(i)
            for piece, i in vocab.items()
            if not (piece in self.special_ids or self._processor.is_byte(i))
        }
        merges = [
            (-score, at, i, (piece[:at], piece[at:]))
            for i, (piece, score) in enumerate(plain.items())
            for at in range(1, len(piece))
            if piece[:at] in plain and piece[at:] in plain
        ]
        merges.sort(key=lambda merge: (merge[0], merge[2], merge[1]))
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=[pair for *_, pair in merges],
                unk_token=self.piece(self._processor.unk_id()),
                fuse_unk=True,
                byte_fallback=self.byte_fallback,
            )
        )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if self.bos_id is not None and self.adds_bos:
            bos = self.piece(self.bos_id)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, self.bos_id)]
            )
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in self.special_ids]
        )
        return tokenizer


def _as_stored(templates: Templates) -> str | list[dict[str, str]] | None:
    """As tokenizer_config.json holds one template, or several."""
    if not isinstance(templates, dict):
        return templates
    return [{"name": name, "template": template} for name, template in templates.items()]
