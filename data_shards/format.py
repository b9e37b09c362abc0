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

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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


class CorpusIndex(Form):
    """What `write_index` writes."""

    encoding: _Encoding
    tokens: NonNegativeInt
    documents: NonNegativeInt
    shards: list[_Shard]
    packs: _Packs | None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _adds_up(self) -> CorpusIndex:
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
