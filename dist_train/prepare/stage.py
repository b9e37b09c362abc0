"""`dist-train prepare`: the tokenizer meets `data_shards`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import data_shards
from data_shards import Encoded, Encoding, PrepareSummary, Rejected, ShardedTokens
from data_shards.inputs import Record, dataset_files, find_files
from data_shards.prepare import together
from dist_train.config import PrepareConfig
from dist_train.errors import UserError
from dist_train.runtime.progress import Progress
from dist_train.tokenizer import Tokenizer, load_tokenizer
from dist_train.tokenizer.wordwise import Array
from dist_train.work.units import refuse_partial

_FAULTS_SHOWN = 20


def check(config: PrepareConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    if config.verify:
        ShardedTokens(config.out)
    else:
        find_files(_inputs(config))
    if config.tokenizer:
        load_tokenizer(config.tokenizer)


def run(config: PrepareConfig) -> None:
    """Tokenize, or verify what was; on every rank of MPI's world."""
    (_verify if config.verify else _make)(config, _communicator())


def _inputs(config: PrepareConfig) -> str | list[str]:
    if config.dataset:
        return dataset_files(**config.dataset.model_dump())
    for entry in [config.inputs] if isinstance(config.inputs, str) else config.inputs:
        refuse_partial(Path(entry))
    return config.inputs


def _verify(config: PrepareConfig, comm: Any) -> None:
    corpus = ShardedTokens(config.out)
    if config.tokenizer and load_tokenizer(config.tokenizer).sha256 != corpus.encoding.tokenizer:
        raise UserError(f"{config.out}: made with another tokenizer than {config.tokenizer}; prepare it again")
    together(comm, lambda: corpus.verify(comm.rank, comm.size))
    if comm.rank == 0:
        size = f"{len(corpus):,} tokens in {corpus.num_documents:,} documents"
        print(f"prepare: {config.out}: {size}, every byte as written", flush=True)


def _make(config: PrepareConfig, comm: Any) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    is_chat = config.format == "chat"
    encoder = ChatEncoder(tokenizer, config) if is_chat else TextEncoder(tokenizer, config)
    began = time.monotonic()
    with _Bar(enabled=comm.rank == 0) as bar:
        summary = data_shards.prepare(
            _inputs(config),
            config.out,
            encoder,
            comm,
            sequence_length=config.sequence_length if is_chat else None,
            unit_bytes=config.shard_bytes,
            policy=config.faults.model_dump(exclude={"max_bytes"}),
            max_bytes=config.faults.max_bytes,
            progress=bar.update,
        )
    if comm.rank == 0:
        _conclude(config, summary, comm.size, time.monotonic() - began)


def _conclude(config: PrepareConfig, summary: PrepareSummary, ranks: int, seconds: float) -> None:
    for fault in summary.named_faults[:_FAULTS_SHOWN]:
        print(f"prepare: left out ({fault.kind}): {fault.where}: {fault.reason}", flush=True)
    if sum(summary.faults.values()) > _FAULTS_SHOWN:
        print(f"prepare: and more, named in {config.out / 'index.json'}", flush=True)
    packs = f", {summary.packs:,} packs of {config.sequence_length}" if summary.packs else ""
    left_out = f", {summary.unpackable:,} left out as too long" if summary.unpackable else ""
    faults = "".join(f", {count:,} {kind.replace('_', ' ')} left out" for kind, count in summary.faults.items())
    size = summary.input_bytes / 1e6
    print(
        f"prepare: {summary.tokens:,} tokens in {summary.documents:,} documents, {summary.shards} shards{packs}"
        f"{left_out}{faults}; {ranks} rank{'s' if ranks > 1 else ''}, {seconds:.1f} s, {size / seconds:.1f} MB/s; "
        f"{config.out}",
        flush=True,
    )


