"""Tokenizing, loading and resuming, against what one would install instead; prints Markdown tables.

    python tests/benchmarks/data.py tokenize TEXT.jsonl... --tokenizer tokenizer.model --megabytes 50
    python tests/benchmarks/data.py load --tokens 500_000_000
    python tests/benchmarks/data.py resume --tokens 100_000_000

Every measurement is a process, or a group of processes, of its own that reports seconds from its first work to its
last, imports left out, and its peak memory. A peer that is not installed is shown as such: datatrove and litdata come
with the extra `bench`; mosaicml-streaming asks for older transformers and goes into an environment of its own, whose
Python `--streaming-python` names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peers_load import LOADERS, make_tokens
from peers_resume import RESUMES
from peers_tokenize import TOKENIZERS

ABSENT = 77


def measure(
    kind: str, name: str, arguments: dict[str, Any], processes: int, python: str, repeats: int = 3
) -> list[dict[str, Any]] | str:
    """The reports of one contestant's processes, of the run whose slowest was the fastest; or why there are none."""
    runs: list[list[dict[str, Any]]] = []
    for _ in range(repeats):
        folder = Path(tempfile.mkdtemp(dir=arguments["work"]))
        word = json.dumps({**arguments, "folder": str(folder)})
        command = [python, __file__, "one", kind, name, word]
        if processes > 1 and kind == "tokenize":
            command = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(processes), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        shutil.rmtree(folder, ignore_errors=True)
        if done.returncode == ABSENT:
            return "not installed"
        if done.returncode:
            return "failed: " + (done.stderr.strip().splitlines() or ["?"])[-1][:90]
        runs.append([json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("REPORT ")])
    return min(runs, key=lambda reports: max(report["seconds"] for report in reports))


def one(kind: str, name: str, word: str) -> None:
    """One contestant, in this process."""
    contestants: dict[str, Callable[..., dict[str, Any]]] = {
        "tokenize": TOKENIZERS,
        "load": LOADERS,
        "resume": RESUMES,
    }[kind]
    try:
        report = contestants[name](**json.loads(word))
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(ABSENT)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("REPORT " + json.dumps(report | {"mib": int(peak.split()[1]) / 1024}), flush=True)


# -- tokenizing -------------------------------------------------------------------------------------------------


def sample_texts(inputs: Sequence[str], megabytes: float, out: Path) -> tuple[float, int]:
    """Distinct documents of the inputs, shuffled, as JSONL of a `text`; returns their MB and number."""
    from data_shards.inputs import find_files, plan_units, read_records

    def texts() -> Iterable[str]:
        for unit in plan_units(find_files(list(inputs))):
            for record in read_records(unit):
                yield "\n\n".join(value for value in record.values() if isinstance(value, str))

    distinct = sorted(set(filter(None, texts())))
    random.Random(0).shuffle(distinct)
    size = count = 0
    with out.open("w") as file:
        for text in distinct:
            count += 1
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return size / 1e6, count


