"""The gate: what servers ask of a drafter, and more, each check one line with the mend.

vLLM and SGLang load a draft model by its architecture's name and want exactly the target's vocabulary size;
transformers compares that too; llama.cpp compares the vocabularies piece by piece, and whether a BOS is added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from dist_train.errors import UserError
from dist_train.export.reference import Reference, served_chat_template, token_ids
from dist_train.models.load import SPECIAL
from dist_train.models.sizes import refuse_endless
from dist_train.models.weights import weight_files
from dist_train.tokenizer import PROBES, HuggingFaceTokenizer, SentencePieceTokenizer, differences, load_tokenizer

ARCHITECTURE = "LlamaForCausalLM"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
AGAIN = "export again with dist-train export"
# What files raise, and transformers of a configuration whose values it cannot use.
_UNREADABLE = (
    UserError,
    OSError,
    SafetensorError,
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    ZeroDivisionError,
)
_IGNORED = re.compile(
    r"inv_freq$|^lm_head\.weight$"
)  # servers pass over old rotary buffers, and the copy of a tied head


class Check(NamedTuple):
    """One line of the gate."""

    name: str
    verdict: Literal["ok", "warning", "failed"]
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<7}  {self.name}: {self.text}"


def gate(folder: Path, reference: Reference, serving_length: int | None = None) -> list[Check]:
    """Check the Hugging Face folder of a drafter; every check is made, whatever the others found.

    `serving_length`: tokens of the longest sequence to be served; None: the target's longest.
    Raises UserError only where there is no config.json to check.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder}: no config.json that can be read; --check wants an exported folder")
    return [
        _architecture(config),
        _vocabulary(config, reference),
        *_tokenizers(folder, reference),
        _special_ids(config, reference),
        _chat_template(folder, reference),
        _positions(config, reference, serving_length),
        _drafting(config, reference),
        _safetensors_only(folder),
        *_weights(folder, config),
        _generation_config(folder, reference),
    ]


def source_gate(folder: Path, reference: Reference, serving_length: int | None = None) -> list[Check]:
    """The part of the gate that an export cannot mend, made on what is to be exported. Raises as `gate`."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder}: no config.json that can be read; name a run, a checkpoint or a model")
    return [
        _architecture(config),
        _vocabulary(config, reference),
        _positions(config, reference, serving_length),
        _drafting(config, reference),
        next(iter(_weights(folder, config))),
    ]


def _verdict(name: str, fault: str | None, fine: str) -> Check:
    return Check(name, "failed" if fault else "ok", fault or fine)


def _architecture(config: dict[str, Any]) -> Check:
    found = config.get("architectures")
    fault = f"{found}; servers draft with a plain {ARCHITECTURE}, train one" if found != [ARCHITECTURE] else None
    if config.get("auto_map"):
        fault = "asks for code of its own (auto_map), which servers do not run; remove it from config.json"
    elif config.get("quantization_config"):
        fault = "asks for quantized weights (quantization_config), these are not; remove it from config.json"
    return _verdict("architecture", fault, ARCHITECTURE)


def _vocabulary(config: dict[str, Any], reference: Reference) -> Check:
    found, wanted = config.get("vocab_size") or 0, reference.vocab_size
    fault = None
    if not isinstance(found, int):
        return Check("vocabulary size", "failed", f"{found!r} is no number; {AGAIN}")
    if wanted is not None and found != wanted:
        fault = f"{found} entries, the target's vocabulary has {wanted} entries; train with target.path"
    elif found < reference.tokenizer.vocab_size:
        fault = f"{found} entries, fewer than the tokenizer's {reference.tokenizer.vocab_size}; train with that one"
    return _verdict("vocabulary size", fault, f"{found}")


def _tokenizers(folder: Path, reference: Reference) -> list[Check]:
    """Both that a server may read: the sentencepiece model, by llama.cpp's converter, and tokenizer.json, by others."""
    names = {
        "pieces": (("vocabulary", "pieces"), "every id has the target's piece"),
        "tokenizer's special ids": (
            ("bos_id", "eos_id", "adds_bos"),
            "BOS, EOS, and whether BOS is added, as in the target",
        ),
        "encoding": (("byte_fallback", "encoding"), f"{len(PROBES)} difficult texts give the target's ids"),
    }
    faults: dict[str, list[str]] = {name: [] for name in names}
    expected = ["tokenizer.json"] + ["tokenizer.model"] * isinstance(reference.tokenizer, SentencePieceTokenizer)
    missing = [file for file in expected if not (folder / file).exists()]
    faults["pieces"] += [f"{file} is missing" for file in missing]
    try:
        found = [load_tokenizer(folder)]
        if isinstance(found[0], SentencePieceTokenizer) and "tokenizer.json" not in missing:
            found.append(HuggingFaceTokenizer(str(folder)))
    except Exception as error:  # what tokenizers raises for a torn file is no narrower
        return [_verdict(name, f"{' '.join(str(error).split())}; {AGAIN}", "") for name in names]
    for tokenizer in found:
        file = "tokenizer.model" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizer.json"
        for line in differences(tokenizer, reference.tokenizer, PROBES):
            kind = line.partition(":")[0]
            name = next(name for name, (kinds, _) in names.items() if kind in kinds)
            faults[name].append(f"{file}: {line} (the drafter's, the target's)")
    return [
        _verdict(name, f"{'; '.join(faults[name])}; {AGAIN}" if faults[name] else None, fine)
        for name, (_, fine) in names.items()
    ]


