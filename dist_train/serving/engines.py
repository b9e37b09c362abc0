"""vLLM and llama.cpp as an evaluation starts them: what of a pair of models each loads, and how it answers a prompt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from dist_train.config import ServeSection, TargetSection
from dist_train.errors import UserError
from dist_train.models.chains import parallel_of
from dist_train.models.drafter import find_model, read_drafter_config
from dist_train.models.load import read_target_config
from dist_train.models.sizes import cached
from dist_train.runtime.progress import phase
from dist_train.serving import llama_cpp, vllm
from dist_train.serving.gguf import find_converter, write_gguf
from dist_train.serving.http import Client
from dist_train.serving.launch import ServerCommand
from dist_train.tokenizer import Tokenizer

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_GGUF_TYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
_EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-ctkd", "f32", "-ctvd", "f32")
"""llama.cpp's caches are fp16 whatever the weights are."""
_LEAST_CACHE = 1 << 28
_WEIGHTS = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
EXPORTED = "drafter.gguf"
"""What `dist-train export gguf=true` calls it."""


class Asked(NamedTuple):
    """A prompt and how it is answered."""

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


class Answer(NamedTuple):
    """Ids of an answer; of those after the first, how many the target's calls gave, and these calls; whether it was
    drafted at all.
    """

    ids: list[int]
    given: int
    calls: int
    is_drafted: bool


class Engine(Protocol):
    """A server that is not started yet."""

    title: str

    def load(self, drafters: dict[str, Path], folder: Path) -> None:
        """Write what it loads of target and drafters into `folder`, where it cannot take them as they lie."""

    def weights(self) -> str:
        """What is served, in words."""

    def command(self, drafter: str | None, gamma: int, slots: int, positions: int) -> ServerCommand:
        """How it is started, to answer `slots` prompts at a time, each of `positions` tokens with its answer."""

    def version(self, client: Client) -> str:
        """Of the server that answers."""

    def answer(self, client: Client, asked: Asked, gamma: int) -> Answer:
        """Have one prompt answered. Raises UserError where that fails."""


def find_engine(section: ServeSection, target: TargetSection, tokenizer: Tokenizer, end_ids: Sequence[int]) -> Engine:
    """The engine that the section names. Raises UserError where its program is not there."""
    engine = Vllm if section.engine == "vllm" else LlamaCpp
    return engine(section, target, tokenizer, end_ids)


