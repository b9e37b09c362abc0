"""A GGUF file as the Hugging Face folder that everything here reads: unpacked once, kept by its digest.

What is quantised is multiplied out to fp32, which holds every quantised weight exactly: a drafter that is aligned with
the folder is aligned with the quantised model, which is what llama.cpp serves.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from data_shards.errors import first_line
from data_shards.files import file_xxh64, read_json, write_json
from dist_train.config import Section
from dist_train.errors import UserError

SUFFIX = ".gguf"
_ORIGIN = "dist_train_gguf.json"
_NAMES = ("path", "tokenizer", "init_from")
_MODEL = "model.gguf"
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_DIGITS_APART = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2")
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def unpack_named(config: Section) -> None:
    """In place of every GGUF file that `config` names as a model or tokenizer, name the folder of `unpacked_gguf`."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            unpack_named(value)
        elif name in _NAMES and isinstance(value, str | Path) and Path(value).suffix == SUFFIX:
            setattr(config, name, type(value)(unpacked_gguf(Path(value))))


def gguf_name(folder: str | Path) -> str | None:
    """The name of the GGUF file that a folder was unpacked from; None for any other."""
    origin = Path(folder) / _ORIGIN
    return str(read_json(origin)["file"]) if origin.is_file() else None


def unpacked_gguf(file: Path, cache: Path | None = None) -> Path:
    """The Hugging Face folder of a GGUF file; made where it is not there yet, by one process while others wait.

    It has four bytes a weight, and lies in `cache`, or else in DIST_TRAIN_GGUF_CACHE, or ~/.cache/dist-train/gguf,
    under the digest of the file's content. Raises UserError as `unpack_gguf` does.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    given = os.environ.get("DIST_TRAIN_GGUF_CACHE")
    root = cache or Path(given or Path.home() / ".cache/dist-train/gguf")
    folder = root / file_xxh64(file)
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the kernel when its holder dies
        if not folder.is_dir():
            part = root / f"{folder.name}.part"
            shutil.rmtree(part, ignore_errors=True)  # of one that died
            unpack_gguf(file, part)
            write_json(part / _ORIGIN, {"file": file.name})
            part.rename(folder)
    return folder


def unpack_gguf(file: Path, out: Path) -> None:
    """Write config, weights in fp32, tokenizer, chat template and generation settings of `file` into the folder `out`.

    Raises UserError where it is no GGUF, is torn, or is of a family that transformers cannot read from one.
    """
    from transformers import AutoTokenizer, GgufConfig

    from dist_train.models.load import from_pretrained_whole
    from dist_train.tokenizer.sentencepiece import SentencePieceTokenizer

    # transformers would take whatever configuration lies beside the file for the file's own.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / _MODEL).symlink_to(file.resolve())
        try:
            fields = _read_fields(file)
            model = from_pretrained_whole(
                alone, gguf_file=_MODEL, quantization_config=GgufConfig(dequantize=True), dtype="float32"
            )
            tokenizer: Any = None
            if not (pieces := _sentencepiece_model(fields)):
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=_MODEL)
                _split_digits(tokenizer, fields)
        except ImportError as error:
            raise UserError(f"{file}: reading GGUF takes a package: {first_line(error)}; pip install gguf") from error
        except Exception as error:  # of a torn file the readers raise whatever they stumble over
            reason = first_line(error)
            raise UserError(f"{file}: no model can be read from it: {reason}; is it whole? fetch it again") from error
    _forget_quantisation(model)
    model.generation_config._from_model_config = False  # else transformers makes it anew from config.json
    if ends := list(dict.fromkeys(fields[key] for key in _ENDS if key in fields)):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if sampling := {name: fields[key] for key, name in _SAMPLING.items() if key in fields}:
        model.generation_config.update(do_sample=True, **sampling)
    model.save_pretrained(out)
    if pieces:
        (out / "tokenizer.model").write_bytes(pieces)
        adds_bos = fields.get("tokenizer.ggml.add_bos_token", True)
        tokenizer = SentencePieceTokenizer(out / "tokenizer.model", adds_bos=adds_bos)
        tokenizer.use_chat_template(fields.get("tokenizer.chat_template"))
        tokenizer.save(out)
    else:
        tokenizer.save_pretrained(out)


def _read_fields(file: Path) -> dict[str, Any]:
    """What the file says of itself, by llama.cpp's names. Raises ImportError, or anything where it is torn."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def _sentencepiece_model(fields: dict[str, Any]) -> bytes:
    """The `tokenizer.model` that a vocabulary of Llama 2's kind came from; nothing for another kind.

    transformers makes a tokenizer of its own of it, which puts no space before a text that begins with one; llama.cpp
    and sentencepiece do.
    """
    from sentencepiece import sentencepiece_model_pb2

    if fields["tokenizer.ggml.model"] != "llama" or not fields.get("tokenizer.ggml.add_space_prefix", True):
        return b""
    protocol: Any = sentencepiece_model_pb2  # its classes are made at run time
    model, tokens = protocol.ModelProto(), fields["tokenizer.ggml.tokens"]
    # The kinds of pieces have the same numbers there as here.
    described = zip(tokens, fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"], strict=True)
    for token, score, kind in described:
        model.pieces.add(piece=token, score=score, type=kind)
    trained, normalised = model.trainer_spec, model.normalizer_spec
    trained.model_type = protocol.TrainerSpec.BPE
    trained.vocab_size = len(tokens)
    trained.byte_fallback = protocol.ModelProto.SentencePiece.BYTE in fields["tokenizer.ggml.token_type"]
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos")):
        if (token_id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(trained, f"{name}_id", token_id)
            setattr(trained, f"{name}_piece", tokens[token_id])
    normalised.name = "identity"
    normalised.add_dummy_prefix = True
    normalised.remove_extra_whitespaces = fields.get("tokenizer.ggml.remove_extra_whitespaces", False)
    return model.SerializeToString()


def _split_digits(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Have each digit be a piece before words are, in the vocabularies of which transformers does not know it.

    Without it "\\n\\n4" is cut otherwise than llama.cpp cuts it (llama-vocab.cpp), and than the model learned it.
    """
    from tokenizers import pre_tokenizers

    if fields.get("tokenizer.ggml.pre") in _DIGITS_APART:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _forget_quantisation(model: Any) -> None:
    """What was loaded from quantised weights, and is not any more, cannot be saved until it says so."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
