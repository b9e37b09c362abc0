"""Parallel tokenization: MPI ranks turn input files into a committed corpus.

Each rank takes every world-size-th work unit and commits it as one shard with a record beside it; a rerun skips units
whose record is there. When all are, rank 0 gathers the records into the index and removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_shards.errors import DataError
from data_shards.faults import MAX_BYTES, Fault, Faults, Policy, gather
from data_shards.files import read_json, remove_stale, write_json
from data_shards.format import INDEX, Array, Encoding, ShardFiles, write_index, write_packs
from data_shards.inputs import (
    UNIT_BYTES,
    InputFile,
    Located,
    Record,
    Unit,
    find_files,
    fraction,
    place,
    plan_units,
    read_located,
)
from data_shards.packing import pack_documents
from data_shards.ranks import Communicator, called_off, together
from data_shards.reader import ShardedTokens

PLAN = "plan.json"
_BATCH_RECORDS, _BATCH_CHARACTERS = 8192, 4 << 20  # handed to the encoder at once, whichever comes first
_WITH_LENGTH = (str, list)  # a field may hold anything

Progress = Callable[[int, int, int], None]


class Rejected(NamedTuple):
    """A record that gives no document: its place in the batch, one of `faults.KINDS`, and why."""

    position: int
    kind: str
    reason: str


class Encoded(NamedTuple):
    """Documents as ids: flat `ids` [tokens], `lengths` [documents], `mask` [tokens], 1 on response tokens, or None."""

    ids: Array
    lengths: Array
    mask: Array | None
    rejected: Sequence[Rejected] = ()


class Encoder(Protocol):
    """Turns records into documents; reads their `fields`. With `has_mask` it gives a mask each time."""

    encoding: Encoding
    fields: Sequence[str]
    has_mask: bool

    def __call__(self, records: Sequence[Record]) -> Encoded:
        """Encode records in order; those that give no document are rejected."""


@dataclass(frozen=True)
class PrepareSummary:
    """What a corpus holds, and the bytes it was made of.

    Tokens, documents, packs (0 for plain text), shards; documents left out of packs; faults.
    """

    input_bytes: int
    tokens: int
    documents: int
    shards: int
    packs: int = 0
    unpackable: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    named_faults: list[Fault] = field(default_factory=list)


def prepare(
    inputs: str | Sequence[str],
    out: Path,
    encoder: Encoder,
    comm: Communicator,
    *,
    sequence_length: int | None = None,
    unit_bytes: int = UNIT_BYTES,
    policy: Mapping[str, Policy] = MappingProxyType({"empty": "skip"}),
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Tokenize `inputs` into the corpus `out`, on all ranks of `comm` together; collective.

    With a `sequence_length` the documents are also packed into sequences of that length. `policy` says for each kind of
    fault whether to stop or to leave the record out; `max_bytes` is the longest line. `progress(done, total, tokens)`
    counts this rank's bytes of input, and tokens made. A corpus that is already there and was made from the same inputs
    in the same way is left as it is. Raises DataError when it was made otherwise, or when an input is missing or at
    fault.
    """
    files, units = together(comm, lambda: _found(inputs, unit_bytes))
    plan = {
        "inputs": [list(file) for file in files],
        "unit_bytes": unit_bytes,
        "encoding": encoder.encoding.as_json(),
        "sequence_length": sequence_length,
        "faults": {**policy, "max_bytes": max_bytes},
    }
    together(comm, lambda: _adopt_plan(out, plan) if comm.rank == 0 else None)
    work = _Work(out, units, encoder, lambda: Faults(policy, max_bytes))
    together(comm, lambda: work.run(comm, progress))
    together(comm, lambda: _commit(out, len(units), encoder.encoding, plan) if comm.rank == 0 else None)
    corpus = together(comm, lambda: ShardedTokens(out))
    unpackable = corpus.num_documents - corpus.num_packed_documents if corpus.num_packs else 0
    counts, named = gather(shard["faults"] for shard in corpus.index["shards"])
    return PrepareSummary(
        sum(file.size for file in files),
        corpus.num_tokens,
        corpus.num_documents,
        len(units),
        corpus.num_packs,
        unpackable,
        counts,
        named,
    )


def _found(inputs: str | Sequence[str], unit_bytes: int) -> tuple[list[InputFile], list[Unit]]:
    """The input files, and what they are cut into."""
    files = find_files(inputs)
    units = plan_units(files, unit_bytes)
    if not units:
        raise DataError(f"{inputs}: the input is empty")
    return files, units


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


@dataclass
class _Work:
    """The units of a corpus, and what makes shards of them."""

    out: Path
    units: Sequence[Unit]
    encoder: Encoder
    new_faults: Callable[[], Faults]

    def run(self, comm: Communicator, progress: Progress | None) -> None:
        """Make this rank's missing shards, each committed with its record; leave off where another rank has failed."""
        if (self.out / INDEX).exists():
            return
        mine = range(comm.rank, len(self.units), comm.size)
        total, done, tokens = sum(self.units[number].size for number in mine), 0, 0
        for number in mine:
            unit = self.units[number]
            if not _record_path(self.out, number).exists():
                for part, made in self._make_shard(number, unit):
                    if called_off(comm):
                        return
                    tokens += made
                    if progress:
                        progress(done + int(part * unit.size), total, tokens)
            done += unit.size
            if progress:
                progress(done, total, tokens)

    def _make_shard(self, number: int, unit: Unit) -> Iterator[tuple[float, int]]:
        """Encode a unit batch by batch; yields how far it is, from 0 to 1, and the tokens of a batch."""
        faults = self.new_faults()
        with ShardFiles(self.out, number, self.encoder.encoding, has_mask=self.encoder.has_mask) as files:
            for batch in _batches(read_located(unit, faults, self.encoder.fields), self.encoder.fields):
                encoded = self.encoder([located.record for located in batch])
                for position, kind, reason in encoded.rejected:
                    faults.note(kind, partial(place, unit, batch[position].where), reason)
                files.add(encoded.ids, encoded.lengths, encoded.mask)
                yield fraction(unit, batch[-1].where), len(encoded.ids)
        write_json(_record_path(self.out, number), {**files.record, "faults": faults.as_json()})


def _batches(records: Iterable[Located], fields: Sequence[str]) -> Iterator[list[Located]]:
    batch: list[Located] = []
    characters = 0
    for located in records:
        batch.append(located)
        values = (located.record.get(name) for name in fields)
        characters += sum(len(value) for value in values if isinstance(value, _WITH_LENGTH))
        if len(batch) == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _commit(out: Path, num_units: int, encoding: Encoding, plan: dict[str, Any]) -> None:
    """Gather the records into the index, unless it is there; from then on they are not needed."""
    if (out / INDEX).exists():
        return
    try:
        records = [read_json(_record_path(out, number)) for number in range(num_units)]
    except DataError:
        if (out / INDEX).exists():  # by another run of the same, which came first and made the same bytes
            return
        raise
    if not sum(record["documents"] for record in records):
        counts, named = gather(record["faults"] for record in records)
        left_out = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items()) or "all are empty"
        first = f"; the first: {named[0].where}: {named[0].reason}" if named else ""
        raise DataError(
            f"{', '.join(name for name, _ in plan['inputs'])}: no documents in the input: {left_out}{first}"
        )
    packs = None
    if plan["sequence_length"] is not None:
        packs = _pack(out, records, plan["sequence_length"])
    write_index(out, records, encoding, packs=packs, provenance=plan)
    for number in range(num_units):
        _record_path(out, number).unlink(missing_ok=True)
    (out / PLAN).unlink(missing_ok=True)
    remove_stale(out)


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
