"""Input files opened: local ones and, as URLs, whatever fsspec reaches; plain or decompressed."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from data_shards.errors import DataError, first_line

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 4 << 20  # read at once
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"  # which some programs put before UTF-8; no part of the text

# Long-range archives (zstd --long=31) have windows of 2 GiB; memory is taken as the window fills.
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
_TORN = (EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile)


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file or URL as they are stored; seekable."""
    if "://" not in path:
        with Path(path).open("rb") as file:
            yield file
        return
    import fsspec

    # Few of its files read a line of at most so many bytes, as Python's own do.
    with fsspec.open(path, "rb") as file, io.BufferedReader(file, 1 << 20) as buffered:
        yield buffered


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file or URL, those of a compressed one (`.gz`, `.zst`) decompressed as they are read."""
    with open_input(path) as file:
        if path.endswith(".gz"):
            opened: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif path.endswith(".zst"):
            opened = cast(BinaryIO, zstd.ZstdFile(file, options=_ZSTD))
        else:
            yield file
            return
        with opened:
            # Their own buffers are small, and reading a line from them goes through Python.
            yield io.BufferedReader(cast(io.RawIOBase, opened), 1 << 20)


def unreadable(path: str, near: str, error: Exception) -> DataError:
    """The error for a file that could not be read to its end; `near` is how far that came."""
    if isinstance(error, _TORN):
        return DataError(f"{path}: damaged near {near}: {first_line(error)}; fetch it again")
    reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
    return DataError(f"{path}: cannot be read near {near}: {reason}; mend that, or take the file out")