def _special_ids(config: dict[str, Any], reference: Reference) -> Check:
    wrong = [
        f"{name} {config.get(name)}, the target's is {wanted}"
        for name, wanted in reference.special.items()
        if token_ids(config.get(name)) != token_ids(wanted)
    ]
    fault = f"{'; '.join(wrong)}; correct config.json, or {AGAIN}" if wrong else None
    shown = ", ".join(f"{name.removesuffix('_token_id')} {config.get(name)}" for name in SPECIAL)
    return _verdict("special ids", fault, shown)


def _chat_template(folder: Path, reference: Reference) -> Check:
    try:
        found = served_chat_template(folder)
    except UserError as error:
        return Check("chat template", "failed", f"{error}; {AGAIN}")
    if not reference.chat_template:
        if found:
            mend = f"name the one that it is served with, chat_template=FILE, or {AGAIN}"
            return Check("chat template", "warning", f"has one, and the target none; {mend}")
        return Check("chat template", "ok", "none, as the target; chat_template=FILE names one")
    fault = None
    if not found:
        fault = f"missing, the target has one; {AGAIN}"
    elif found != reference.chat_template:
        fault = f"another one than the target's; {AGAIN}"
    return _verdict("chat template", fault, "the target's")


def _positions(config: dict[str, Any], reference: Reference, serving_length: int | None) -> Check:
    found, wanted = config.get("max_position_embeddings") or 0, serving_length or reference.max_positions
    if not isinstance(found, int):
        return Check("positions", "failed", f"{found!r} is no number; {AGAIN}")
    if wanted is None or found >= wanted:
        return Check("positions", "ok", f"{found}" + (f", {wanted} wanted" if wanted else ""))
    mend = f"train with drafter.max_positions={wanted}, from this one by drafter.init_from"
    if serving_length is None:
        mend += f"; or set serving_length={found} and serve no more, as the model card then says"
        return Check(
            "positions", "failed", f"{found}, the target has {wanted}; servers stop drafting there, or end; {mend}"
        )
    return Check("positions", "failed", f"{found}, fewer than serving_length {serving_length}; {mend}")


def _drafting(config: dict[str, Any], reference: Reference) -> Check:
    """A block in one pass, where `pard_token` names what stands behind a text then, or a token a pass."""
    mask, tokens = config.get("pard_token"), config.get("parallel_tokens")
    if mask is None:
        return Check("drafting", "ok", "one token a pass")
    fault = None
    if type(mask) is not int or not 0 <= mask < (reference.vocab_size or config.get("vocab_size") or 0):
        fault = f"pard_token {mask!r} is no id of the vocabulary; {AGAIN}"
    elif type(tokens) is not int or tokens < 2:
        fault = f"parallel_tokens {tokens!r}: not so many can be drafted in one pass; {AGAIN}"
    elif mask in {i for ids in reference.special.values() for i in token_ids(ids)}:
        fault = f"pard_token {mask} is in texts and chats; train with another drafter.parallel.mask_id"
    fine = f"up to {tokens} tokens in one pass in vLLM and TensorRT-LLM, elsewhere one token a pass"
    return _verdict("drafting", fault, fine)


