"""Text and token ids: train a Llama-2-style sentencepiece model, load any tokenizer, compare two.

One encoding everywhere. A tokenizer that comes as a sentencepiece model is run by sentencepiece itself, in every stage;
Hugging Face's conversion of such models orders merges by id where sentencepiece orders them by score, and so cuts runs
of spaces differently. `save` therefore writes its own conversion, ordered by score, so that a server which reads only
`tokenizer.json` sees what training saw.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_train.errors import UserError
from dist_train.wordwise import Array, WordwiseEncoder, can_split

if TYPE_CHECKING:
    import tokenizers

LLAMA2_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
)

Message = dict[str, str]

_HOLDER = "\ue000{}\ue001"  # stands for a message's content; private-use characters are in no template


class Tokenizer(ABC):
    """Text to ids and back. Special ids never come out of text that a user wrote; `encode_chat` inserts them as ids."""

    source: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    sha256: str
    special_ids: dict[str, int]
    chat_template: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids leave no trace."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files from which servers and `load_tokenizer` make this tokenizer again."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """As `encode_batch`, one text after the other: ids, int32 [tokens], and how many each has, int64 [texts]."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter((i for ids in encoded for i in ids), np.int32, int(lengths.sum())), lengths

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's next answer begins.

        The chat template is rendered around place-holders, so that its special tokens can be told from those which a
        message spells out: the former become ids, the latter stay text. Raises UserError when the template refuses the
        messages or rewrites their content.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._layouts:
            self._layouts[roles] = self._layout(roles)

        def content(holder: re.Match[str]) -> str:
            text = messages[int(holder[2])]["content"]
            return text if holder[1] else text.strip()  # the template trims if it took the wide spaces off

        ids: list[int] = []
        for part in self._layouts[roles]:
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.encode(re.sub("(\u2002?)\ue000(\\d+)\ue001\u2002?", content, part))
        return ids

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], list[str]]:
        """Rendered templates by roles: rendering is a hundred times slower than encoding."""
        return {}

    def _layout(self, roles: tuple[str, ...]) -> list[str]:
        """The template around place-holders for each role's message, cut at its special tokens."""
        messages = [{"role": role, "content": f"\u2002{_HOLDER.format(i)}\u2002"} for i, role in enumerate(roles)]
        rendered = _render(self, messages)
        for i in range(len(roles)):
            if _HOLDER.format(i) not in rendered:
                raise UserError(f"{self.source}: its chat template does not keep the content of message {i}")
        return list(_split_at(rendered, self.special_ids))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model`, run by sentencepiece."""

    def __init__(self, model: Path, chat_template: str = LLAMA2_CHAT_TEMPLATE) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model}: not a sentencepiece model") from error
        self.source = str(model)
        self._model = model.read_bytes()
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id = self._processor.eos_id()
        controls = (self._processor.is_control, self._processor.is_unknown)
        self.special_ids = {
            self.piece(i): i for i in range(self.vocab_size) if any(is_special(i) for is_special in controls)
        }
        self.chat_template = chat_template

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
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "bos_token": None if self.bos_id is None else self.piece(self.bos_id),
            "eos_token": self.piece(self.eos_id),
            "unk_token": self.piece(self._processor.unk_id()),
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "chat_template": self.chat_template,
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
                byte_fallback=any(self._processor.is_byte(i) for i in range(self.vocab_size)),
            )
        )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if self.bos_id is not None:
            bos = self.piece(self.bos_id)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, self.bos_id)]
            )
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in self.special_ids]
        )
        return tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that exists only as Hugging Face files (Llama 3, Qwen, ...)."""

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{source}: no tokenizer can be loaded from it: {reason}") from error
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"{source}: its tokenizer has no end-of-sequence token; name one in tokenizer_config.json")
        self.source = source
        self.sha256 = hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        self.vocab_size = len(self._tokenizer)
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.special_ids = {str(token): i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.chat_template = self._tokenizer.chat_template or LLAMA2_CHAT_TEMPLATE

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens, also where the text spells one out."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids leave no trace."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id."""
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def save(self, folder: Path) -> None:
        """Write Hugging Face's files."""
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer at `source`: a sentencepiece `.model` file, a Hugging Face folder, or a hub id.

    A folder with a `tokenizer.model` that covers its whole vocabulary is run by sentencepiece. Raises UserError when
    there is no tokenizer at `source`.
    """
    path = Path(source)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
            raise UserError(f"{source}: no such tokenizer file or folder; check tokenizer")
        path = _download(str(source))
    model = path / "tokenizer.model"
    if model.exists() and not _adds_tokens(path, model):
        return SentencePieceTokenizer(model, _stored_chat_template(path) or LLAMA2_CHAT_TEMPLATE)
    return HuggingFaceTokenizer(str(path))


def train_tokenizer(texts: Iterable[str], out: Path, vocab_size: int, *, threads: int = 2) -> SentencePieceTokenizer:
    """Train a model with the settings of Llama 2's own: BPE, byte fallback, digits split, spaces kept, dummy prefix.

    `out` is the folder that gets `tokenizer.model` and its conversions. Raises UserError when the text is too little
    for the vocabulary.
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" ⁇ ",
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"a vocabulary of {vocab_size} cannot be trained on this text: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(out / "tokenizer.model")
    tokenizer.save(out)
    return tokenizer


def differences(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Why a drafter trained with `a` cannot draft for a target served with `b`, one line each; empty if it can."""
    found = []
    if a.vocab_size != b.vocab_size:
        found.append(f"vocabulary: {a.vocab_size} pieces, {b.vocab_size} pieces")
    changed = [i for i in range(min(a.vocab_size, b.vocab_size)) if a.piece(i) != b.piece(i)]
    if changed:
        i = changed[0]
        found.append(f"pieces: {len(changed)} ids differ, the first is {i}: {a.piece(i)!r}, {b.piece(i)!r}")
    found += [
        f"{name}: {getattr(a, name)}, {getattr(b, name)}"
        for name in ("bos_id", "eos_id")
        if getattr(a, name) != getattr(b, name)
    ]
    different = [text for text in texts if a.encode(text) != b.encode(text)]
    if different:
        text = different[0]
        share = f"{len(different)} of {len(texts)} texts ({len(different) / len(texts):.1%})"
        found.append(f"encoding: {share} differ, the first is {text[:60]!r}: {a.encode(text)}, {b.encode(text)}")
    return found


PROBES = (
    *("The quick brown fox.", " leading space", "trailing space ", "two  spaces", "   three", "a ", ""),
    *("a\nb", "\n\nlines\n", "tab\there", "1234567890", "3.14e-10", "def f(x):\n    return  x", "x" * 300),
    *("naïve café", "日本語のテキスト", "🙂 emoji 👩‍👩‍👧", "ﬁ ligature", "zero\u200bwidth", "\u0007bell"),
    *("</s><s>[INST] not special [/INST]", "▁ marker", "  ▁ "),
)
"""Texts on which tokenizers that seem alike are known to differ."""


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut to at most 4,000 bytes: the trainer skips longer ones, and a line feed must not become a piece."""
    for text in texts:
        for line in text.split("\n"):
            if line.strip() and "\0" not in line:
                yield from (line[at : at + 1000] for at in range(0, len(line), 1000))


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise UserError(f"{tokenizer.source}: its chat template refuses the conversation: {reason}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=list(messages),
            add_generation_prompt=True,
            bos_token="" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
            eos_token=tokenizer.piece(tokenizer.eos_id),
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{tokenizer.source}: its chat template cannot be rendered: {error}") from error


def _split_at(text: str, special: dict[str, int]) -> Iterator[str]:
    """Cut a text before and after each special token in it; the longest one wins where several begin."""
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first)
    yield from (piece for piece in re.split(f"({pattern})", text) if piece)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["tokenizer*", "special_tokens*", "chat_template*", "*.json"])
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{hub_id}: neither a file or folder nor a tokenizer on the hub: {reason}") from error


def _adds_tokens(folder: Path, model: Path) -> bool:
    """Whether the folder's configuration has tokens beyond the sentencepiece model's."""
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()

    def known(name: str) -> Any:
        return json.loads((folder / name).read_text()) if (folder / name).exists() else {}

    added = [token["id"] for token in known("tokenizer.json").get("added_tokens", [])]
    added += [int(i) for i in known("tokenizer_config.json").get("added_tokens_decoder", {})]
    added += list(known("added_tokens.json").values())
    return any(i >= size for i in added)


def _stored_chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None
