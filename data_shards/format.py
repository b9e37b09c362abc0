"""Token shards on disk.

A corpus is a folder:

    shard-00000.tokens    token ids, flat, little-endian uint16 (uint32 from a vocabulary of 65,536 on)
    shard-00000.offsets   where each document begins, uint64, one more entry than documents
    shard-00000.mask      only for conversations: uint8 for each token, 1 where it is part of a response
    packs.documents       only for conversations: the documents of all packs, one pack after the other, uint64
    packs.offsets         only for conversations: where each pack begins in it, uint64, one more entry than packs
    index.json            written last: counts, and the size and xxh64 of every file; a folder without it is no corpus

Readers memory-map; opening costs the index and a `stat` of each file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_shards.errors import DataError
from data_shards.files import (
    AtomicFile,
    FileRecord,
    Form,
    file_xxh64,
    inside,
    read_json,
    refuse_other_form,
    write_atomically,
    write_json,
)

FORMAT_VERSION = 1
INDEX = "index.json"

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of one token id on disk."""
    return np.dtype("<u2" if vocab_size < 65_536 else "<u4")


@dataclass(frozen=True)
class Encoding:
    """How text became ids: stored in the index, compared by readers.

    `tokenizer` is the sha256 of the tokenizer's file, `bos` and `eos` say whether each document begins and ends so;
    `separator` is the id at its end where that is another than EOS.
    """

    tokenizer: str
    vocab_size: int
    bos: bool = True
    eos: bool = True
    separator: int | None = None

    def as_json(self) -> dict[str, Any]:
        """As stored in the index."""
        stored = {"tokenizer": self.tokenizer, "vocab_size": self.vocab_size, "bos": self.bos, "eos": self.eos}
        return stored if self.separator is None else {**stored, "separator": self.separator}


class _Encoding(Form, extra="forbid"):
    tokenizer: str
    vocab_size: PositiveInt
    bos: bool
    eos: bool
    separator: NonNegativeInt | None = None


class _Faults(Form):
    counts: dict[str, NonNegativeInt]
    named: list[Annotated[list[str], Field(min_length=3, max_length=3)]]


class _Shard(Form):
    name: str
    tokens: NonNegativeInt
    documents: NonNegativeInt
    files: dict[str, FileRecord]
    faults: _Faults | None = None  # `ShardWriter` has none to tell


class _Packs(Form):
    sequence_length: PositiveInt
    packs: NonNegativeInt
    files: dict[str, FileRecord]


class _Index(Form):
    """What `write_index` writes."""

    encoding: _Encoding
    tokens: NonNegativeInt
    documents: NonNegativeInt
    shards: list[_Shard]
    packs: _Packs | None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _adds_up(self) -> _Index:
        for name in ("tokens", "documents"):
            if (found := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} are {getattr(self, name)}, those of the shards {found}")
        return self


class ShardFiles:
    """The files of one shard, written batch by batch; they get their names when the `with` block is left well.

    `record`, after the block, goes into the index.
    """

    def __init__(self, folder: Path, number: int, encoding: Encoding, *, has_mask: bool = False) -> None:
        self.name = f"shard-{number:05d}"
        self._encoding, self._dtype = encoding, token_dtype(encoding.vocab_size)
        self._folder = folder
        kinds = ("tokens", "offsets", "mask") if has_mask else ("tokens", "offsets")
        self._files = {kind: AtomicFile(folder / f"{self.name}.{kind}") for kind in kinds}
        self._tokens = self._documents = 0

    def __enter__(self) -> ShardFiles:
        """Open the files."""
        self._stack = ExitStack()
        for file in self._files.values():
            self._stack.enter_context(file)
        self._files["offsets"].write(np.zeros(1, "<u8").tobytes())
        return self

    def add(self, ids: Array, lengths: Array, mask: Array | None = None) -> None:
        """Append documents: token ids of all, [tokens]; tokens of each, [documents]; 1 on response tokens, [tokens].

        Raises DataError for an id outside the vocabulary, or without the mask that this shard was said to have.
        """
        if len(ids) and (int(ids.max()) >= self._encoding.vocab_size or int(ids.min()) < 0):
            raise DataError(
                f"{self._folder / self.name}: a token id lies outside the vocabulary of {self._encoding.vocab_size}"
            )
        if (mask is None) == ("mask" in self._files):
            raise DataError(f"{self._folder / self.name}: either every document has a mask or none has")
        self._files["tokens"].write(ids.astype(self._dtype).tobytes())
        self._files["offsets"].write((self._tokens + np.cumsum(lengths)).astype("<u8").tobytes())
        if mask is not None:
            self._files["mask"].write(mask.astype("u1").tobytes())
        self._tokens += len(ids)
        self._documents += len(lengths)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Commit the files, or take them away."""
        self._stack.__exit__(kind, error, at)

    @property
    def record(self) -> dict[str, Any]:
        """Name, counts, and each file's size and checksum."""
        files = {file.path.name: file.record for file in self._files.values()}
        return {"name": self.name, "tokens": self._tokens, "documents": self._documents, "files": files}


