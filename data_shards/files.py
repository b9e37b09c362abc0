"""Writing files so that a reader sees all of a file or none of it, and checksums to tell whether it is still so."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from data_shards.errors import DataError

TEMPORARY = ".tmp"


class AtomicFile:
    """A file that appears at `path`, whole, when the `with` block is left well; else nothing is left there.

    Written through a temporary neighbour, fsync and rename. `record`, after the block: `{"bytes": size, "xxh64": hex
    digest}`, as an index stores it. Raises DataError when the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Two runs that write the same file, on one host or two, must not share a temporary one.
        self._temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        self._digest, self._size = xxhash.xxh64(), 0

    def __enter__(self) -> AtomicFile:
        """Open the temporary file."""
        with self._named():
            self._file = self._temporary.open("wb")
        return self

    def write(self, chunk: bytes | memoryview) -> None:
        """Append."""
        with self._named():
            self._file.write(chunk)
        self._digest.update(chunk)
        self._size += memoryview(chunk).nbytes

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the file its name, or take it away."""
        try:
            if kind is None:
                with self._named():
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._temporary.replace(self.path)
                    fsync(self.path.parent)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def record(self) -> dict[str, Any]:
        """Size and checksum."""
        return {"bytes": self._size, "xxh64": self._digest.hexdigest()}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written: {error.strerror}; free space or choose another folder"
            ) from error


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write `chunks` as an `AtomicFile` and return its record."""
    with AtomicFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
    return file.record


def remove_stale(folder: Path, older_than_seconds: float = 3600) -> None:
    """Remove temporary files that a killed run left behind; a young one may be another run's, at work."""
    for path in folder.glob(f"*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                path.unlink()


def fsync(path: Path) -> None:
    """Make a file durable, or of a folder the names in it: a new name lives in the folder, not in the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_xxh64(path: Path) -> str:
    """The xxh64 of a file's bytes, as hex digits, read in blocks of 8 MiB."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(folder: Path, name: Any) -> Path:
    """The path of a file that an index or a manifest in `folder` names. Raises DataError where it leads elsewhere."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DataError(f"{folder}: its index names {name!r}, which is outside of it; make it again, or fetch it anew")
    return folder / name


class Form(BaseModel):
    """What a reader relies on in a file; there may be more in it, from another version."""

    model_config = ConfigDict(strict=True)


class FileRecord(Form):
    """Size and checksum of a file, as an index or a manifest has them."""

    bytes: NonNegativeInt
    xxh64: str


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its own checksum, in one canonical form, so that any changed byte shows on reading."""
    write_atomically(path, [_canonical(content)])


def read_json(path: Path, form: type[Form] | None = None) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises DataError when the file is missing, torn or changed, or not of the `form`.

    Its checksum tells that nothing was changed since, but not that the version of dist-train that wrote it put in what
    this one reads.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content: dict[str, Any] = json.loads(data)
        content.pop("xxh64")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: torn or not written by dist-train; make it again") from error
    if _canonical(content) != data:
        raise DataError(f"{path}: its checksum does not match; it was changed or damaged; make it again")
    if form is not None:
        refuse_other_form(path, content, form)
    return content


def refuse_other_form(path: Path, content: dict[str, Any], form: type[Form]) -> None:
    """Raise DataError, naming the first key at fault, where the content of the file at `path` is not of the form."""
    try:
        form.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        told = f"{where}: {fault['msg']}" if where else fault["msg"]
        raise DataError(f"{path}: not as this version writes it: {told}; make it again") from error


def _canonical(content: dict[str, Any]) -> bytes:
    checksum = xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True).encode())
    return (json.dumps({**content, "xxh64": checksum}, sort_keys=True, indent=1) + "\n").encode()