class Vllm:
    """vLLM: reads Hugging Face folders."""

    title = "vLLM"

    def __init__(self, section: ServeSection, target: TargetSection, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self._section, self._target, self._tokenizer, self._end_ids = section, target, tokenizer, end_ids
        self._dtype = section.dtype or target.precision
        self._drafters: dict[str, Path] = {}
        self._model = ""
        given = section.program or _named("DIST_TRAIN_VLLM_PYTHON")
        found = given or _beside(shutil.which("vllm"), "python")
        if found is None or not found.is_file():
            raise UserError(
                f"serve.program: {found or 'no vllm on PATH'}: no Python that has vLLM; name it, or set "
                "DIST_TRAIN_VLLM_PYTHON"
            )
        self._python = found

    def load(self, drafters: dict[str, Path], folder: Path) -> None:
        """Nothing is written: vLLM takes no tokenizer of a drafter."""
        self._drafters = {name: find_model(path) for name, path in drafters.items()}

    def weights(self) -> str:
        """What is served, in words."""
        return self._dtype

    def command(self, drafter: str | None, gamma: int, slots: int, positions: int) -> ServerCommand:
        """On GPUs `slots` says nothing to vLLM, which takes what their memory holds."""
        import torch

        more = ["--no-enable-prefix-caching"]  # prompts come again at another concurrency
        if not torch.cuda.is_available():  # else it wants 92 % of all memory, and ends where others have some of it
            more += ["--kv-cache-memory-bytes", str(self._caches(drafter, slots, positions))]
        if self._target.revision:
            more += ["--revision", self._target.revision]
        if self._target.trust_remote_code:
            more.append("--trust-remote-code")
        return vllm.vllm_command(
            self._python,
            self._target.path,
            drafter=self._drafters[drafter] if drafter else None,
            gamma=gamma,
            sampled=True,
            parallel=drafter is not None and parallel_of(read_drafter_config(self._drafters[drafter])) is not None,
            dtype=_DTYPES[self._dtype],
            positions=positions,
            more=[*more, *self._section.arguments],
        )

    def _caches(self, drafter: str | None, slots: int, positions: int) -> int:
        """Bytes for the keys and values of `slots` texts in fp32, twice, since blocks of them are never full."""
        configs = [read_target_config(self._target)]
        if drafter:
            configs.append(read_drafter_config(self._drafters[drafter]))
        return max(_LEAST_CACHE, 2 * 4 * sum(map(cached, configs)) * slots * positions)

    def version(self, client: Client) -> str:
        """Of the server that answers; and remember what it calls the target."""
        self._model = str(client.ask_for_object("GET", "/v1/models")["data"][0]["id"])
        return str(client.ask_for_object("GET", "/version").get("version", ""))

    def answer(self, client: Client, asked: Asked, gamma: int) -> Answer:
        """Have one prompt answered."""
        ids, limit, temperature, top_p, _ = asked
        found = vllm.complete(client, self._model, ids, limit, temperature, top_p, self._end_ids)
        if gamma and not found.calls and len(found.tokens) > 1:
            raise UserError(f"{client.url}: answers without a word of its drafts; is it a vLLM before 0.32?")
        return Answer(found.tokens, found.calls + found.accepted, found.calls, found.calls > 0)


class LlamaCpp:
    """llama-server: reads GGUF files."""

    title = "llama.cpp"

    def __init__(self, section: ServeSection, target: TargetSection, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self._section, self._target, self._tokenizer, self._end_ids = section, target, tokenizer, end_ids
        self._dtype = section.dtype or target.precision
        self._files: dict[str | None, Path] = {}
        given = section.program or _named("DIST_TRAIN_LLAMA_CPP")
        on_path = shutil.which(llama_cpp.SERVER)
        if given is None and on_path is None:
            raise UserError(
                f"serve.program: no {llama_cpp.SERVER} on PATH; name it or llama.cpp's built source folder, or set "
                "DIST_TRAIN_LLAMA_CPP"
            )
        found = given or Path(str(on_path))
        self._program = llama_cpp.find_program(found, llama_cpp.SERVER) if found.is_dir() else found
        if not self._program.is_file():
            raise UserError(f"serve.program: {found}: not there")
        self._sources = found if found.is_dir() else found.parent
        if section.gguf is None:
            find_converter(self._sources)

    def load(self, drafters: dict[str, Path], folder: Path) -> None:
        """Convert what is no GGUF file yet, of which an exported drafter may have one."""
        target = self._section.gguf
        if target is None:
            target = folder / "target.gguf"
            with phase("converting the target to GGUF"):
                write_gguf(_local(self._target), target, self._sources, _GGUF_TYPES[self._dtype])
        self._files[None] = target
        for number, (name, path) in enumerate(drafters.items()):
            source = find_model(path)
            self._files[name] = source / EXPORTED
            if not self._files[name].is_file():
                self._files[name] = folder / f"drafter-{number}.gguf"
                whole = _with_tokenizer(source, self._tokenizer, folder / f"drafter-{number}")
                write_gguf(whole, self._files[name], self._sources, _GGUF_TYPES[self._dtype])

    def weights(self) -> str:
        """What is served, in words."""
        own = [file.name for file in (self._section.gguf, *self._files.values()) if file and file.name == EXPORTED]
        target = self._section.gguf.name if self._section.gguf else self._dtype
        return f"{target}, drafters {self._dtype}" if self._section.gguf and not own else ", ".join([target, *own])

    def command(self, drafter: str | None, gamma: int, slots: int, positions: int) -> ServerCommand:
        """Its caches are fp32 where the weights are."""
        exact = _EXACT if self._dtype == "fp32" and self._section.gguf is None else ()
        return llama_cpp.llama_cpp_command(
            self._program,
            self._files[None],
            drafter=self._files[drafter] if drafter else None,
            gamma=gamma,
            slots=slots,
            positions=positions,
            more=[*exact, *self._section.arguments],
        )

    def version(self, client: Client) -> str:
        """Of the server that answers."""
        return str(client.ask_for_object("GET", "/props").get("build_info", ""))

    def answer(self, client: Client, asked: Asked, gamma: int) -> Answer:
        """Have one prompt answered."""
        found = llama_cpp.complete(client, *asked)
        return Answer(found.tokens, *found.blocks(gamma, self._end_ids), found.drafted > 0)


def _named(variable: str) -> Path | None:
    return Path(os.environ[variable]) if os.environ.get(variable) else None


def _beside(program: str | None, name: str) -> Path | None:
    return Path(program).resolve().parent / name if program else None


def _local(target: TargetSection) -> Path:
    """The target's folder, fetched from the hub where it is not here."""
    if Path(target.path).is_dir():
        return Path(target.path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(target.path, revision=target.revision, allow_patterns=_WEIGHTS))


def _with_tokenizer(source: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """A folder of links to a drafter's files, with the target's tokenizer, which llama.cpp compares."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors" or file.name in ("config.json", "model.safetensors.index.json"):
            (folder / file.name).symlink_to(file.resolve())
    tokenizer.save(folder)
    return folder
