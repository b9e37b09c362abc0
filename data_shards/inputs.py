"""Input files, cut into work units, and the records in them.

A unit is a range of bytes of a line file, a range of row groups of a Parquet file, or a whole file where only reading
tells the places in it: a compressed one, or one JSON array. Units depend on the files alone, never on how many ranks
there are; one unit becomes one shard, and so the bytes on disk are the same for any number of ranks. Files are local
or, as URLs, wherever fsspec reaches (`hf://datasets/...`).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import orjson

from data_shards.errors import DataError, first_line, listed
from data_shards.faults import STRICT, Faults
from data_shards.files import TEMPORARY
from data_shards.lines import ArrayError, array_items, is_array, lines_in, numbered_lines
from data_shards.parquet import read_rows, row_groups
from data_shards.streams import BLOCK, COMPRESSED, open_decompressed, open_input, unreadable

UNIT_BYTES = 64 << 20
_KINDS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}

Record = dict[str, Any]


class InputFile(NamedTuple):
    """A path or URL, and its size in bytes."""

    path: str
    size: int


Form = Literal["lines", "stream", "array", "rows"]


@dataclass(frozen=True)
class Unit:
    """A part of one file: bytes [start, stop) of `lines`, where a line belongs to the unit in which it begins; or rows.

    Of `rows`, start and stop are row groups; a `stream` of compressed lines and an `array` are whole files. `size`:
    bytes of input, for progress.
    """

    path: str
    start: int
    stop: int
    size: int
    form: Form = "lines"


class Located(NamedTuple):
    """A record and where it is: byte of a line file, number of the line, item or row, from 1, of others."""

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
    """Cut line files and Parquet files into parts of about `unit_bytes`; compressed files and arrays are one unit.

    Raises DataError for a file that cannot be read.
    """
    units: list[Unit] = []
    for path, size in files:
        form = _form(path) if size else "lines"
        if form == "rows" or _kind(path) == "parquet":
            with open_input(path) as file:
                units += [Unit(path, *groups, "rows") for groups in row_groups(path, file, unit_bytes)]
            continue
        step = unit_bytes if form == "lines" else max(size, 1)
        for start in range(0, size, step):
            stop = min(start + step, size)
            units.append(Unit(path, start, stop, stop - start, form))
    return units


def is_cut_by_size(path: str) -> bool:
    """Whether the units of a file are known from its name and size alone."""
    return not _path(path).endswith((".parquet", ".json", *(f".json{suffix}" for suffix in COMPRESSED)))


def count_units(files: Sequence[InputFile], unit_bytes: int) -> int | None:
    """How many units `plan_units` cuts files into; None where that takes reading them."""
    if not all(is_cut_by_size(file.path) for file in files):
        return None
    return sum(min(size, 1) if path.endswith(COMPRESSED) else -(-size // unit_bytes) for path, size in files)


def read_records(unit: Unit) -> Iterator[Record]:
    """The records of one unit in file order. Raises DataError naming file and line of the first fault."""
    return (located.record for located in read_located(unit, STRICT))


def read_texts(inputs: str | Sequence[str], field: str = "text") -> Iterator[str]:
    """One field of all records. Raises DataError naming file and line of the first fault, or record without a text."""
    for unit in plan_units(find_files(inputs)):
        for where, record in read_located(unit, STRICT, [field]):
            if isinstance(text := record.get(field), str):
                yield text
            else:
                reason = f"the record has no text in {field!r}; its fields are {listed(record)} (set the field's name)"
                STRICT.note("malformed", partial(place, unit, where), reason)


def read_located(unit: Unit, faults: Faults, fields: Collection[str] | None = None) -> Iterator[Located]:
    """The records of one unit in file order; a line of a text file is the record `{"text": line}`.

    `fields`: the columns wanted of a Parquet file (None: all). What is no JSON object, is not UTF-8 or is longer than
    `faults.max_bytes` goes to `faults`, which raises DataError or counts it. Raises DataError, too, where the file
    cannot be read to its end.
    """

    def note(kind: str, where: int, reason: str) -> None:
        faults.note(kind, partial(place, unit, where), reason)

    where = unit.start
    try:
        for where, record in _READERS[unit.form](unit, faults.max_bytes, fields, note):
            if isinstance(record, dict):
                yield Located(where, record)
            else:
                note("malformed", where, f"not a JSON object but a {type(record).__name__}")
    except DataError:
        raise
    except Exception as error:  # disks, decompressors and remote file systems raise what they will
        raise unreadable(unit.path, f"{_COUNTED[unit.form]} {where}", error) from error


_Note = Callable[[str, int, str], None]  # kind of fault, where, reason
_Reader = Callable[[Unit, int, Collection[str] | None, _Note], Iterator[tuple[int, Any]]]
_COUNTED: dict[Form, str] = {"lines": "byte", "stream": "line", "array": "item", "rows": "row"}


def place(unit: Unit, where: int) -> str:
    """`file:line` (of a Parquet file `file:row`, from 1) of what `Located.where` tells."""
    if unit.form == "array":
        return f"{unit.path}, item {where}"
    if unit.form != "lines":
        return f"{unit.path}:{where}"
    # Only for those that are named: there may be a terabyte before the unit.
    return f"{unit.path}:{_breaks(unit.path, 0, unit.start) + _breaks(unit.path, unit.start, where) + 1}"


@lru_cache(maxsize=64)
def _breaks(path: str, start: int, stop: int) -> int:
    """Line breaks in the bytes [start, stop) of a file."""
    found = 0
    with open_input(path) as file:
        file.seek(start)
        for at in range(start, stop, BLOCK):
            found += file.read(min(BLOCK, stop - at)).count(b"\n")
    return found


def fraction(unit: Unit, where: int) -> float:
    """How much of a unit lies before `where`, 0 to 1; 0 where only its end would tell."""
    return (where - unit.start) / max(unit.size, 1) if unit.form == "lines" else 0.0


# -- files --------------------------------------------------------------------------------------------------------


def _find_local(entry: str) -> list[InputFile]:
    path = Path(entry)
    if path.is_dir():
        # A name with a dot or an underscore is no data, nor is what a killed writer left.
        found = [file for file in path.rglob("*") if file.name[0] not in "._" and file.suffix != TEMPORARY]
    elif path.exists():  # a name may have brackets in it
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(entry, recursive=True)]  # noqa: PTH207 - absolute globs
    return [InputFile(str(file), file.stat().st_size) for file in sorted(found) if file.is_file()]


def _find_remote(entry: str) -> list[InputFile]:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(entry)
        if filesystem.isfile(path):
            matches = {path: filesystem.info(path)}
        else:
            matches = filesystem.glob(path, detail=True) or filesystem.find(path, detail=True)
    except ImportError as error:
        package = _FSSPEC_EXTRAS.get(urlsplit(entry).scheme)
        mend = f"pip install '{package}'" if package else first_line(error)
        raise DataError(f"{entry}: cannot be reached: a package is missing: {mend}") from error
    except Exception as error:  # each kind of file system raises its own
        raise DataError(f"{entry}: cannot be reached: {first_line(error)}") from error
    files = sorted((name, facts["size"]) for name, facts in matches.items() if facts["type"] == "file")
    for name, size in files:
        if size is None:
            raise DataError(f"{name}: its server does not tell its size; download it and name the file")
    return [InputFile(filesystem.unstrip_protocol(name), size) for name, size in files]


# For others fsspec's own message names the package.
_FSSPEC_EXTRAS = {"http": "fsspec[http]", "https": "fsspec[http]"}


def _path(path: str) -> str:
    """Without the query of a web address."""
    return urlsplit(path).path if path.startswith(("http://", "https://")) else path


def _kind(path: str) -> str | None:
    suffixes = [suffix for suffix in PurePosixPath(_path(path)).suffixes if suffix not in COMPRESSED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _form(path: str) -> Form:
    """How a file is read; of a `.json`, which may be either, its first character tells."""
    if _kind(path) == "parquet":
        return "rows"
    if not is_cut_by_size(path):
        try:
            with open_decompressed(path) as file:
                if is_array(file):
                    return "array"
        except Exception as error:  # as above
            raise unreadable(path, "its beginning", error) from error
    return "stream" if path.endswith(COMPRESSED) else "lines"


# -- readers: where and record, which may be anything that JSON has ------------------------------------------------


def _read_lines(unit: Unit, max_bytes: int, _: Collection[str] | None, note: _Note) -> Iterator[tuple[int, Any]]:
    def too_long(where: int) -> None:
        note("too_long", where, f"a line of more than {max_bytes:,} bytes")

    is_text = _kind(unit.path) == "text"
    with open_decompressed(unit.path) as file:
        if unit.form == "stream":
            lines = numbered_lines(file, max_bytes, too_long)
        else:
            lines = lines_in(file, unit.start, unit.stop, max_bytes, too_long)
        for where, line in lines:
            if not line.strip():
                continue
            try:
                record = {"text": line.decode().rstrip("\r\n")} if is_text else _parse(line)
            except UnicodeDecodeError as error:
                note("encoding", where, f"not UTF-8: {error.reason} at byte {error.start} of the line")
            except (ValueError, RecursionError) as error:
                note("malformed", where, f"not JSON: {error}{_hint(unit.path, line)}")
            else:
                yield where, record


def _hint(path: str, line: bytes) -> str:
    """What a line may be part of that is no record itself."""
    if ".json" in PurePosixPath(_path(path)).suffixes:
        return " (a .json file holds one array of records, or one record a line)"
    return " (a file that is one array has to be named .json)" if line.lstrip().startswith(b"[") else ""


def _parse(line: bytes) -> Any:
    """A line's JSON. orjson is several times faster; json takes a little more (NaN), and tells its faults apart."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line.decode())


def _read_array(unit: Unit, max_bytes: int, _: Collection[str] | None, note: _Note) -> Iterator[tuple[int, Any]]:
    number = 0
    with open_decompressed(unit.path) as file:
        items = array_items(file, max_bytes)
        try:
            for number, item in enumerate(items, 1):
                yield number, item
        except ArrayError as error:
            raise DataError(
                f"{unit.path}, item {number + 1}: {error}; mend it, or write the file with one record a line, of which "
                "those at fault can be left out"
            ) from error


def _read_parquet(unit: Unit, max_bytes: int, fields: Collection[str] | None, note: _Note) -> Iterator[tuple[int, Any]]:
    with open_input(unit.path) as file:
        yield from read_rows(unit.path, file, unit.start, unit.stop, fields, max_bytes, note)


_READERS: dict[Form, _Reader] = {
    "lines": _read_lines,
    "stream": _read_lines,
    "array": _read_array,
    "rows": _read_parquet,
}
