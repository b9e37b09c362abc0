"""Parquet files: cut at row groups, and read by bytes. A few hundred bytes on disk can stand for gigabytes of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.errors import DataError, first_line
from data_shards.format import Array
from data_shards.streams import BLOCK

_ROWS, _DECODED = 1024, 16 << 20  # rows decoded at once at most, and about the most bytes of them
_Note = Callable[[str, int, str], None]  # kind of fault, row, reason


class RowGroups(NamedTuple):
    """Neighbouring row groups [start, stop) and their bytes."""

    start: int
    stop: int
    size: int


def row_groups(path: str, file: BinaryIO, unit_bytes: int) -> Iterator[RowGroups]:
    """Neighbouring row groups together until they have `unit_bytes`. Raises DataError where it is no Parquet file."""
    metadata = _opened(path, file).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if group + 1 == metadata.num_row_groups or size >= unit_bytes:
            yield RowGroups(start, group + 1, size)
            start, size = group + 1, 0


def read_rows(
    path: str, file: BinaryIO, start: int, stop: int, fields: Collection[str] | None, max_bytes: int, note: _Note
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of row groups [start, stop), each after its number in the file, from 1.

    `fields`: the columns wanted (None, or none of them there: all). Rows of more than `max_bytes` and rows that are no
    text in UTF-8 go to `note`. Raises DataError where the file is damaged.
    """
    table = _opened(path, file)
    metadata = table.metadata
    row = sum(metadata.row_group(group).num_rows for group in range(start)) + 1
    names = table.schema_arrow.names
    columns = [name for name in names if fields is None or name in fields] or names
    texts = [name for name in columns if _is_text(table.schema_arrow.field(name).type)]
    try:
        repeating = pq.ParquetFile(file, read_dictionary=texts)
        for group in range(start, stop):
            rows = _rows_at_once(repeating, group, columns, texts)
            for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                yield from _rows(batch, row, max_bytes, note)
                row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged near row {row}: {first_line(error)}; fetch it again") from error


def _opened(path: str, file: BinaryIO) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path}: not a Parquet file: {reason}; fetch or write it again, or take it out") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _rows_at_once(table: pq.ParquetFile, group: int, columns: Collection[str], texts: Sequence[str]) -> int:
    """How many rows of a group can be decoded at once without taking much memory.

    By the mean of what a row takes as it is stored, and by the longest text that is stored once for many rows: a writer
    begins with such a dictionary, so that the first row shows it whole, where it is read as one.
    """
    metadata = table.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    stored = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in wanted)
    longest = 0
    for head in islice(table.iter_batches(batch_size=1, row_groups=[group], columns=texts) if texts else (), 1):
        dictionaries = [column.dictionary for column in head.columns if isinstance(column, pa.DictionaryArray)]
        longest = sum(pc.max(pc.binary_length(dictionary)).as_py() or 0 for dictionary in dictionaries)
    mean = stored // max(metadata.num_rows, 1)
    return int(np.clip(_DECODED // max(mean, longest, 1), 1, _ROWS))


def _rows(batch: pa.RecordBatch, first: int, max_bytes: int, note: _Note) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch, made into Python's objects as many at once as have few bytes together."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += _sizes(column)
    ends = np.cumsum(sizes)
    at = 0
    while at < batch.num_rows:
        if sizes[at] > max_bytes:
            note("too_long", first + at, f"a row of {sizes[at]:,} bytes")
            at += 1
            continue
        before = ends[at] - sizes[at]
        stop = max(at + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        long = np.flatnonzero(sizes[at:stop] > max_bytes)
        stop = at + int(long[0]) if len(long) else stop
        yield from _records(batch.slice(at, stop - at), first + at, note)
        at = stop


def _sizes(column: pa.Array) -> Array:
    """Bytes that each row of a column takes, int64 [rows]: exact for texts, the mean of all for what is nested."""
    if isinstance(column, pa.DictionaryArray) and _is_text(column.type.value_type):  # pandas' categories
        lengths = pc.binary_length(column.dictionary).fill_null(0)
        sizes = lengths.take(column.indices) if len(lengths) else pa.nulls(len(column), pa.int32())
    elif _is_text(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        sizes = pc.binary_length(column)
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        inner = column.flatten()
        each = max(1, inner.nbytes // max(len(inner), 1))
        sizes = pc.multiply(pc.list_value_length(column), each)
    else:
        return np.full(len(column), column.nbytes // max(len(column), 1), np.int64)
    return sizes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _records(rows: pa.RecordBatch, first: int, note: _Note) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from enumerate(rows.to_pylist(), first)
    except ValueError:  # one of them cannot be made a Python object: which?
        for i in range(rows.num_rows):
            try:
                record = rows.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                note("encoding", first + i, f"not UTF-8: {error.reason} at byte {error.start} of a text")
            except ValueError as error:
                note("malformed", first + i, f"a value that cannot be read: {first_line(error)}")
            else:
                yield first + i, record
