"""Real English text that every installation has: documentation strings, read from source files without importing them.

build_corpus writes, below its `out`:
    train.jsonl, heldout.jsonl                {"text", "name"}: documents
    seeds.train.jsonl, seeds.heldout.jsonl    {"prompt", "response", "name"}: questions and answers about them
    stats.json                                what they were made from, and CorpusStats; written last
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_shards.files import file_xxh64, read_json, write_atomically, write_json

Progress = Callable[[int, int, str], None]  # files read so far, how many there are, the package at hand
_FILES = ("train.jsonl", "heldout.jsonl", "seeds.train.jsonl", "seeds.heldout.jsonl")
STDLIB = "stdlib"  # stands for the whole standard library

# What a plain installation of the dependencies brings, in the order in which it is read: of two near-duplicates the
# first one stays.
PACKAGES = (
    STDLIB,
    *("numpy", "pandas", "sympy", "networkx", "matplotlib", "mpl_toolkits", "torch", "transformers", "deepspeed"),
    *("datasets", "huggingface_hub", "tensorboard", "pydantic", "pyarrow", "PIL", "jinja2", "werkzeug", "fsspec"),
    *("fontTools", "mpmath", "setuptools", "packaging", "markdown", "pyparsing", "click", "rich", "dateutil"),
    *("psutil", "tqdm", "anyio", "filelock", "dill", "absl", "grpc", "einops", "tokenizers", "mpi4py"),
)

# Tests say little in prose, and vendored copies what their originals say. The internals of torch and the models of
# transformers are more than a third of all source, for a seventh of the text.
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing/_internal|_vendor|idlelib|lib2to3|turtledemo)/|(^|/)(test_\w+|conftest)\.py$"
    r"|^torch/_|^transformers/models/"
)

# NUL and other control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_MIN_DOCUMENT_CHARS = 40
_MIN_ANSWER_CHARS = 60
_HELDOUT_ONE_IN = 20  # groups of modules
_SHINGLE_WORDS = 8
_MAX_SEEN = 0.5  # share of a document's shingles that documents before it, in its split, may have had
_MAX_SEEN_IN_TRAIN = 0.2  # share of a held-out document's shingles that the training split may have

# UTF-8 bytes to those of words and spaces: letters in lower case, digits, underscores, all that is not ASCII.
_TO_WORDS = bytes(b if b >= 128 or chr(b).isalnum() or b == ord("_") else 32 for b in bytes(range(256)).lower())
_WEIGHTS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(_SHINGLE_WORDS)], dtype=np.uint64)
_QUESTIONS = (
    "What does the {kind} `{name}` do?",
    "What is the {kind} `{name}` for?",
    "Explain the {kind} `{name}`.",
    "Tell me about the {kind} `{name}`.",
    "How would you describe the {kind} `{name}`?",
    "I came across the {kind} `{name}`. What should I know about it?",
)
_PARAGRAPH_END = re.compile(r"\n\s*\n|\Z")
# How a text begins that answers no question: a list of parameters, code, a directive.
_NOT_PROSE = re.compile(
    r"(Args|Arguments|Param\w*|Returns?|Yields|Raises|Examples?|Usage)\s*(:|\n[-=])|[`*]*\w+[`*]* \(|>>>|```|\.\. |:\w"
)
# How a text ends that announces what was cut off: "For example:", or a heading underlined with dashes.
_ANNOUNCEMENT = re.compile(r"(:|[-=~^]{3,})$")


@dataclass(frozen=True)
class SplitStats:
    """One side of the split: numbers of documents, of bytes of their UTF-8 text, and of question-answer pairs."""

    documents: int
    bytes: int
    pairs: int


@dataclass(frozen=True)
class CorpusStats:
    """What a corpus holds and what was left out of it."""

    train: SplitStats
    heldout: SplitStats
    packages: dict[str, int]  # those read, with the bytes of text kept from each
    missing: list[str]  # those not installed, or without Python sources
    files: int  # read
    unreadable: int  # files that are not UTF-8, or not Python as this interpreter knows it
    duplicates: int  # documents too much like those before them in their split
    overlapping: int  # held-out documents too much like training documents

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.train.documents:,} documents ({self.train.bytes / 1e6:.1f} MB), {self.train.pairs:,} pairs; held "
            f"out {self.heldout.documents:,} ({self.heldout.bytes / 1e6:.1f} MB), {self.heldout.pairs:,} pairs; from "
            f"{len(self.packages)} packages, {self.duplicates + self.overlapping:,} near-duplicates dropped"
        )


@dataclass(frozen=True)
class _Source:
    package: str
    module: str
    path: Path


@dataclass(frozen=True)
class _Document:
    source: _Source
    name: str
    kind: str
    text: str
    size: int  # bytes of the text in UTF-8


def build_corpus(
    out: Path,
    *,
    packages: Sequence[str] = PACKAGES,
    max_bytes: int | None = None,
    max_answer_chars: int = 600,
    progress: Progress | None = None,
) -> CorpusStats:
    """Write documents and question-answer pairs below `out`; the same installation gives the same bytes.

    `packages`: top-level names as one would import them, or STDLIB. `max_bytes`: training documents end before the one
    that would take their text beyond it, though all files are read. `max_answer_chars`: the longest answer.
    `progress` is called about 200 times.

    Returns at once what an earlier call found, if its arguments and sources were the same. Raises DataError when a file
    cannot be written, or when stats.json was damaged.
    """
    sources = [source for package in packages for source in _find_sources(package)]
    origin = {
        "arguments": [list(packages), max_bytes, max_answer_chars],
        "sources": _fingerprint(sources),
        "readers": [sys.version, file_xxh64(Path(__file__))],
    }
    stats_path = out / "stats.json"
    if stats_path.exists():
        found = read_json(stats_path)
        if found["origin"] == origin and all((out / name).exists() for name in _FILES):
            splits = {split: SplitStats(**found["stats"][split]) for split in ("train", "heldout")}
            return CorpusStats(**{**found["stats"], **splits})
        stats_path.unlink()  # from here on it would describe files that are being replaced

    counts: Counter[str] = Counter()
    with ExitStack() as afterwards:
        if gc.isenabled():  # syntax trees hold no cycles; walking them in search of some nearly doubles the time
            gc.disable()
            afterwards.callback(gc.enable)
        documents = list(_read_documents(sources, counts, progress))
    train, heldout = _split(documents, max_bytes, counts)
    kept = {source.package: 0 for source in sources}
    for document in (*train, *heldout):
        kept[document.source.package] += document.size
    out.mkdir(parents=True, exist_ok=True)
    stats = CorpusStats(
        train=_write_split(out, "train", train, max_answer_chars),
        heldout=_write_split(out, "heldout", heldout, max_answer_chars),
        packages=kept,
        missing=[package for package in packages if package not in kept],
        files=len(sources) - counts["unreadable"],
        **{what: counts[what] for what in ("unreadable", "duplicates", "overlapping")},
    )
    write_json(stats_path, {"origin": origin, "stats": asdict(stats)})
    return stats


def _find_sources(package: str) -> Iterator[_Source]:
    """The source files of a package in the order of their paths; none where it is missing."""
    for root in _find_roots(package):
        files = [root] if root.suffix == ".py" else root.rglob("*.py")
        paths = {file.relative_to(root.parent).as_posix(): file for file in files if file.is_file()}
        for name in sorted(paths):
            if not _SKIPPED.search(name):
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                yield _Source(package, module, paths[name])


def _find_roots(package: str) -> list[Path]:
    if package == STDLIB:  # by name, because other packages may be installed below the same folder
        names = [Path(sysconfig.get_path("stdlib"), name) for name in sorted(sys.stdlib_module_names)]
        return [path if path.is_dir() else path.with_suffix(".py") for path in names]
    spec = find_spec(package)  # would import only what is before a dot
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(location) for location in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _fingerprint(sources: Iterable[_Source]) -> str:
    """Changes when a file comes, goes or is written anew."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        status = source.path.stat()
        digest.update(f"{source.module} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_documents(sources: Sequence[_Source], counts: Counter[str], progress: Progress | None) -> Iterator[_Document]:
    every = -(-len(sources) // 200)
    for done, source in enumerate(sources, start=1):
        tree = _parse(source.path)
        counts["unreadable"] += tree is None
        for name, kind, docstring in _docstrings(tree, source.module) if tree else ():
            text = inspect.cleandoc(_UNPRINTABLE.sub("", docstring)).strip()
            if len(text) >= _MIN_DOCUMENT_CHARS and re.search(r"\w", text):
                yield _Document(source, name, kind, text, len(text.encode()))
        if progress and (done % every == 0 or done == len(sources)):
            progress(done, len(sources), source.package)


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as SyntaxWarning for an invalid escape
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    """Qualified name, kind and raw text of each docstring in source order."""
    if docstring := ast.get_docstring(tree, clean=False):
        yield module, "module", docstring
    yield from _docstrings_within(tree.body, module, "function")


def _docstrings_within(body: Iterable[ast.AST], prefix: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """Those of classes and of functions, which are of `kind`; what is defined inside functions is left alone."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name, is_class = f"{prefix}.{node.name}", isinstance(node, ast.ClassDef)
            if docstring := ast.get_docstring(node, clean=False):
                yield name, "class" if is_class else kind, docstring
            if is_class:
                yield from _docstrings_within(node.body, name, "method")
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _docstrings_within(getattr(node, block, ()), prefix, kind)


def _split(
    documents: Sequence[_Document], max_bytes: int | None, counts: Counter[str]
) -> tuple[list[_Document], list[_Document]]:
    """The documents to train on and those held out, without near-duplicates in either or between them."""
    shingles, num_shingles = _number_shingles([document.text for document in documents])
    in_train, in_heldout = np.zeros((2, num_shingles), dtype=bool)
    candidates: dict[bool, list[tuple[_Document, NDArray[np.int64]]]] = {False: [], True: []}
    for document, own in zip(documents, shingles, strict=True):
        candidates[_is_heldout(document.source.module)].append((document, own))

    train, bytes_left = [], float("inf") if max_bytes is None else max_bytes
    for document, own in candidates[False]:
        if in_train[own].mean() > _MAX_SEEN:
            counts["duplicates"] += 1
            continue
        bytes_left -= document.size
        if bytes_left < 0:
            break
        in_train[own] = True
        train.append(document)

    heldout = []
    for document, own in candidates[True]:
        if in_train[own].mean() > _MAX_SEEN_IN_TRAIN:
            counts["overlapping"] += 1
        elif in_heldout[own].mean() > _MAX_SEEN:
            counts["duplicates"] += 1
        else:
            in_heldout[own] = True
            heldout.append(document)
    return train, heldout


def _is_heldout(module: str) -> bool:
    """By the group, which is `torch.nn` for all modules below it, and `email` in the standard library."""
    top, *below = module.split(".")
    group = top if top in sys.stdlib_module_names or not below else f"{top}.{below[0]}"
    digest = hashlib.blake2b(f"held-out {group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELDOUT_ONE_IN == 0


def _number_shingles(texts: Sequence[str]) -> tuple[list[NDArray[np.int64]], int]:
    """The shingles of each text as numbers from 0, the same for the same words; and how many numbers there are."""
    if not texts:
        return [], 0
    hashes = [_hash_shingles(text) for text in texts]
    distinct, numbers = np.unique(np.concatenate(hashes), return_inverse=True)
    return np.split(numbers, np.cumsum([len(own) for own in hashes])[:-1]), len(distinct)


def _hash_shingles(text: str) -> NDArray[np.uint64]:
    """uint64 (words - 7), one for every 8 words in a row whatever their case and punctuation; (1,) if there are fewer.

    A hash is a polynomial in the hashes of its words modulo 2^64, and so a convolution gives all of them.
    """
    words = text.encode().translate(_TO_WORDS).split()
    hashes = np.fromiter(map(xxhash.xxh64_intdigest, words), dtype=np.uint64, count=len(words))
    return np.convolve(hashes, _WEIGHTS[: len(words)], "valid")


def _write_split(out: Path, split: str, documents: Sequence[_Document], max_answer_chars: int) -> SplitStats:
    pairs = _pairs(documents, max_answer_chars)
    _write_jsonl(out / f"{split}.jsonl", ({"text": document.text, "name": document.name} for document in documents))
    _write_jsonl(out / f"seeds.{split}.jsonl", pairs)
    return SplitStats(len(documents), sum(document.size for document in documents), len(pairs))


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_atomically(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def _pairs(documents: Iterable[_Document], max_answer_chars: int) -> list[dict[str, str]]:
    """A question and an answer about each public name that has one; the first where a name is defined repeatedly."""
    pairs: dict[str, dict[str, str]] = {}
    for document in documents:
        name, answer = document.name, _answer(document.text, max_answer_chars)
        if not re.search(r"(^|\.)_", name) and len(answer) >= _MIN_ANSWER_CHARS:
            question = _QUESTIONS[xxhash.xxh64_intdigest(name.encode()) % len(_QUESTIONS)]
            prompt = question.format(kind=document.kind, name=name)
            pairs.setdefault(name, {"prompt": prompt, "response": answer, "name": name})
    return list(pairs.values())


def _answer(text: str, max_chars: int) -> str:
    """The most first paragraphs within `max_chars` that stand on their own; empty where there are none."""
    if _NOT_PROSE.match(text):
        return ""
    ends = [match.start() for match in _PARAGRAPH_END.finditer(text) if match.start() <= max_chars]
    answers = (text[:end] for end in reversed(ends))
    return next((a for a in answers if not _ANNOUNCEMENT.search(a) and a.count("```") % 2 == 0), "")
