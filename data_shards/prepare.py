"""Parallel tokenization: MPI ranks turn input files into a committed corpus.

Each rank takes every world-size-th work unit and commits it as one shard with a record beside it; a rerun skips units
whose record is there. When all are, rank 0 gathers the records into the index and removes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_shards.errors import DataError
from data_shards.files import read_json, write_json
from data_shards.format import INDEX, Array, Encoding, ShardedTokens, write_index, write_packs, write_shard
from data_shards.inputs import UNIT_BYTES, Record, Unit, find_files, plan_units, read_records
from data_shards.packing import pack_documents

PLAN = "plan.json"
_BATCH = 1024  # records handed to the encoder at once

Progress = Callable[[int, int], None]


class Encoded(NamedTuple):
    """Documents as ids: flat `ids` [tokens], `lengths` [documents], `mask` [tokens], 1 on response tokens, or None."""

    ids: Array
    lengths: Array
    mask: Array | None


class Encoder(Protocol):
    """Turns records into documents. A record may give none (an empty text)."""

    encoding: Encoding

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode records in order. Raises DataError for a record it cannot read."""


class Communicator(Protocol):
    """What is used of an mpi4py communicator."""

    rank: int
    size: int

    def allgather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""


@dataclass(frozen=True)
class PrepareSummary:
    """What a corpus holds: tokens, documents, packs (0 for plain text), shards, and documents left out of packs."""

    tokens: int
    documents: int
    shards: int
    packs: int = 0
    unpackable: int = 0


def prepare(
    inputs: str | Sequence[str],
    out: Path,
    encoder: Encoder,
    comm: Communicator,
    *,
    sequence_length: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Tokenize `inputs` into the corpus `out`, on all ranks of `comm` together; collective.

    With a `sequence_length` the documents are also packed into sequences of that length. `progress(done, total)` counts
    the input bytes of this rank. A corpus that is already there and was made from the same inputs in the same way is
    left as it is. Raises DataError when it was made otherwise, or when an input is missing or malformed.
    """
    files = find_files(inputs)
    units = plan_units(files, unit_bytes)
    if not units:
        raise DataError(f"{inputs}: the input is empty")
    plan = {
        "inputs": [[str(file), file.stat().st_size] for file in files],
        "unit_bytes": unit_bytes,
        "encoding": encoder.encoding.as_json(),
        "sequence_length": sequence_length,
    }
    _together(comm, lambda: _adopt_plan(out, plan) if comm.rank == 0 else None)
    if not (out / INDEX).exists():
        _together(comm, lambda: _encode_units(out, units, encoder, comm, progress))
        _together(comm, lambda: _commit(out, len(units), encoder.encoding, plan) if comm.rank == 0 else None)
    corpus = ShardedTokens(out)
    unpackable = corpus.num_documents - corpus.num_packed_documents if corpus.num_packs else 0
    return PrepareSummary(corpus.num_tokens, corpus.num_documents, len(units), corpus.num_packs, unpackable)


def _together(comm: Communicator, action: Callable[[], None]) -> None:
    """Do this rank's part and wait for the others; if any fails all raise the first failure, and none waits on."""
    failure = None
    try:
        action()
    except DataError as error:
        failure = str(error)
    failures = [text for text in comm.allgather(failure) if text]
    if failures:
        raise DataError(failures[0])


def _adopt_plan(out: Path, plan: dict[str, Any]) -> None:
    """Begin the folder, or go on with one that was begun in the same way."""
    if (out / INDEX).exists():
        if ShardedTokens(out).index["provenance"] != plan:
            raise DataError(f"{out}: holds a corpus made from other inputs or settings; remove it or write elsewhere")
    elif (out / PLAN).exists():
        if read_json(out / PLAN) != plan:
            raise DataError(f"{out}: was begun with other inputs or settings; remove it or write elsewhere")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be made: {error.strerror}; choose another folder") from error
        write_json(out / PLAN, plan)


def _record_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.json"


def _encode_units(
    out: Path, units: Sequence[Unit], encoder: Encoder, comm: Communicator, progress: Progress | None
) -> None:
    mine = range(comm.rank, len(units), comm.size)
    total = sum(units[number].stop - units[number].start for number in mine)
    done = 0
    for number in mine:
        unit = units[number]
        if not _record_path(out, number).exists():
            encoded = _encode_unit(unit, encoder)
            record = write_shard(out, number, encoded.ids, encoded.lengths, encoder.encoding, encoded.mask)
            write_json(_record_path(out, number), record)
        done += unit.stop - unit.start
        if progress:
            progress(done, total)


def _encode_unit(unit: Unit, encoder: Encoder) -> Encoded:
    records = read_records(unit)
    batches = [encoder([])]  # an empty unit still has the right kinds of arrays
    while batch := list(itertools.islice(records, _BATCH)):
        try:
            batches.append(encoder(batch))
        except DataError as error:
            raise DataError(f"{unit.path}: {error}") from error
    masks = [batch.mask for batch in batches if batch.mask is not None]
    return Encoded(
        np.concatenate([batch.ids for batch in batches]),
        np.concatenate([batch.lengths for batch in batches]),
        np.concatenate(masks) if masks else None,
    )


def _commit(out: Path, num_units: int, encoding: Encoding, plan: dict[str, Any]) -> None:
    """Gather the records into the index; from then on they are not needed."""
    records = [read_json(_record_path(out, number)) for number in range(num_units)]
    if not sum(record["documents"] for record in records):
        raise DataError(f"{', '.join(name for name, _ in plan['inputs'])}: no documents in the input; all are empty")
    packs = None
    if plan["sequence_length"] is not None:
        packs = _pack(out, records, plan["sequence_length"])
    write_index(out, records, encoding, packs=packs, provenance=plan)
    for number in range(num_units):
        _record_path(out, number).unlink()
    (out / PLAN).unlink()


def _pack(out: Path, records: Sequence[dict[str, Any]], sequence_length: int) -> dict[str, Any]:
    """Pack the documents of all shards. One whose response begins beyond the sequence teaches nothing: left out."""
    lengths, first_responses = [], []
    for record in records:
        offsets = np.fromfile(out / f"{record['name']}.offsets", dtype="<u8").astype(np.int64)
        mask = np.fromfile(out / f"{record['name']}.mask", dtype="u1")
        responses = np.append(np.flatnonzero(mask), len(mask))
        lengths.append(np.diff(offsets))
        first_responses.append(responses[np.searchsorted(responses, offsets[:-1])] - offsets[:-1])
    length, first_response = np.concatenate(lengths), np.concatenate(first_responses)
    # A pack of L inputs has L + 1 tokens: the last one is only predicted.
    usable = np.flatnonzero((first_response <= sequence_length) & (first_response < length))
    if not len(usable):
        raise DataError(f"{out}: no response begins within {sequence_length} tokens; raise sequence_length")
    packs = pack_documents(length[usable].tolist(), sequence_length + 1)
    return write_packs(out, [usable[pack].tolist() for pack in packs], sequence_length)
