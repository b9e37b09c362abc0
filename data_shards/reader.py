"""Reading a corpus of shards: memory-mapped, checked when it is opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import DataError
from data_shards.files import file_xxh64, inside, read_json, refuse_other_form
from data_shards.format import FORMAT_VERSION, INDEX, Array, CorpusIndex, Encoding, token_dtype


class ShardedTokens:
    """A corpus on disk as one long array of token ids, memory-mapped.

    `len()` in tokens; `tokens[start:stop]` copies a range out; `document(i)` one document. Opening
    raises DataError when the index is torn, of another format, or a file is missing or has another size; `verify()`
    also reads all bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).exists():
            raise DataError(f"{self.path}: no prepared corpus here (no {INDEX}); make one with dist-train prepare")
        self.index = read_json(self.path / INDEX)
        if self.index.get("format") != FORMAT_VERSION:
            raise DataError(
                f"{self.path}: format {self.index.get('format')}, this version reads {FORMAT_VERSION}; prepare it again"
            )
        refuse_other_form(self.path / INDEX, self.index, CorpusIndex)
        # Bounded: a corpus of 10,000 shards would exhaust the file table. Per instance: a folder may be made anew.
        self._open = lru_cache(maxsize=256)(_open)
        self.encoding = Encoding(**self.index["encoding"])
        self.num_tokens: int = self.index["tokens"]
        self.num_documents: int = self.index["documents"]
        self._token_starts = np.cumsum([0] + [shard["tokens"] for shard in self.index["shards"]])
        self._document_starts = np.cumsum([0] + [shard["documents"] for shard in self.index["shards"]])
        for shard in self.index["shards"]:
            inside(self.path, shard["name"])
        self._raise_for(self._misfits(slice(None), read_bytes=False))

    # -- reading ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens."""
        return self.num_tokens

    def __getitem__(self, where: slice) -> Array:
        """Token ids of a range, [stop - start], in the stored type; a range across shards is joined."""
        return self._range("tokens", self.dtype, where)

    def read(self, start: int, stop: int) -> Array:
        """Token ids of a range by one read call a shard: for long ranges, where a memory map reads page by page."""
        parts = [
            np.fromfile(self._shard_path(shard, "tokens"), self.dtype, last - first, offset=first * self.dtype.itemsize)
            for shard, first, last in self._spans(start, stop)
        ]
        found = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        if len(found) != stop - start:
            raise DataError(f"{self.path}: a token file became shorter while it was read; prepare it again")
        return found

    def document_starts(self, start: int, stop: int) -> Array:
        """The tokens of a range with which a document begins, int64, counted from `start`."""
        found = [np.empty(0, np.int64)]
        for shard, first, last in self._spans(start, stop):
            offsets = self._file(shard, "offsets", np.dtype("<u8"))[:-1]
            begin, end = np.searchsorted(offsets, np.array([first, last], dtype="<u8"))
            found.append(offsets[begin:end].astype(np.int64) + (int(self._token_starts[shard]) - start))
        return np.concatenate(found)

    def mask(self, where: slice) -> Array:
        """1 on response tokens, 0 elsewhere, uint8 [stop - start]; all ones for plain text."""
        if not self.has_mask:
            start, stop, _ = where.indices(self.num_tokens)
            return np.ones(max(stop - start, 0), dtype=np.uint8)
        return self._range("mask", np.dtype("u1"), where)

    def document(self, i: int) -> Array:
        """Token ids of document `i` in input order, with the stored BOS and EOS."""
        start, stop = self.document_range(i)
        return self[start:stop]

    def document_range(self, i: int) -> tuple[int, int]:
        """First token of document `i`, and the one after its last."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        shard = int(np.searchsorted(self._document_starts, i, side="right")) - 1
        offsets = self._file(shard, "offsets", np.dtype("<u8"))
        local = i - int(self._document_starts[shard])
        base = int(self._token_starts[shard])
        return base + int(offsets[local]), base + int(offsets[local + 1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one token id on disk."""
        return token_dtype(self.encoding.vocab_size)

    @property
    def has_mask(self) -> bool:
        """Whether tokens are told apart into prompt and response."""
        return any(name.endswith(".mask") for shard in self.index["shards"] for name in shard["files"])

    # -- packs --------------------------------------------------------------------------------------------------

    @property
    def packed_length(self) -> int | None:
        """Sequence length for which the documents were packed, None where they were not."""
        packs = self.index["packs"]
        return packs["sequence_length"] if packs else None

    @property
    def num_packs(self) -> int:
        """Number of packs, 0 where the documents were not packed."""
        packs = self.index["packs"]
        return packs["packs"] if packs else 0

    @property
    def num_packed_documents(self) -> int:
        """Number of documents that are in a pack."""
        return len(self._pack_files[1]) if self.num_packs else 0

    def pack(self, i: int) -> Array:
        """The documents of pack `i`."""
        start, stop = self._pack_files[0][i : i + 2]
        return self._pack_files[1][int(start) : int(stop)]

    @cached_property
    def _pack_files(self) -> tuple[Array, Array]:
        dtype = np.dtype("<u8")
        return _open(self.path / "packs.offsets", dtype), _open(self.path / "packs.documents", dtype)

    # -- integrity ----------------------------------------------------------------------------------------------

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every byte of every `world_size`-th file and compare. Raises one DataError that names all bad files."""
        self._raise_for(self._misfits(slice(rank, None, world_size), read_bytes=True))

    def _misfits(self, which: slice, *, read_bytes: bool) -> list[str]:
        """What is wrong with the files, one line each."""
        files = {name: record for shard in self.index["shards"] for name, record in shard["files"].items()}
        files.update((self.index["packs"] or {}).get("files", {}))
        found = []
        for name, record in list(files.items())[which]:
            path = inside(self.path, name)
            if not path.exists():
                found.append(f"{name} is missing")
            elif path.stat().st_size != record["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {record['bytes']}")
            elif read_bytes and file_xxh64(path) != record["xxh64"]:
                found.append(f"{name} has another checksum")
        return found

    def _raise_for(self, misfits: list[str]) -> None:
        if misfits:
            raise DataError(f"{self.path}: damaged: {'; '.join(misfits)}; prepare it again")

    # -- files --------------------------------------------------------------------------------------------------

    def _range(self, kind: str, dtype: np.dtype[Any], where: slice) -> Array:
        start, stop, step = where.indices(self.num_tokens)
        if step != 1:
            raise ValueError("a range of tokens has step 1")
        parts = [self._file(shard, kind, dtype)[first:last] for shard, first, last in self._spans(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, its first token, the one after its last) of each shard that a range of tokens touches."""
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            if end > start:
                yield shard, start - base, min(stop, end) - base
            start, shard = max(start, end), shard + 1

    def _shard_path(self, shard: int, kind: str) -> Path:
        return self.path / f"{self.index['shards'][shard]['name']}.{kind}"

    def _file(self, shard: int, kind: str, dtype: np.dtype[Any]) -> Array:
        return self._open(self._shard_path(shard, kind), dtype)


def _open(path: Path, dtype: np.dtype[Any]) -> Array:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # mmap refuses an empty file
    return np.memmap(path, dtype=dtype, mode="r")