def tokenize(options: argparse.Namespace, work: Path) -> None:
    """Table of MB/s, end to end."""
    from dist_train.tokenizer import load_tokenizer

    size, count = sample_texts(options.inputs, options.megabytes, work / "texts.jsonl")
    load_tokenizer(options.tokenizer).save(work / "tokenizer")
    print(f"\n{size:.1f} MB of text in {count:,} distinct documents, {options.tokenizer}\n")
    print("| tokenizer | processes | seconds | MB/s | MiB a process | documents with other ids | ours, 2, over it |")
    print("|--|--|--|--|--|--|--|")
    ours: dict[int, float] = {}
    expected: Counter[str] | None = None
    for name in ["sentencepiece", *(name for name in TOKENIZERS if name != "sentencepiece")]:
        for processes in (1, 2):
            arguments = {"work": str(work), "processes": processes}
            own = name in ("dist-train", "sentencepiece")  # these are as many processes as MPI starts
            found = measure("tokenize", name, arguments, processes if own else 1, sys.executable, options.repeats)
            if isinstance(found, str):
                print(f"| {name} | {processes} | {found} |", flush=True)
                continue
            seconds = max(report["seconds"] for report in found)
            ids = Counter(Path(found[0]["ids"]).read_text().split())
            expected = expected or ids
            if name == "dist-train":
                ours[processes] = seconds
            differing = (expected - ids).total()
            cells = [name, processes, f"{seconds:.2f}", f"{size / seconds:.1f}"]
            cells += [f"{max(report['mib'] for report in found):.0f}", differing, _over(ours.get(2), seconds)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _over(ours: float | None, peer: float) -> str:
    return f"{peer / ours:.1f}x" if ours else ""


# -- loading ----------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace, work: Path) -> None:
    """Table of tokens/s of one rank."""
    make_tokens(work / "tokens", options.tokens)
    print(f"\n{options.tokens:,} tokens, batches of {options.batch} x {options.length}, {options.batches} of them\n")
    print("| loader | workers | tokens/s | p99 ms | first batch s | MiB | ours over it |\n|--|--|--|--|--|--|--|")
    ours = None
    for name in LOADERS:
        python = options.streaming_python if name == "mosaicml-streaming" else sys.executable
        prepared = work / f"made-{name}"
        for workers in (0, 2):
            arguments = {
                "work": str(work),
                "prepared": str(prepared),
                "length": options.length,
                "batch": options.batch,
                "batches": options.batches,
                "workers": workers,
            }
            found = measure("load", name, arguments, 1, python, options.repeats)
            if isinstance(found, str):
                print(f"| {name} | {workers} | {found} |", flush=True)
                continue
            (report,) = found
            rate = options.batches * options.batch * options.length / report["seconds"]
            ours = ours or rate
            cells = [name, workers, f"{rate:,.0f}", f"{report['p99'] * 1e3:.2f}", f"{report['first']:.3f}"]
            print(
                "| " + " | ".join(map(str, [*cells, f"{report['mib']:.0f}", f"{ours / rate:.1f}x"])) + " |", flush=True
            )
        shutil.rmtree(prepared, ignore_errors=True)


# -- resuming ---------------------------------------------------------------------------------------------------


def resume(options: argparse.Namespace, work: Path) -> None:
    """Table of seconds to the first batch at 90 % of an epoch, and of samples repeated and missed in its rest."""
    make_tokens(work / "tokens", options.tokens)
    print(
        f"\n{options.tokens:,} tokens, stopped at 90 % of an epoch, global batch {options.batch} x {options.length}\n"
    )
    print("| loader | ranks | seconds to the first batch | repeated | missed |\n|--|--|--|--|--|")
    for name in RESUMES:
        python = options.streaming_python if name == "mosaicml-streaming" else sys.executable
        for before, after in ((2, 1), (2, 2), (2, 4)):
            arguments = {
                "work": str(work),
                "prepared": str(work / f"made-{name}"),
                "length": options.length,
                "batch": options.batch,
                "before": before,
                "after": after,
            }
            found = measure("resume", name, arguments, 1, python, 1)
            cells: Sequence[Any] = [found]
            if not isinstance(found, str):
                (report,) = found
                cells = [f"{report['seconds']:.3f}", report["repeated"], report["missed"]]
            print("| " + " | ".join(map(str, [name, f"{before} -> {after}", *cells])) + " |", flush=True)


def main() -> None:
    """Reads the sizes, prints the tables."""
    if sys.argv[1:2] == ["one"]:
        one(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for what is made (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    kinds = parser.add_subparsers(dest="kind", required=True)
    tokenizing = kinds.add_parser("tokenize")
    tokenizing.add_argument("inputs", nargs="+")
    tokenizing.add_argument("--tokenizer", required=True)
    tokenizing.add_argument("--megabytes", type=float, default=50)
    for kind in ("load", "resume"):
        loading = kinds.add_parser(kind)
        loading.add_argument("--tokens", type=int, default=500_000_000)
        loading.add_argument("--length", type=int, default=2048)
        loading.add_argument("--batch", type=int, default=16)
        loading.add_argument("--batches", type=int, default=2000)
        loading.add_argument("--streaming-python", default=sys.executable)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, best of {options.repeats}")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        {"tokenize": tokenize, "load": load, "resume": resume}[options.kind](options, Path(work))


if __name__ == "__main__":
    main()
