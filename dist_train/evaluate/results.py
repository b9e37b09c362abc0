"""What an evaluation found, as JSON, Markdown and a page."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, get_args

from data_shards.files import write_atomically, write_json
from dist_train.config import Engine, EvaluateConfig
from dist_train.decoding.served import PARALLEL
from dist_train.errors import UserError
from dist_train.evaluate.measures import (
    accepted_histogram,
    accepted_shares,
    bootstrap,
    bootstrap_difference,
    count,
    memory_bound_speed_up,
    position_acceptance,
)
from dist_train.evaluate.tasks import Prompts
from dist_train.reports.plots import acceptance_by_position, accepted_length_histogram, block_efficiency_bars
from dist_train.reports.results import COUNTS, RESULTS
from dist_train.reports.tables import notes, results_markdown, results_tables

Found = Mapping["Cell", Mapping[str, list[Any]]]


class Cell(NamedTuple):
    """One condition of the evaluation."""

    task: str
    drafter: str
    gamma: int
    temperature: float
    drafting: str


def drafts_in_one_pass(drafting: str) -> bool:
    """Whether a drafter that can draft a block in one pass does, in this way of drafting."""
    return drafting not in get_args(Engine) or drafting in PARALLEL


def make_folder(out: Path) -> None:
    """Make the folder of the results. Raises UserError where nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another folder") from error


def gather(
    config: EvaluateConfig,
    tasks: Mapping[str, Prompts],
    found: Found,
    parameters: Mapping[str, int],
    target: Mapping[str, Any],
    one_pass: Collection[str] = (),
) -> dict[str, Any]:
    """The content of results.json but for what is timed. `found`: blocks and lengths of the texts of each cell;
    `one_pass`: the drafters that draft a block in one pass.
    """
    base = next(iter(config.drafters))
    rows = []
    for cell, counts in found.items():
        blocks = counts["blocks"]
        efficiency, histogram = bootstrap(blocks), accepted_histogram(blocks, cell.gamma)
        calls, tokens = sum(map(len, blocks)), sum(counts["lengths"])
        if not calls:
            raise UserError(f"task {cell.task}: every answer ends with its first token, before anything is drafted")
        is_one = cell.drafter in one_pass and drafts_in_one_pass(cell.drafting)
        ratio = parameters[cell.drafter] / parameters[""]
        # As servers do it, the first token of each answer is the prefill's.
        in_blocks = tokens - len(blocks) * (cell.drafting in get_args(Engine))
        rows.append(
            {
                **cell._asdict(),
                "top_p": tasks[cell.task].sampling.top_p,
                "max_new_tokens": tasks[cell.task].sampling.max_new_tokens,
                "prompts": len(blocks),
                "tokens": tokens,
                "target_calls": calls,
                "block_efficiency": efficiency._asdict(),
                "block_efficiency_last_block_cut": in_blocks / calls,
                "difference": bootstrap_difference(blocks, found[cell._replace(drafter=base)]["blocks"])._asdict(),
                "mbsu": memory_bound_speed_up(efficiency.value, ratio, 1 if is_one else cell.gamma),
                "accepted_histogram": histogram,
                "position_acceptance": position_acceptance(histogram),
                "accepted_shares": accepted_shares(histogram),
            }
        )
    return {
        "target": {**target, "parameters": parameters[""]},
        "drafters": {
            name: {
                "path": str(path),
                "parameters": parameters[name],
                "ratio": parameters[name] / parameters[""],
                "one_pass": name in one_pass,
            }
            for name, path in config.drafters.items()
        },
        "base": base,
        "prompts": {name: prompts.identity for name, prompts in tasks.items()},
        "rows": rows,
        "comparisons": _comparisons(list(config.drafters), found),
    }


def _comparisons(drafters: list[str], found: Found) -> list[dict[str, Any]]:
    """Every two drafters under every condition."""
    rows = []
    for one, other in combinations(drafters, 2):
        for cell in (cell for cell in found if cell.drafter == one):
            better, worse = found[cell._replace(drafter=other)]["blocks"], found[cell]["blocks"]
            difference = bootstrap_difference(better, worse)
            rows.append(
                {
                    **{key: value for key, value in cell._asdict().items() if key != "drafter"},
                    "of": other,
                    "over": one,
                    "runs": [1, 1],
                    "difference": difference._asdict(),
                    "verdict": difference.verdict,
                }
            )
    return rows


def write_results(out: Path, results: dict[str, Any], found: Found) -> str:
    """Write results.json, .md and .html and the counts that comparisons need; returns the Markdown."""
    cells = [
        {**cell._asdict(), **count(counts["blocks"])._asdict(), "lengths": counts["lengths"]}
        for cell, counts in found.items()
    ]
    write_json(out / COUNTS, {"cells": cells})
    write_json(out / RESULTS, results)
    markdown = results_markdown(results)
    write_atomically(out / "results.md", [markdown.encode()])
    write_atomically(out / "results.html", [_page(results).encode()])
    return markdown


def _page(results: dict[str, Any]) -> str:
    import jinja2

    figures = {}
    for task in results["prompts"]:
        figures[f"{task}: block efficiency, 95 % bootstrap intervals over prompts"] = block_efficiency_bars(
            results, task
        )
        for temperature in sorted({row["temperature"] for row in results["rows"] if row["task"] == task}):
            at = f"{task}, T {temperature:g}"
            figures[f"{at}: how many drafted tokens were accepted"] = accepted_length_histogram(
                results, task, temperature
            )
            figures[f"{at}: share of blocks whose k-th draft was accepted"] = acceptance_by_position(
                results, task, temperature
            )
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("results.html").render(
        target=results["target"],
        drafters=results["drafters"],
        figures=figures,
        tables=results_tables(results),
        notes=notes(results),
    )
