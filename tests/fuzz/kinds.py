"""What is mutated, and the command that then reads it: a mutant is a function of its number and the base files."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fuzz import mutations
from fuzz.sandbox import Ended

from data_shards.files import write_json

TEXTS = [f"the drafter guesses number {n} and the target agrees, naïve or not 🦙" for n in range(12)]
TREE = [
    {"message_id": "a", "parent_id": None, "text": "Which word is next?", "role": "prompter", "lang": "en"},
    {"message_id": "b", "parent_id": "a", "text": "The next one.", "role": "assistant", "lang": "en"},
    {"message_id": "c", "parent_id": "b", "text": "And then?", "role": "prompter", "lang": "en"},
    {"message_id": "d", "parent_id": "c", "text": "Another.", "role": "assistant", "lang": "de"},
    {"message_id": "e", "parent_id": None, "text": "What is a token?", "role": "prompter", "lang": "en"},
]


def _chat(text: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text}]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": text},
    ]


SEEDS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": text, "source": "x"} for text in TEXTS],
    "chat": [
        *({"messages": _chat(text)} for text in TEXTS[:4]),
        *({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "."}]} for text in TEXTS[4:8]),
        *({"messages": json.dumps(_chat(text))} for text in TEXTS[8:]),
    ],
    "oig": [
        *({"user": text, "chip2": "Yes."} for text in TEXTS[:6]),
        *({"text": f"<human>: {text} <bot>: Yes.", "metadata": {"source": "x"}} for text in TEXTS[6:]),
    ],
    "openassistant": TREE,
    "dolly": [{"instruction": text, "context": "", "response": "Yes.", "category": "qa"} for text in TEXTS],
    "alpaca": [{"instruction": text, "input": "in", "output": "Yes."} for text in TEXTS],
}


@dataclass(frozen=True)
class World:
    """The base files: folders of models, of runs of each stage, and one configuration for each stage as a tree."""

    tokenizer: Path
    target: Path
    hf_target: Path
    drafter: Path
    run: Path
    corpus: Path
    chats: Path
    answers: Path
    results: tuple[Path, Path]
    seeds: Path
    configs: dict[str, Any]


@dataclass(frozen=True)
class Mutant:
    """One changed file and the command that reads it.

    `names`: one of them is in the line of a refusal, which may come after lines about records that were left out.
    `codes`: exit codes that the command documents, beside 0 and 2.
    `judge`: what else is wrong with how it ended, or nothing.
    """

    kind: str
    file: Path
    words: list[Any]
    names: Collection[str]
    codes: Collection[int] = ()
    judge: Callable[[Ended], str] = field(default=lambda ended: "")


Kind = Callable[[World, random.Random, Path], Mutant]


def make(world: World, number: int, folder: Path) -> Mutant:
    """The mutant of this number, its files made in a new `folder`."""
    kind = list(KINDS)[number % len(KINDS)]
    folder.mkdir(parents=True)
    return KINDS[kind](world, random.Random(f"{kind} {number}"), folder)


def _copy(folder: Path, to: Path) -> Path:
    """A copy that shares its files' bytes, which nobody writes into."""
    return shutil.copytree(folder, to, copy_function=os.link)


def _put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# -- records ------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """Of a mutated file, by other readers than ours: how many records it has, and of those how many are usable."""

    records: int
    usable: int


def _table(records: list[Any]) -> pa.Table | None:
    try:
        return pa.Table.from_pylist(records)
    except (pa.ArrowException, TypeError, ValueError, LookupError, OverflowError, AttributeError):
        return None  # not what a table can hold


