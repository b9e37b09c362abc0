"""Writing files so that a reader sees all of a file or none of it, and checksums to tell whether it is still so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from data_shards.errors import DataError


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write `chunks` to `path` through a temporary neighbour, fsync and rename.

    Returns the record that goes into an index: `{"bytes": size, "xxh64": hex digest}`. Raises DataError when the disk
    is full or the folder cannot be written; nothing is left at `path` then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    digest, size = xxhash.xxh64(), 0
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}; free space or choose another folder") from error
    return {"bytes": size, "xxh64": digest.hexdigest()}


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable: the new name lives in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its own checksum, in one canonical form, so that any changed byte shows on reading."""
    write_atomically(path, [_canonical(content)])


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises DataError when the file is missing, torn or changed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content: dict[str, Any] = json.loads(data)
        content.pop("xxh64")
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: torn or not written by dist-train; make it again") from error
    if _canonical(content) != data:
        raise DataError(f"{path}: its checksum does not match; it was changed or damaged; make it again")
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    checksum = xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True).encode())
    return (json.dumps({**content, "xxh64": checksum}, sort_keys=True, indent=1) + "\n").encode()
