"""`dist-train evaluate --compare`: results folders side by side, each two with the interval of their difference.

    dist-train evaluate --compare A B C
    dist-train evaluate --compare kld=a1,a2,a3 tvdpp=b1,b2,b3
    dist-train evaluate --compare kld=seed1:kld,seed2:kld tvdpp=seed1:tvdpp,seed2:tvdpp

A folder that holds several drafters takes part with all of them; `FOLDER:DRAFTER` picks one. A name with several
folders is a method trained several times, see `measures.bootstrap_runs` for its intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import write_atomically, write_json
from dist_train.errors import UserError
from dist_train.evaluate.measures import Counts, bootstrap_runs
from dist_train.evaluate.results import make_folder
from dist_train.reports.results import COUNTS, RESULTS, read_counts, read_results
from dist_train.reports.tables import comparison_table, interval, markdown

Condition = tuple[str, int, float, str]  # task, gamma, temperature, drafting

NOTE = (
    "Intervals are 95 %, each for itself: among many, one in twenty misses. A verdict is given where an interval "
    "excludes 0."
)
ONE_RUN = "Methods with one run are single trainings: another seed would move them, which their intervals do not show."


class Run(NamedTuple):
    """One training: its folder, and its counts under each condition."""

    folder: Path
    drafter: str
    counts: Mapping[Condition, Counts]


def compare(words: Sequence[str], out: Path | None = None) -> dict[str, Any]:
    """Block efficiency of each method and the difference of each two, under every condition; printed as Markdown.

    `words`: FOLDER, FOLDER:DRAFTER or NAME=RUN,RUN,... With `out`, comparison.json and comparison.md are written there.
    Raises UserError when targets, prompts or conditions differ, or there are fewer than two methods.
    """
    methods: dict[str, list[Run]] = {}
    for word in words:
        for name, runs in _methods(word).items():
            if name in methods:
                raise UserError(f"--compare: two methods are named {name}; write NAME=FOLDER")
            methods[name] = runs
    if len(methods) < 2:
        raise UserError("--compare: one method alone; name at least two results folders")
    runs = [run for several in methods.values() for run in several]
    places = [(run.folder.resolve(), run.drafter) for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"--compare: {twice.folder}:{twice.drafter} is named twice")
    for run in runs[1:]:
        _refuse_what_differs(runs[0], run)
    if out is not None:
        make_folder(out)
    found = _compared(methods)
    text = _as_markdown(found)
    if out is not None:
        write_json(out / "comparison.json", found)
        write_atomically(out / "comparison.md", [text.encode()])
    print(text, flush=True)
    return found


def _methods(word: str) -> dict[str, list[Run]]:
    """Name to runs of one word of the command line."""
    name, equals, listed = word.rpartition("=")
    if not equals:
        folder, drafter = _place(word)
        chosen = [drafter] if drafter else _drafters(folder)
        alone = not drafter and len(chosen) == 1
        return {str(folder) if alone else f"{folder}:{one}": [_read(folder, one)] for one in chosen}
    runs = []
    for part in listed.split(","):
        folder, drafter = _place(part)
        there = _drafters(folder)
        if not drafter:
            drafter = name if name in there else there[0]
            if name not in there and len(there) > 1:
                raise UserError(f"{folder}: has the drafters {', '.join(there)}; write {folder}:DRAFTER")
        runs.append(_read(folder, drafter))
    return {name: runs}


def _place(text: str) -> tuple[Path, str]:
    folder, colon, drafter = text.rpartition(":")
    return (Path(folder), drafter) if colon and not Path(text).exists() else (Path(text), "")


def _results(folder: Path) -> dict[str, Any]:
    if not (folder / RESULTS).exists() or not (folder / COUNTS).exists():
        raise UserError(f"{folder}: no finished results of dist-train evaluate here")
    return read_results(folder)


def _drafters(folder: Path) -> list[str]:
    return list(_results(folder)["drafters"])


def _read(folder: Path, drafter: str) -> Run:
    there = _drafters(folder)
    if drafter not in there:
        raise UserError(f"{folder}: no drafter {drafter!r} in it; it has {', '.join(there)}")
    counts = {
        (cell["task"], cell["gamma"], cell["temperature"], cell["drafting"]): Counts(cell["tokens"], cell["calls"])
        for cell in read_counts(folder)
        if cell["drafter"] == drafter
    }
    return Run(folder, drafter, counts)


def _refuse_what_differs(one: Run, other: Run) -> None:
    mine, theirs = _results(one.folder), _results(other.folder)
    differ = f"{one.folder} and {other.folder} cannot be compared:"
    ours, others = mine["target"], theirs["target"]
    if any(ours[key] != others[key] for key in ("weights", "parameters", "precision")):
        named = ("path", "revision", "precision", "parameters", "weights")
        apart = [f"{key} {ours[key]} and {others[key]}" for key in named if ours[key] != others[key]]
        raise UserError(f"{differ} their targets differ: {', '.join(apart)}")
    for task in mine["prompts"].keys() | theirs["prompts"].keys():
        if mine["prompts"].get(task) != theirs["prompts"].get(task):
            raise UserError(f"{differ} the prompts of task {task} differ")
    if strays := sorted(_conditions(mine) ^ _conditions(theirs)):
        shown = "task {}, gamma {}, T {:g}, {} drafts, top_p {:g}, max_new_tokens {}".format(*strays[0])
        raise UserError(f"{differ} only one has the condition {shown}")
    if _sizes(one) != _sizes(other):
        raise UserError(f"{differ} their {COUNTS} are of other conditions or prompts; evaluate them again")


def _sizes(run: Run) -> dict[Condition, int]:
    """How many prompts there are counts of."""
    return {condition: len(counts.calls) for condition, counts in run.counts.items()}


def _conditions(results: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    keys = ("task", "gamma", "temperature", "drafting", "top_p", "max_new_tokens")
    return {tuple(row[key] for key in keys) for row in results["rows"]}


def _compared(methods: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    conditions = list(next(iter(methods.values()))[0].counts)
    keys = ("task", "gamma", "temperature", "drafting")
    efficiencies, comparisons = [], []
    for condition in conditions:
        shared = dict(zip(keys, condition, strict=True))
        counts = {name: [run.counts[condition] for run in runs] for name, runs in methods.items()}
        for name, runs in counts.items():
            estimate = bootstrap_runs(runs)
            efficiencies.append({**shared, "method": name, "runs": len(runs), "block_efficiency": estimate._asdict()})
        for one, other in combinations(counts, 2):
            difference = bootstrap_runs(counts[other], counts[one])
            comparisons.append(
                {
                    **shared,
                    "of": other,
                    "over": one,
                    "runs": [len(counts[other]), len(counts[one])],
                    "difference": difference._asdict(),
                    "verdict": difference.verdict,
                }
            )
    return {
        "methods": {name: [f"{run.folder}:{run.drafter}" for run in runs] for name, runs in methods.items()},
        "block_efficiency": efficiencies,
        "comparisons": comparisons,
    }


def _as_markdown(found: Mapping[str, Any]) -> str:
    rows = [
        [
            row["task"],
            f"{row['gamma']}",
            f"{row['temperature']:g}",
            row["drafting"],
            row["method"],
            f"{row['runs']}",
            f"{row['block_efficiency']['value']:.2f} {interval(row['block_efficiency'])}",
        ]
        for row in found["block_efficiency"]
    ]
    header = ["task", "gamma", "T", "drafting", "method", "runs", "block efficiency"]
    notes = [NOTE] + ([ONE_RUN] if any(len(runs) == 1 for runs in found["methods"].values()) else [])
    return "\n".join([markdown(header, rows), markdown(*comparison_table(found["comparisons"])), *notes])
