"""`dist-train prepare`: the tokenizer meets `data_shards`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import data_shards
from data_shards import PrepareSummary, ShardedTokens
from data_shards.inputs import dataset_files, find_files
from data_shards.ranks import Communicator, together
from dist_train.config import PrepareConfig
from dist_train.errors import UserError, printable
from dist_train.prepare.encoders import ChatEncoder, TextEncoder
from dist_train.runtime.mpi import communicator
from dist_train.runtime.progress import Progress, phase
from dist_train.tokenizer import load_tokenizer
from dist_train.work.units import refuse_partial

_FAULTS_SHOWN = 20


def check(config: PrepareConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    if config.verify:
        ShardedTokens(config.out)
    else:
        find_files(_inputs(config))
    if config.tokenizer:
        load_tokenizer(config.tokenizer, chat_template=config.chat_template)


def run(config: PrepareConfig) -> None:
    """Tokenize, or verify what was; on every rank of MPI's world."""
    comm = communicator()
    together(comm, lambda: (_verify if config.verify else _make)(config, comm))


def _inputs(config: PrepareConfig) -> str | list[str]:
    if config.dataset:
        return dataset_files(**config.dataset.model_dump())
    for entry in [config.inputs] if isinstance(config.inputs, str) else config.inputs:
        refuse_partial(Path(entry))
    return config.inputs


def _verify(config: PrepareConfig, comm: Communicator) -> None:
    corpus = ShardedTokens(config.out)
    if config.tokenizer and load_tokenizer(config.tokenizer).sha256 != corpus.encoding.tokenizer:
        raise UserError(f"{config.out}: made with another tokenizer than {config.tokenizer}; prepare it again")
    with phase(f"comparing {config.out} with its checksums"):
        together(comm, lambda: corpus.verify(comm.rank, comm.size))
    if comm.rank == 0:
        size = f"{len(corpus):,} tokens in {corpus.num_documents:,} documents"
        print(f"prepare: {config.out}: {size}, every byte as written", flush=True)


def _make(config: PrepareConfig, comm: Communicator) -> None:
    tokenizer = load_tokenizer(config.tokenizer, chat_template=config.chat_template)
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
        print(printable(f"prepare: left out ({fault.kind}): {fault.where}: {fault.reason}"), flush=True)
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


class _Bar:
    """Progress in bytes, whose total is known only at the first report."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None
        self._open = ExitStack()
        self._began = time.monotonic()

    def update(self, done: int, total: int, tokens: int) -> None:
        """Bytes of input done, of all that rank 0 has, and tokens made of them."""
        if self._progress is None:
            self._progress = self._open.enter_context(
                Progress("prepare", total, "B", enabled=self._enabled, scale=True)
            )
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = {"MB/s a rank": done / 1e6 / seconds, "tokens/s": tokens / seconds}
        self._progress.update(done, **speed)

    def __enter__(self) -> _Bar:
        """Nothing to do yet."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the bar off the screen."""
        self._open.close()
