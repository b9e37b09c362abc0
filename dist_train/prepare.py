"""`dist-train prepare`: the tokenizer meets `data_shards`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import data_shards
from data_shards import DataError, Encoded, Encoding
from data_shards.inputs import Record, find_files
from dist_train.config import PrepareConfig
from dist_train.errors import UserError
from dist_train.progress import Progress
from dist_train.tokenizer import Tokenizer, load_tokenizer


def check(config: PrepareConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    find_files(config.inputs)
    load_tokenizer(config.tokenizer)


def run(config: PrepareConfig) -> None:
    """Tokenize; on every rank of MPI's world."""
    check(config)
    comm = _communicator()
    tokenizer = load_tokenizer(config.tokenizer)
    is_chat = config.format == "chat"
    encoder = ChatEncoder(tokenizer, config) if is_chat else TextEncoder(tokenizer, config)
    began = time.monotonic()
    with _Bar(enabled=comm.rank == 0) as bar:
        summary = data_shards.prepare(
            config.inputs,
            config.out,
            encoder,
            comm,
            sequence_length=config.sequence_length if is_chat else None,
            unit_bytes=config.shard_bytes,
            progress=bar.update,
        )
    if comm.rank == 0:
        packs = f", {summary.packs:,} packs of {config.sequence_length}" if is_chat else ""
        left_out = f", {summary.unpackable:,} left out as too long" if summary.unpackable else ""
        ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''}"
        print(
            f"prepare: {summary.tokens:,} tokens in {summary.documents:,} documents, {summary.shards} shards{packs}"
            f"{left_out}; {ranks}, {time.monotonic() - began:.1f} s; {config.out}",
            flush=True,
        )


class TextEncoder:
    """Records with a text field, as documents between BOS and EOS."""

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._field = tokenizer, config.text_field
        self._before = [tokenizer.bos_id] if config.bos and tokenizer.bos_id is not None else []
        self._after = [tokenizer.eos_id] if config.eos else []
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bool(self._before), config.eos)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; empty texts give no document."""
        texts = [text for record in records if (text := _text(record, self._field))]
        documents = [[*self._before, *ids, *self._after] for ids in self._tokenizer.encode_batch(texts)]
        return Encoded(_flat(documents), _lengths(documents), None)


class ChatEncoder:
    """Records with a prompt and a response, or already with their ids; the response is what is trained on."""

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._prompt, self._response = tokenizer, config.prompt_field, config.response_field
        # The chat template decides where BOS and EOS stand.
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bos=False, eos=False)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; a response that ends by itself ends with EOS."""
        pairs = [self._ids(record) for record in records]
        pairs = [(prompt, response) for prompt, response in pairs if response]
        documents = [[*prompt, *response] for prompt, response in pairs]
        masks = [[0] * len(prompt) + [1] * len(response) for prompt, response in pairs]
        return Encoded(_flat(documents), _lengths(documents), _flat(masks))

    def _ids(self, record: Record) -> tuple[list[int], list[int]]:
        if "prompt_ids" in record and "response_ids" in record:
            return list(record["prompt_ids"]), list(record["response_ids"])
        prompt = self._tokenizer.encode_prompt([{"role": "user", "content": _text(record, self._prompt)}])
        response = self._tokenizer.encode(_text(record, self._response))
        return prompt, [*response, self._tokenizer.eos_id] if response else []


def _text(record: Record, field: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise DataError(f"a record has no text in {field!r}; its fields are {', '.join(record)}; set the field's name")
    return text


def _flat(documents: Sequence[Sequence[int]]) -> Any:
    return np.fromiter((i for document in documents for i in document), dtype=np.int64)


def _lengths(documents: Sequence[Sequence[int]]) -> Any:
    return np.array([len(document) for document in documents], dtype=np.int64)


class _Bar:
    """Progress in bytes, whose total is known only at the first report."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None

    def update(self, done: int, total: int) -> None:
        """Bytes of input done, of all that rank 0 has."""
        if self._progress is None:
            self._progress = Progress("prepare", total, "B", enabled=self._enabled, scale=True)
        self._progress.update(done)

    def __enter__(self) -> _Bar:
        """Nothing to do yet."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


class _OneProcess:
    """Stands in for MPI's communicator where there is no MPI library and none is asked for."""

    rank, size = 0, 1

    def allgather(self, value: Any) -> list[Any]:
        """Nobody else's."""
        return [value]


def _communicator() -> Any:
    """MPI's world. Raises UserError when a launcher started more processes than MPI knows of."""
    try:
        from mpi4py import MPI

        world: Any = MPI.COMM_WORLD
    except (ImportError, RuntimeError):
        world = _OneProcess()
    expected = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("PMI_SIZE") or 1)
    if world.size != expected and world.size == 1:
        raise UserError(
            f"started as {expected} tasks, but MPI sees 1: each would do all the work; use srun --mpi=pmi2 or pmix as "
            "the site's MPI needs, or mpiexec"
        )
    return world
