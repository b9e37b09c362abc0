"""From a path or hub id to a tokenizer: sentencepiece itself wherever a model file covers the vocabulary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.tokenizer.base import Tokenizer
from dist_train.tokenizer.chat import read_template
from dist_train.tokenizer.huggingface import HuggingFaceTokenizer, weight_rows
from dist_train.tokenizer.sentencepiece import SentencePieceTokenizer, load_processor


def load_tokenizer(source: str | Path, revision: str | None = None, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer at `source`: a sentencepiece `.model` file, a Hugging Face folder, or a hub id at `revision`.

    A folder with a `tokenizer.model` that covers its whole vocabulary is run by sentencepiece. `chat_template`: file of
    one, or name of a packaged one, instead of what is stored with the tokenizer. Raises UserError when there is no
    tokenizer at `source`, or no such template.
    """
    template = None if chat_template is None else read_template(chat_template)
    tokenizer = _load(source, revision)
    if template is not None:
        tokenizer.use_chat_template(template)
    return tokenizer


def _load(source: str | Path, revision: str | None) -> Tokenizer:
    path = Path(source)
    if path.is_file():
        if path.suffix == ".json":
            raise UserError(f"{source}: one of a tokenizer's files; set tokenizer to its folder, {path.parent}")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
            raise UserError(f"{source}: no such tokenizer file or folder; check tokenizer")
        path = _download(str(source), revision)
    refuse_torn(path)
    model = path / "tokenizer.model"
    if model.exists() and not _adds_tokens(path, model):
        adds_bos = _read_json(path / "tokenizer_config.json").get("add_bos_token", True)
        return SentencePieceTokenizer(model, path, adds_bos=adds_bos)
    return HuggingFaceTokenizer(str(path))


def refuse_torn(folder: Path) -> None:
    """Raise UserError naming the file of a Hugging Face folder that is no JSON object; transformers names none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _read_json(folder / name)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["tokenizer*", "special_tokens*", "chat_template*", "additional_chat_templates/*", "*.json"]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{hub_id}: neither a file or folder nor a tokenizer on the hub: {reason}") from error


def _adds_tokens(folder: Path, model: Path) -> bool:
    """Whether the folder has tokens beyond the sentencepiece model's that the model beside it, if any, knows."""
    size, rows = load_processor(model).vocab_size(), weight_rows(folder)
    try:
        added = [token["id"] for token in _read_json(folder / "tokenizer.json").get("added_tokens", [])]
        added += [int(i) for i in _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})]
        added += list(_read_json(folder / "added_tokens.json").values())
        return any(size <= i < (rows or math.inf) for i in added)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its added tokens make no sense: {error!r}; fetch the tokenizer again") from error


def _read_json(path: Path) -> dict[str, Any]:
    """What a file of a Hugging Face folder holds; nothing where it is absent. Raises UserError where it is torn."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; fetch the tokenizer again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object but a {type(content).__name__}; fetch the tokenizer again")
    return content