class TextEncoder:
    """Records with a text field, as documents between BOS and EOS."""

    has_mask = False

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._field = tokenizer, config.text_field
        self.fields: Sequence[str] = (config.text_field,)
        self._before = [tokenizer.bos_id] if config.bos and tokenizer.bos_id is not None else []
        self._after = [tokenizer.eos_id] if config.eos else []
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bool(self._before), config.eos)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; empty texts give no document."""
        texts, rejected = [], []
        for index, record in enumerate(records):
            if problem := _problem(record, self._field):
                rejected.append(Rejected(index, *problem))
            else:
                texts.append(record[self._field])
        ids, lengths = self._tokenizer.encode_flat(texts)
        return Encoded(*_enclosed(ids, lengths, self._before, self._after), None, rejected)


def _enclosed(ids: Array, lengths: Array, before: Sequence[int], after: Sequence[int]) -> tuple[Array, Array]:
    """Each document of `ids` between `before` and `after`, and the new lengths."""
    extra = len(before) + len(after)
    if not extra or not len(lengths):
        return ids, lengths
    starts = np.cumsum(lengths) - lengths + extra * np.arange(len(lengths))
    enclosed = np.empty(len(ids) + extra * len(lengths), ids.dtype)
    enclosed[np.arange(len(ids)) + np.repeat(extra * np.arange(len(lengths)) + len(before), lengths)] = ids
    for place, special in enumerate(before):
        enclosed[starts + place] = special
    for place, special in enumerate(after, start=len(before)):
        enclosed[starts + lengths + place] = special
    return enclosed, lengths + extra


class ChatEncoder:
    """Records with a prompt and a response, or already with their ids; the response is what is trained on."""

    has_mask = True

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self._tokenizer, self._prompt, self._response = tokenizer, config.prompt_field, config.response_field
        self.fields: Sequence[str] = (config.prompt_field, config.response_field, *_ID_FIELDS)
        # The chat template decides where BOS and EOS stand.
        self.encoding = Encoding(tokenizer.sha256, tokenizer.vocab_size, bos=False, eos=False)

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode; a response that ends by itself ends with EOS."""
        documents, masks, rejected = [], [], []
        for index, record in enumerate(records):
            if problem := self._problem(record):
                rejected.append(Rejected(index, *problem))
            else:
                prompt, response = self._ids(record)
                documents.append([*prompt, *response])
                masks.append([0] * len(prompt) + [1] * len(response))
        return Encoded(_flat(documents), _lengths(documents), _flat(masks), rejected)

    def _problem(self, record: Record) -> tuple[str, str] | None:
        if _has_ids(record):
            return None if record["response_ids"] else ("empty", "no response")
        return _problem(record, self._prompt) or _problem(record, self._response)

    def _ids(self, record: Record) -> tuple[list[int], list[int]]:
        if _has_ids(record):
            return list(record["prompt_ids"]), list(record["response_ids"])
        prompt = self._tokenizer.encode_prompt([{"role": "user", "content": record[self._prompt]}])
        return prompt, [*self._tokenizer.encode(record[self._response]), self._tokenizer.eos_id]


_ID_FIELDS = ("prompt_ids", "response_ids")  # what generate writes


def _has_ids(record: Record) -> bool:
    return all(name in record for name in _ID_FIELDS)


def _problem(record: Record, field: str) -> tuple[str, str] | None:
    """Kind and reason of a record without a usable text in `field`."""
    text = record.get(field)
    if not isinstance(text, str):
        fields = ", ".join(record)
        return "malformed", f"the record has no text in {field!r}; its fields are {fields} (set the field's name)"
    if not text:
        return "empty", f"no text in {field!r}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return "encoding", f"not Unicode: half a surrogate pair at character {error.start} of {field!r}"
    return None


def _flat(documents: Sequence[Sequence[int]]) -> Any:
    return np.fromiter((i for document in documents for i in document), dtype=np.int64)


def _lengths(documents: Sequence[Sequence[int]]) -> Any:
    return np.array([len(document) for document in documents], dtype=np.int64)


class _Bar:
    """Progress in bytes, whose total is known only at the first report."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def update(self, done: int, total: int, tokens: int) -> None:
        """Bytes of input done, of all that rank 0 has, and tokens made of them."""
        if self._progress is None:
            self._progress = Progress("prepare", total, "B", enabled=self._enabled, scale=True)
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = {"MB/s a rank": done / 1e6 / seconds, "tokens/s": tokens / seconds}
        self._progress.update(done, **speed)

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
