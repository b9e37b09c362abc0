"""A tokenizer that exists only as Hugging Face files (Llama 3, Qwen, ...)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_shards.errors import first_line, shown
from dist_train.errors import UserError
from dist_train.runtime.process_group import quiet_libraries
from dist_train.tokenizer.base import Tokenizer
from dist_train.tokenizer.chat import ChatTemplate, Templates
from dist_train.tokenizer.special import SpecialTokens

_LEAD = "\n"  # before a text that is no beginning; taken off again
_MEND = "put tokenizer.json or tokenizer.model there, or set tokenizer to a folder that has one"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that exists only as Hugging Face files (Llama 3, Qwen, ...)."""

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        quiet_libraries()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # None asks
        except Exception as error:  # what tokenizers raises for a torn file is no narrower
            reason = first_line(error).rstrip(": ")
            raise UserError(f"{source}: no tokenizer can be loaded from it: {reason}; {_MEND}") from error
        # Of a folder that has none of its files transformers makes up an empty tokenizer of the model's family.
        names = {*self._tokenizer.vocab_files_names.values(), "tokenizer.json"}
        if not any((Path(source) / name).exists() for name in names):
            raise UserError(f"{source}: no tokenizer in it: none of {', '.join(sorted(names))}; {_MEND}")
        if not hasattr(self._tokenizer, "backend_tokenizer"):
            raise UserError(f"{source}: its tokenizer runs in Python alone; {_MEND}")
        if not isinstance(self._tokenizer.model_max_length, int | float):
            told = shown(repr(self._tokenizer.model_max_length))
            raise UserError(f"{source}: tokenizer_config.json: model_max_length is {told}, no number; correct it")
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"{source}: its tokenizer has no end-of-sequence token; name one in tokenizer_config.json")
        self.source = source
        self.sha256 = hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        added = {i: str(token) for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.vocab_size, rows = len(self._tokenizer), weight_rows(Path(source))
        if rows is not None and all(i in added for i in range(rows, self.vocab_size)):
            # Special tokens that no text gives, such as a <pad> added for training, and that no model knows.
            self.vocab_size = min(self.vocab_size, rows)
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and self._tokenizer("a").input_ids[:1] == [self.bos_id]
        backend = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self.byte_fallback = bool(backend["model"].get("byte_fallback"))
        special = {
            str(token): (i, token)
            for i, token in self._tokenizer.added_tokens_decoder.items()
            if token.special and i < self.vocab_size
        }
        self.special = SpecialTokens(
            {token: i for token, (i, _) in special.items()},
            strips_left=[token for token, (_, flags) in special.items() if flags.lstrip],
            strips_right=[token for token, (_, flags) in special.items() if flags.rstrip],
        )
        self.chat = ChatTemplate(self._tokenizer, source)

    def use_chat_template(self, templates: Templates) -> None:
        """Put another chat template in the place of the stored one."""
        self._tokenizer.chat_template = templates
        self.chat = ChatTemplate(self._tokenizer, self.source)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens, also where the text spells one out."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _encode_whole(self, rendered: str) -> list[int]:
        return self._tokenizer(rendered, add_special_tokens=False).input_ids

    def _encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        lead = _LEAD if self._begins_once else ""
        skipped = len(self.encode(lead)) if lead else 0
        texts = [part if i == 0 else lead + part for i, part in enumerate(parts) if isinstance(part, str)]
        encoded = iter(self.encode_batch(texts))
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else next(encoded)[skipped if i else 0 :]
        return ids

    @cached_property
    def _begins_once(self) -> bool:
        """Whether only the beginning of all gets a space before it, and no text after a special token."""
        token, token_id = next(iter(self.special_ids.items()), ("", None))
        return self._encode_whole(f"{token}a") != [*([] if token_id is None else [token_id]), *self.encode("a")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids leave no trace."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id."""
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def save(self, folder: Path) -> None:
        """Write Hugging Face's files."""
        self._tokenizer.save_pretrained(folder)


def weight_rows(folder: Path) -> int | None:
    """How many ids the model beside the tokenizer knows; None where there is none, or it does not say."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # told where the model itself is wanted
    return rows if type(rows) is int else None
