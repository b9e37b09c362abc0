"""Input files, cut into work units, and the records in them.

A unit is a whole file or, for plain line files, a range of its bytes. Units depend on the files alone, never on how
many ranks there are; one unit becomes one shard, and so the bytes on disk are the same for any number of ranks.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import DataError

UNIT_BYTES = 64 << 20

Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Bytes [start, stop) of one file; a line belongs to the unit in which it begins."""

    path: str
    start: int
    stop: int

    def as_json(self) -> dict[str, Any]:
        """As stored in the plan."""
        return {"path": self.path, "start": self.start, "stop": self.stop}


def find_files(inputs: str | Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs stand for, in sorted order within each.

    Raises DataError naming the first entry that matches nothing.
    """
    files: list[Path] = []
    for entry in [inputs] if isinstance(inputs, str) else inputs:
        path = Path(entry)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] not in "._")
        else:
            found = sorted(Path(match) for match in glob.glob(entry, recursive=True))  # noqa: PTH207 - absolute globs
        if not found:
            raise DataError(f"{entry}: no such input file; check inputs")
        files += found
    for file in files:
        if _kind(file) is None:
            raise DataError(f"{file}: not a known input; known are .jsonl, .json, .txt (also .gz, .zst) and .parquet")
    return files


def plan_units(files: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut plain line files into ranges of `unit_bytes`; compressed files and Parquet are one unit each."""
    units: list[Unit] = []
    for file in files:
        size = file.stat().st_size
        step = unit_bytes if file.suffix in (".jsonl", ".json", ".txt") else max(size, 1)
        units += [Unit(str(file), start, min(start + step, size)) for start in range(0, size, step)]
    return units


def read_records(unit: Unit) -> Iterator[Record]:
    """The records of one unit in file order; a line of a text file is the record `{"text": line}`.

    Raises DataError naming file and line (or byte) of a record that is not JSON or not an object.
    """
    path = Path(unit.path)
    if _kind(path) == "parquet":
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    is_text = _kind(path) == "text"
    for where, line in _lines(unit, path):
        if not line.strip():
            continue
        try:
            record = {"text": line.decode().rstrip("\r\n")} if is_text else json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: at {where}: not {'UTF-8' if is_text else 'JSON'}: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}: at {where}: a record is a JSON object, this is a {type(record).__name__}")
        yield record


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    return {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}.get(
        suffixes[-1] if suffixes else ""
    )


def _lines(unit: Unit, path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that begin in the unit's range, with where they are."""
    if path.suffix in (".gz", ".zst"):
        with pa.input_stream(str(path), compression="detect") as stream:
            rest = b""
            number = 0
            while block := stream.read(4 << 20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    yield f"line {number}", line
            yield f"line {number + 1}", rest
        return
    with path.open("rb") as file:
        position = unit.start
        if position > 0:
            # The line that runs into this range belongs to the unit before it.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < unit.stop and (line := file.readline()):
            yield f"byte {position}", line
            position += len(line)