def _safetensors_only(folder: Path) -> Check:
    suffixes = {str(path.relative_to(folder)): path.suffix.lower() for path in sorted(folder.rglob("*"))}
    pickles = [name for name, suffix in suffixes.items() if suffix in PICKLES]
    code = [name for name, suffix in suffixes.items() if suffix == ".py"]
    fault = None
    if pickles:
        fault = f"{', '.join(pickles)}: can run code when loaded; remove it"
    elif code:
        fault = f"{', '.join(code)}: code of its own, which servers do not run; remove it"
    elif not any(folder.glob("*.safetensors")):
        fault = f"no weights in safetensors here; {AGAIN}"
    return _verdict("safetensors only", fault, "no pickle, no code")


def _weights(folder: Path, config: dict[str, Any]) -> Iterator[Check]:
    """Names and shapes are those of the configuration, and each weight has the dtype that it names and is finite."""
    try:
        found = dict(_stored(folder))
        wanted = _shapes(config)
    except _UNREADABLE as error:
        unread = f"cannot be read: {' '.join(str(error).split())}; {AGAIN}"
        yield from (_verdict(name, unread, "") for name in ("weights", "dtype"))
        return
    misfits = [f"{name} is missing" for name in wanted if name not in found]
    misfits += [f"{name} is of no layer" for name in found if name not in wanted and not _IGNORED.search(name)]
    misfits += [
        f"{name} is {found[name].shape}, config.json wants {wanted[name]}"
        for name in wanted
        if name in found and found[name].shape != wanted[name]
    ]
    misfits += [f"{name} has values that are not finite" for name, weight in found.items() if not weight.finite]
    more = f"; and {len(misfits) - 2} more" if len(misfits) > 2 else ""
    fault: str | None = f"{'; '.join(misfits[:2])}{more}; {AGAIN}" if misfits else None
    yield _verdict("weights", fault, f"{len(found)} tensors, all that config.json wants, all finite")

    named = str(config.get("dtype") or config.get("torch_dtype"))
    others = sorted({weight.dtype for weight in found.values()} - {named})
    fault = f"config.json says {named}, weights are {', '.join(others)}; {AGAIN}" if others else None
    yield _verdict("dtype", fault, named)


class _Weight(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    finite: bool


def _stored(folder: Path) -> Iterator[tuple[str, _Weight]]:
    """Of every file that the index names, or of the only one."""
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, safe_open is no mapping
                tensor = tensors.get_tensor(key)
                finite = bool(tensor.isfinite().all())
                yield key, _Weight(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), finite)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the model that config.json describes; a tied head is stored with its embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        shape = LlamaConfig(**config)
        refuse_endless(shape)
        with torch.device("meta"):
            model = LlamaForCausalLM(shape)
    except UserError:
        raise
    except Exception as error:  # of sizes that do not fit together torch and transformers raise anything
        raise UserError(f"config.json describes no model that can be made: {error}") from error
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _generation_config(folder: Path, reference: Reference) -> Check:
    found = _read_json(folder / "generation_config.json")
    if found is None:
        return Check("generation config", "failed", f"generation_config.json is missing or torn; {AGAIN}")
    wrong = [
        f"{name} {found.get(name)}, the target's is {wanted}"
        for name, wanted in reference.generation.items()
        if token_ids(found.get(name)) != token_ids(wanted)
    ]
    fault = f"{'; '.join(wrong)}; correct generation_config.json, or {AGAIN}" if wrong else None
    return _verdict("generation config", fault, f"texts end at {token_ids(found.get('eos_token_id'))}")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
