"""Input files, cut into work units, and the records in them.

A unit is a range of bytes of a line file, a range of row groups of a Parquet file, or a whole compressed file. Units
depend on the files alone, never on how many ranks there are; one unit becomes one shard, and so the bytes on disk are
the same for any number of ranks. Files are local or, as URLs, wherever fsspec reaches (`hf://datasets/...`).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import DataError, first_line
from data_shards.faults import STRICT, Faults
from data_shards.files import TEMPORARY

UNIT_BYTES = 64 << 20
_BLOCK = 4 << 20  # read at once from compressed files
_COMPRESSED = (".gz", ".zst")
_KINDS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}

Record = dict[str, Any]


class InputFile(NamedTuple):
    """A path or URL, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Unit:
    """A part of one file: bytes [start, stop), where a line belongs to the unit in which it begins; or row groups.

    `size`: bytes of input, for progress.
    """

    path: str
    start: int
    stop: int
    size: int


class Located(NamedTuple):
    """A record and where it is: byte of a line file, line of a compressed one, row of a Parquet file."""

    where: int
    record: Record


def find_files(inputs: str | Sequence[str]) -> list[InputFile]:
    """The files that paths, folders, globs and URLs stand for, in sorted order within each.

    Raises DataError naming the first entry that matches nothing, or a file of an unknown kind.
    """
    files: list[InputFile] = []
    for entry in [inputs] if isinstance(inputs, str) else inputs:
        found = _find_remote(entry) if "://" in entry else _find_local(entry)
        if not found:
            raise DataError(f"{entry}: no such input file; check inputs")
        files += found
    for file in files:
        if _kind(file.path) is None:
            raise DataError(
                f"{file.path}: not a known input; known are .jsonl, .json, .txt (also .gz, .zst) and .parquet"
            )
    return files


def dataset_files(path: str, name: str | None = None, split: str = "train", revision: str | None = None) -> list[str]:
    """Paths or URLs of the files of a dataset, a hub id or a folder, as `datasets` resolves them.

    Raises DataError where there is no such dataset, configuration or split, or it has no files but code.
    """
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(path, name, revision=revision).config.data_files or {}
    except Exception as error:  # datasets raises what its many sources raise
        raise DataError(f"dataset {path}: {first_line(error)}") from error
    if split not in found:
        raise DataError(f"dataset {path}: no files for split {split!r}; it has {', '.join(found) or 'none'}")
    return list(map(str, found[split]))