def write_shard(
    folder: Path, number: int, ids: Array, lengths: Array, encoding: Encoding, mask: Array | None = None
) -> dict[str, Any]:
    """Write one shard at once and return its record for the index; arguments as for `ShardFiles.add`."""
    with ShardFiles(folder, number, encoding, has_mask=mask is not None) as files:
        files.add(ids, lengths, mask)
    return files.record


def write_packs(folder: Path, packs: Sequence[Sequence[int]], sequence_length: int) -> dict[str, Any]:
    """Write which documents each pack holds and return the record for the index."""
    arrays = {
        "packs.documents": np.array([document for pack in packs for document in pack], dtype="<u8"),
        "packs.offsets": np.cumsum([0, *map(len, packs)]).astype("<u8"),
    }
    files = {name: write_atomically(folder / name, [array.tobytes()]) for name, array in arrays.items()}
    return {"sequence_length": sequence_length, "packs": len(packs), "files": files}


def write_index(
    folder: Path,
    shards: Sequence[dict[str, Any]],
    encoding: Encoding,
    *,
    packs: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Commit a corpus: from here on the folder is one. `packs`: what `write_packs` returned."""
    write_json(
        folder / INDEX,
        {
            "format": FORMAT_VERSION,
            "encoding": encoding.as_json(),
            "tokens": sum(shard["tokens"] for shard in shards),
            "documents": sum(shard["documents"] for shard in shards),
            "shards": list(shards),
            "packs": packs,
            "provenance": provenance or {},
        },
    )


@dataclass
class ShardWriter:
    """Writes documents one after the other; shards are cut at `shard_tokens`. Commits on leaving the `with` block.

        with ShardWriter(folder, Encoding(tokenizer_sha256, 32_000)) as writer:
            writer.add(ids)

    Leaving by an exception commits nothing: the folder then holds no index and no reader takes it for a corpus.
    """

    folder: Path
    encoding: Encoding
    shard_tokens: int = 1 << 28
    _shards: list[dict[str, Any]] = field(default_factory=list, init=False)
    _ids: list[Array] = field(default_factory=list, init=False)
    _masks: list[Array] = field(default_factory=list, init=False)
    _tokens: int = field(default=0, init=False)

    def __enter__(self) -> ShardWriter:
        """Make the folder; refuse one that holds a corpus already."""
        self.folder = Path(self.folder)
        if (self.folder / INDEX).exists():
            raise DataError(f"{self.folder}: holds a corpus already; remove it or write elsewhere")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, ids: Sequence[int] | Array, mask: Sequence[int] | Array | None = None) -> None:
        """Append one document, and with it which of its tokens are part of a response."""
        if self._ids and (mask is None) == bool(self._masks):
            raise DataError(f"{self.folder}: either every document has a mask or none has")
        self._ids.append(np.asarray(ids, dtype=np.int64))
        if mask is not None:
            self._masks.append(np.asarray(mask, dtype=np.uint8))
            if len(self._masks[-1]) != len(self._ids[-1]):
                raise DataError(f"{self.folder}: a document of {len(ids)} tokens has a mask of {len(mask)}")
        self._tokens += len(ids)
        if self._tokens >= self.shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if not self._ids:
            return
        lengths = np.array([len(ids) for ids in self._ids])
        mask = np.concatenate(self._masks) if self._masks else None
        number = len(self._shards)
        self._shards.append(write_shard(self.folder, number, np.concatenate(self._ids), lengths, self.encoding, mask))
        self._ids, self._masks, self._tokens = [], [], 0

    def commit(self, *, packs: dict[str, Any] | None = None, provenance: dict[str, Any] | None = None) -> None:
        """Write what is left and the index."""
        self._flush()
        write_index(self.folder, self._shards, self.encoding, packs=packs, provenance=provenance)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Commit, unless an exception is under way or `commit` was called."""
        if kind is None and not (self.folder / INDEX).exists():
            self.commit()


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
        refuse_other_form(self.path / INDEX, self.index, _Index)
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