def _alike(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records by their fields and these fields' types: each group makes a table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(repr({key: type(value) for key, value in record.items()}), []).append(record)
    return [group for group in groups.values() if _table(group)]


def _file(records: list[dict[str, Any]], drawn: random.Random, folder: Path, forms: Collection[str]) -> Path:
    """Records in one of the forms that are read, mutated."""
    form = drawn.choice(list(forms))
    path = folder / f"records.{form}"
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if form == "parquet":
        rows = drawn.choice(_alike(records))
        table = _table(mutations.mutate_tree(rows, drawn)) if drawn.random() < 0.6 else None
        sink = io.BytesIO()
        pq.write_table(table or pa.Table.from_pylist(rows), sink)
        data = sink.getvalue() if table else mutations.mutate_bytes(sink.getvalue(), drawn)
    elif form == "json":
        data = mutations.mutate_json(json.dumps(records).encode(), drawn)
    elif form == "txt":
        data = mutations.mutate_bytes("".join(f"{text}\n" for text in TEXTS).encode(), drawn)
    elif form == "jsonl.gz":
        cut = drawn.random() < 0.5
        data = gzip.compress(lines if cut else mutations.mutate_lines(lines, drawn), mtime=0)
        data = mutations.mutate_bytes(data, drawn) if cut else data
    else:
        data = mutations.mutate_lines(lines, drawn)
    path.write_bytes(data)
    return path


def count(path: Path, fields: Collection[str]) -> Counted | None:
    """What is in a file, None where it cannot be read at all.

    A record is usable where each of `fields` has a text that can be encoded.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if path.suffix == ".parquet":
            wanted = [name for name in fields if name in pq.read_schema(path).names]
            rows = pq.read_table(path, columns=wanted or None).to_pylist()  # what is not wanted may be damaged
        elif path.suffix == ".json" and data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            rows = json.loads(data.decode("utf-8-sig"))
        else:
            lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
            rows = [_parsed(line, path.suffix == ".txt") for line in lines]
    except (ValueError, RecursionError, OSError, EOFError, zlib.error, pa.ArrowException):
        return None
    usable = sum(
        isinstance(row, dict) and all(isinstance(row.get(name), str) and _encodes(row[name]) for name in fields)
        for row in rows
    )
    return Counted(len(rows), usable)


def _parsed(line: bytes, is_text: bool) -> Any:
    try:
        return {"text": line.decode()} if is_text else json.loads(line)
    except (ValueError, RecursionError):
        return None


def _encodes(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _prepared(path: Path, fields: Collection[str], skips: bool, out: Path, ended: Ended) -> str:
    """A record that cannot be used is never left out in silence; where the policy is to skip, all are counted."""
    if ended.code != 0:
        return ""
    counted = count(path, fields)
    if counted is None:
        return "exit code 0, and the file cannot be read"
    index = json.loads((out / "index.json").read_text())
    documents = sum(shard["documents"] for shard in index["shards"])
    left_out = sum(sum(shard["faults"]["counts"].values()) for shard in index["shards"])
    if documents + left_out != counted.records:
        return f"{counted.records} records: {documents} documents, {left_out} told to be left out"
    if not skips and counted.usable != counted.records:
        return f"of {counted.records} records {counted.usable} are usable, and exit code 0"
    return ""


def _prepare(form: str, world: World, drawn: random.Random, folder: Path) -> Mutant:
    fields = ("text",) if form == "text" else ("prompt", "response")
    records = [dict.fromkeys(fields, text) | {"id": n} for n, text in enumerate(TEXTS)]
    forms = (
        ["jsonl", "jsonl.gz", "parquet", "json", "txt"] if form == "text" else ["jsonl", "jsonl.gz", "parquet", "json"]
    )
    path, out = _file(records, drawn, folder, forms), folder / "out"
    skips = drawn.random() < 0.4
    policy = ["faults.malformed=skip", "faults.encoding=skip", "faults.too_long=skip"] if skips else []
    words = ["prepare", f"inputs={path}", f"tokenizer={world.tokenizer}", f"out={out}", f"format={form}", *policy]
    words += ["sequence_length=512"] if form == "chat" else []
    return Mutant(
        f"prepare {form}", path, words, [str(path), str(out)], judge=partial(_prepared, path, fields, skips, out)
    )


def _seeds(world: World, drawn: random.Random, folder: Path) -> Mutant:
    form = drawn.choice(list(SEEDS))
    path = _file(SEEDS[form], drawn, folder, ["jsonl", "jsonl", "jsonl.gz", "parquet", "json"])
    words = [f"target.path={world.target}", f"seeds.inputs={path}", f"seeds.format={form}", "max_new_tokens=8"]
    if drawn.random() < 0.3:
        words += ["seeds.faults={malformed: skip, encoding: skip, too_long: skip}"]
    words += drawn.choice([[], ["seeds.turns=each"], ["seeds.turns=first"], ["seeds.split=train"]])
    words = ["generate", *words, f"out={folder / 'out'}", "--dry-run"]
    return Mutant(f"seeds {form}", path, words, [str(path), "seeds."])


# -- configurations -----------------------------------------------------------------------------------------------


def _keys(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return {key for key in tree if len(key) > 2}.union(*map(_keys, tree.values()))
    return set().union(*map(_keys, tree)) if isinstance(tree, list) else set()


def _config(world: World, drawn: random.Random, folder: Path) -> Mutant:
    stage = drawn.choice(list(world.configs))
    path, tree = folder / "config.yaml", world.configs[stage]
    path.write_bytes(mutations.mutate_yaml(tree, drawn))
    words = ["submit", stage, path, "--dry-run"] if stage == "pipeline" else [stage, path, "--dry-run"]
    if stage in ("pretrain", "distill", "generate") and drawn.random() < 0.2:
        words = ["plan", path, "--gpus", 8, "--gpu", "h100"]
    return Mutant(f"config of {' '.join(map(str, words[:2]))}", path, words, {str(path), *_keys(tree)})


def _override(world: World, drawn: random.Random, folder: Path) -> Mutant:
    """A value on the command line, which cannot hold all that a file can."""
    stage = drawn.choice([name for name in world.configs if name != "pipeline"])
    path, tree = folder / "config.yaml", world.configs[stage]
    path.write_text(yaml.safe_dump(tree))
    where, node = [], tree
    while isinstance(node, dict) and node:
        where.append(drawn.choice(list(node)))
        node = node[where[-1]]
    value = mutations.mutate_yaml({"value": node}, drawn).decode(errors="replace").partition(":")[2].strip()
    word = f"{'.'.join(where)}{drawn.choice(['', '', '', '.0', '.x', 'x'])}={value}".replace("\0", "")
    return Mutant(f"override of {stage}", path, [stage, path, word, "--dry-run"], {str(path), *_keys(tree)})


# -- model folders ------------------------------------------------------------------------------------------------

_MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutations.mutate_json,
    ".jsonl": mutations.mutate_lines,
    ".safetensors": mutations.mutate_safetensors,
    ".jinja": lambda data, drawn: mutations.mutate_template(data.decode(), drawn),
    ".yaml": lambda data, drawn: mutations.mutate_yaml(yaml.safe_load(data), drawn),
}


def _mutate(path: Path, drawn: random.Random) -> None:
    """Change a file in the way of its kind."""
    mutator = _MUTATORS.get(path.suffix, mutations.mutate_bytes)
    _put(path, mutator(path.read_bytes(), drawn))


def _model(world: World, drawn: random.Random, folder: Path) -> Mutant:
    target = _copy(drawn.choice([world.target, world.hf_target]), folder / "model")
    weighty = ["config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"]
    files = sorted(path for path in target.iterdir() if path.is_file())
    path = drawn.choice(files + [file for file in files if file.name in weighty])
    _mutate(path, drawn)
    asks = [f"target.path={target}", "max_new_tokens=8"]
    seeds, out = f"seeds.inputs={world.seeds}", f"out={folder / 'out'}"
    command = drawn.choice(["generate", "evaluate", "export", "check", "plan", "prepare", "drafter"])
    words: list[Any] = {
        "generate": ["generate", *asks, seeds, out, "--dry-run"],
        "evaluate": [
            "evaluate",
            *asks,
            f"drafters={{a: {world.drafter}}}",
            f"tasks=[{{name: a, inputs: {world.seeds}}}]",
            out,
            "--dry-run",
        ],
        "drafter": [
            "evaluate",
            f"target.path={world.target}",
            f"drafters={{a: {target}}}",
            f"tasks=[{{name: a, inputs: {world.seeds}}}]",
            out,
            "--dry-run",
        ],
        "export": ["export", "--check", target, f"drafter={world.drafter}"],
        "check": ["tokenizer", "check", target, world.target],
        "plan": ["plan", *asks, seeds, out, "--gpus", 8, "--gpu", "h100", "--stage", "generate"],
        "prepare": ["prepare", f"inputs={world.seeds}", f"tokenizer={target}", out, "text_field=prompt"],
    }[command]  # fmt: skip
    codes = {"export": [1], "check": [1]}.get(command, [])
    return Mutant(f"{path.name} by {command}", path, words, [str(target)], codes)


# -- run folders --------------------------------------------------------------------------------------------------


def _sealed(path: Path, drawn: random.Random) -> None:
    """Change a JSON file that has its own checksum; sometimes the checksum fits, as of another version's file."""
    if drawn.random() < 0.4:
        return _put(path, mutations.mutate_json(path.read_bytes(), drawn))
    content = json.loads(path.read_text())
    content.pop("xxh64")
    changed = mutations.mutate_tree(content, drawn)
    path.unlink()
    write_json(path, changed if isinstance(changed, dict) else {"files": changed})


def _change(path: Path, drawn: random.Random) -> None:
    if path.suffix == ".json" and b'"xxh64"' in path.read_bytes():
        _sealed(path, drawn)
    else:
        _mutate(path, drawn)


def _run(world: World, drawn: random.Random, folder: Path) -> Mutant:
    run = _copy(world.run, folder / "run")
    names = ["_slurm-*.jsonl", "metrics.jsonl", "config.yaml", "lease.json", "checkpoints/latest"]
    names += ["checkpoints/step-*/manifest.json"] * 2 + ["checkpoints/step-*/**/*"]
    path = drawn.choice(sorted(file for file in run.glob(drawn.choice(names)) if file.is_file()))
    _change(path, drawn)
    words, codes = drawn.choice(
        [
            (["status", run], []),
            (["status", run], []),
            (["checkpoint", "ls", run], [1]),
            (["checkpoint", "verify", run], [1]),
            (["pretrain", *_as_words(world.configs["pretrain"]), f"run.dir={run}", "--dry-run"], []),
            (["export", f"drafter={run}", f"target.path={world.target}", f"out={folder / 'out'}", "--dry-run"], []),
            (["export", "--check", world.target, f"drafter={run}"], [1]),
        ]
    )
    return Mutant(f"{path.name} by {' '.join(map(str, words[:2]))}", path, words, [str(run)], codes)


def _as_words(tree: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in tree.items()]


def _stage_folder(world: World, drawn: random.Random, folder: Path) -> Mutant:
    """A corpus, answers, or results: what a stage's folder is to `status` and to those that read it."""
    kind = drawn.choice(["corpus", "chats", "answers", "results"])
    base = world.results[0] if kind == "results" else getattr(world, kind)
    copied = _copy(base, folder / kind)
    files = sorted(path for path in copied.rglob("*") if path.is_file() and path.suffix not in (".html", ".md"))
    path = drawn.choice(files + [file for file in files if file.suffix == ".json"] * 3)
    _change(path, drawn)
    reader: list[Any] = {
        "corpus": ["prepare", "--verify", f"out={copied}"],
        "chats": ["prepare", "--verify", f"out={copied}"],
        "answers": [
            "prepare", f"inputs={copied}", f"tokenizer={world.tokenizer}", f"out={folder / 'out'}", "format=chat",
            "sequence_length=512",
        ],
        "results": ["evaluate", "--compare", f"a={copied}:base", f"b={world.results[1]}:base"],
    }[kind]  # fmt: skip
    words = drawn.choice([reader, reader, ["status", copied]])
    return Mutant(f"{path.name} of {kind} by {words[0]}", path, words, [str(copied)])


KINDS: dict[str, Kind] = {
    "text": partial(_prepare, "text"),
    "chat": partial(_prepare, "chat"),
    "seeds": _seeds,
    "config": _config,
    "override": _override,
    "model": _model,
    "model again": _model,
    "run": _run,
    "folder": _stage_folder,
}