def plan_units(files: Sequence[InputFile], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut line files and Parquet files into parts of about `unit_bytes`; a compressed file is one unit."""
    units: list[Unit] = []
    for path, size in files:
        if _kind(path) == "parquet":
            units += _row_group_units(path, unit_bytes)
        else:
            step = max(size, 1) if path.endswith(_COMPRESSED) else unit_bytes
            for start in range(0, size, step):
                stop = min(start + step, size)
                units.append(Unit(path, start, stop, stop - start))
    return units


def read_records(unit: Unit) -> Iterator[Record]:
    """The records of one unit in file order. Raises DataError naming file and line of the first fault."""
    return (located.record for located in read_located(unit, STRICT))


def read_located(unit: Unit, faults: Faults, fields: Collection[str] | None = None) -> Iterator[Located]:
    """The records of one unit in file order; a line of a text file is the record `{"text": line}`.

    `fields`: the columns wanted of a Parquet file (None: all). A line that is no JSON object, is not UTF-8 or is longer
    than `faults.max_bytes` goes to `faults`, which raises DataError or counts it.
    """
    kind = _kind(unit.path)
    if kind == "parquet":
        yield from _read_parquet(unit, fields)
        return
    lines = _compressed_lines(unit, faults) if unit.path.endswith(_COMPRESSED) else _plain_lines(unit, faults)
    for where, line in lines:
        if not line.strip():
            continue
        try:
            record = {"text": line.decode().rstrip("\r\n")} if kind == "text" else _parse(line)
        except UnicodeDecodeError as error:
            faults.note("encoding", place(unit, where), f"not UTF-8: {error.reason} at byte {error.start} of the line")
            continue
        except (ValueError, RecursionError) as error:
            faults.note("malformed", place(unit, where), f"not JSON: {error}")
            continue
        if isinstance(record, dict):
            yield Located(where, record)
        else:
            faults.note("malformed", place(unit, where), f"not a JSON object but a {type(record).__name__}")


def _parse(line: bytes) -> Any:
    """A line's JSON. orjson is several times faster; json takes a little more (NaN), and tells its faults apart."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def place(unit: Unit, where: int) -> str:
    """`file:line` (of a Parquet file `file:row`, from 1) of what `Located.where` tells."""
    if unit.path.endswith(_COMPRESSED) or _kind(unit.path) == "parquet":
        return f"{unit.path}:{where}"
    lines = 1
    with _open(unit.path) as file:
        for start in range(0, where, _BLOCK):  # only for the few lines that are named
            lines += file.read(min(_BLOCK, where - start)).count(b"\n")
    return f"{unit.path}:{lines}"


def fraction(unit: Unit, where: int) -> float:
    """How much of a unit lies before `where`, 0 to 1; 0 where only its end would tell."""
    if unit.path.endswith(_COMPRESSED) or _kind(unit.path) == "parquet":
        return 0.0
    return (where - unit.start) / max(unit.size, 1)


# -- files --------------------------------------------------------------------------------------------------------


def _find_local(entry: str) -> list[InputFile]:
    path = Path(entry)
    if path.is_dir():
        # A name with a dot or an underscore is no data, nor is what a killed writer left.
        files = (file for file in path.rglob("*") if file.name[0] not in "._" and file.suffix != TEMPORARY)
        found = sorted(file for file in files if file.is_file())
    else:
        found = sorted(Path(match) for match in glob.glob(entry, recursive=True))  # noqa: PTH207 - absolute globs
    return [InputFile(str(file), file.stat().st_size) for file in found]


def _find_remote(entry: str) -> list[InputFile]:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(entry)
        matches = filesystem.glob(path, detail=True) or filesystem.find(path, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{entry}: cannot be reached: {error}") from error
    files = sorted((name, facts["size"]) for name, facts in matches.items() if facts["type"] == "file")
    return [InputFile(filesystem.unstrip_protocol(name), size) for name, size in files]


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    if "://" not in path:
        return Path(path).open("rb")
    import fsspec

    return fsspec.open(path, "rb")


def _kind(path: str) -> str | None:
    suffixes = [suffix for suffix in PurePosixPath(path).suffixes if suffix not in _COMPRESSED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


# -- lines --------------------------------------------------------------------------------------------------------


def _plain_lines(unit: Unit, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the unit's bytes, with their first byte."""
    with _open(unit.path) as file:
        position = unit.start
        if position > 0:
            # The line that runs into this range belongs to the unit before it.
            file.seek(position - 1)
            position += _skip_line(file) - 1
        while position < unit.stop and (line := file.readline(faults.max_bytes + 1)):
            if len(line) > faults.max_bytes and not line.endswith(b"\n"):
                size = len(line) + _skip_line(file)
                faults.note("too_long", place(unit, position), f"a line of {size:,} bytes")
                position += size
                continue
            yield position, line
            position += len(line)


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line of any length, and say how many bytes that were."""
    size = 0
    while part := file.readline(_BLOCK):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _compressed_lines(unit: Unit, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """All lines of a compressed file, with their numbers from 1. Raises DataError where the stream is torn."""
    number, rest = 1, b""
    try:
        with _open(unit.path) as file, pa.input_stream(file, compression=_compression(unit.path)) as stream:
            while block := stream.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if len(line) > faults.max_bytes:
                        faults.note("too_long", place(unit, number), f"a line of {len(line):,} bytes")
                    else:
                        yield number, line
                    number += 1
                if len(rest) > faults.max_bytes:
                    rest = rest[: faults.max_bytes + 1]  # counted when its end is found, and never held whole
    except OSError as error:
        raise DataError(f"{unit.path}: damaged near line {number}: {error}; fetch it again") from error
    if len(rest) > faults.max_bytes:
        faults.note("too_long", place(unit, number), f"a line of more than {faults.max_bytes:,} bytes")
    else:
        yield number, rest


def _compression(path: str) -> str:
    return "gzip" if path.endswith(".gz") else "zstd"


# -- Parquet ------------------------------------------------------------------------------------------------------


def _row_group_units(path: str, unit_bytes: int) -> list[Unit]:
    """Neighbouring row groups together until they have `unit_bytes`."""
    with _open(path) as file:
        metadata = _parquet(path, file).metadata
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    units, start = [], 0
    for group in range(len(sizes)):
        if group + 1 == len(sizes) or sum(sizes[start : group + 1]) >= unit_bytes:
            units.append(Unit(path, start, group + 1, sum(sizes[start : group + 1])))
            start = group + 1
    return units


def _read_parquet(unit: Unit, fields: Collection[str] | None) -> Iterator[Located]:
    with _open(unit.path) as file:
        table = _parquet(unit.path, file)
        row = sum(table.metadata.row_group(group).num_rows for group in range(unit.start)) + 1
        names = table.schema_arrow.names
        columns = None if fields is None else [name for name in names if name in fields] or names
        groups = list(range(unit.start, unit.stop))
        try:
            for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
                for record in batch.to_pylist():
                    yield Located(row, record)
                    row += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{unit.path}: damaged near row {row}: {error}; fetch it again") from error


def _parquet(path: str, file: BinaryIO) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path}: not a Parquet file: {reason}; fetch or write it again, or take it out") from error
