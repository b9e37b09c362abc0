"""Training a sentencepiece model with the settings of Llama 2's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dist_train.errors import UserError
from dist_train.tokenizer.chat import read_template
from dist_train.tokenizer.sentencepiece import SentencePieceTokenizer


def train_tokenizer(
    texts: Iterable[str], out: Path, vocab_size: int, *, chat_template: str | None = "llama2", threads: int = 2
) -> SentencePieceTokenizer:
    """Train a model with the settings of Llama 2's own: BPE, byte fallback, digits split, spaces kept, dummy prefix.

    `out` is the folder that gets `tokenizer.model`, its conversions and the chat template, a file or the name of a
    packaged one. Raises UserError when the text is too little for the vocabulary, or there is no such template; what
    reading the texts raises goes through.
    """
    import io

    import sentencepiece

    template = None if chat_template is None else read_template(chat_template)
    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting(_sentences(texts), failures),
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
        if failures:  # the trainer made a text of several lines of it
            raise failures[0] from None
        raise UserError(f"a vocabulary of {vocab_size} cannot be trained on this text: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(out / "tokenizer.model")
    tokenizer.use_chat_template(template)
    tokenizer.save(out)
    return tokenizer


def _noting(texts: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """The same texts; what ends them goes to `failures` as well."""
    try:
        yield from texts
    except Exception as error:
        failures.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut to at most 4,000 bytes: the trainer skips longer ones, and a line feed must not become a piece."""
    for text in texts:
        for line in text.split("\n"):
            if line.strip() and "\0" not in line:
                yield from (line[at : at + 1000] for at in range(0, len(line), 1000))
