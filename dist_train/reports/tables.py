"""Results as tables: for Markdown, for a screen, for a page."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

Table = tuple[list[str], list[list[str]]]


def results_tables(results: dict[str, Any]) -> dict[str, Table]:
    """Title to (header, rows): block efficiency with intervals, acceptance and MBSU; comparisons; token rates;
    predictions.
    """
    rows = [
        [
            *_condition(row),
            row["drafter"],
            f"{row['block_efficiency']['value']:.2f} {interval(row['block_efficiency'])}",
            f"{row['mbsu']:.2f}",
            shares(row["accepted_shares"]),
        ]
        for row in results["rows"]
    ]
    header = [*_CONDITION, "drafter", "block efficiency", "MBSU", "accepted at position 1, 2, ..."]
    tables = {"Block efficiency": (header, rows)}
    if results["comparisons"]:
        tables["Differences of block efficiency"] = comparison_table(results["comparisons"])
    if results["token_rate"]:
        rates = [
            [
                row["drafter"] or "none (plain decoding)",
                f"{row['gamma']}" if row["drafter"] else "",
                f"{row['batch_size']}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['speed_up']:.2f}x",
            ]
            for row in results["token_rate"]
        ]
        tables["Token rate, greedy, measured"] = (["drafter", "gamma", "batch", "tokens/s", "over plain"], rates)
    if prediction := results.get("prediction"):
        tables |= prediction_tables(prediction)
    return tables | _served_tables(results.get("served", []))


def notes(results: dict[str, Any]) -> list[str]:
    """Below the tables: how servers drafted and counted, and what of it looks wrong."""
    return [note for one in results.get("served", []) for note in (one["way"], *one["notes"])]


def _served_tables(served: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    header = ["task", "gamma", "T", "at a time", "drafter", "block efficiency", "offline, drafted alike", "tokens/s"]
    header += ["without", "speed-up", "predicted", "a call, in plain steps", "greedy answers equal"]
    header += ["without: equal to offline"]
    return {
        f"Served by {one['engine']} {one['version']}, {one['weights']}": (
            header,
            [_served_row(row) for row in one["rows"]],
        )
        for one in served
    }


def _served_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["task"],
        f"{row['gamma']}",
        f"{row['temperature']:g}",
        f"{row['concurrency']}",
        row["drafter"],
        *(f"{row[key]['value']:.2f} {interval(row[key])}" for key in ("block_efficiency", "offline")),
        f"{row['tokens_per_s']:.1f}",
        f"{row['plain_tokens_per_s']:.1f}",
        f"{row['speed_up']:.2f}x",
        f"{row['predicted_speed_up']:.2f}x",
        "" if row["call"] is None else f"{row['call']:.2f}",
        *_equal(row),
    ]


def _equal(row: Mapping[str, Any]) -> list[str]:
    """How many greedy answers are the same; of those that differ, how near a tie the two tokens are where they part."""
    if row.get("equal_to_plain") is None:
        return ["", ""]
    gaps = [one["gap"] for one in row["differing"] if one["gap"] is not None]
    near = f", gap up to {max(gaps):.2g} nats" if gaps else ""
    shown = (f"{row['equal_to_plain']} of {row['prompts']}{near}", f"{row['plain_equal_to_offline']}")
    return [*shown]


def prediction_tables(prediction: Mapping[str, Any]) -> dict[str, Table]:
    """Title to (header, rows): costs of calls; speed-ups by gamma and batch size; by confidence threshold."""
    costs = [
        [
            row["drafter"],
            f"{row['batch_size']}",
            f"{1000 * row['plain_seconds']:.3g}",
            f"{row['draft']:.3f}{' a block' if row.get('one_pass') else ''}",
            f"{row['draft_by_bytes']:.3f}",
            f"{row['draft_by_parameters']:.3f}",
            _numbers(row["verify"]),
            _numbers(row["break_even"]),
        ]
        for row in prediction["costs"]
    ]
    columns = ["drafter", "batch", "plain step, ms", "c", "c by bytes", "c by parameters", "v at gamma 1, 2, ..."]
    title = f"Costs of calls in plain steps of the target, {prediction['length']} tokens in the caches"
    tables = {title: ([*columns, "break-even acceptance"], costs)}
    by_gamma = [
        [
            *_predicted(row),
            f"{row['batch_size']}",
            _numbers(row["acceptance"]),
            _numbers(row["speed_up"]),
            f"{row['best_gamma']}" if row["best_gamma"] else "none: plain is faster",
        ]
        for row in prediction["speed_ups"]
    ]
    columns = [*_PREDICTED, "batch", "acceptance at gamma 1, 2, ...", "speed-up at gamma 1, 2, ...", "best gamma"]
    tables["Speed-up predicted"] = (columns, by_gamma)
    for batch_size, rows in groupby(prediction["thresholds"], key=lambda row: row["batch_size"]):
        conditions = groupby(rows, key=lambda row: [*_predicted(row), f"{row['gamma']}"])
        columns = [*_PREDICTED, "gamma", "at 0, 0.1, ..., 0.9", "best", "tokens a call", "drafts a call"]
        title = f"Speed-up predicted where drafting stops below a confidence, batch {batch_size}"
        tables[title] = (columns, [[*condition, *_thresholds(list(some))] for condition, some in conditions])
    return tables


def only(prediction: Mapping[str, Any], drafters: Collection[str | None]) -> dict[str, Any]:
    """What is predicted for some of the drafters."""
    return {
        key: [row for row in value if row["drafter"] in drafters] if isinstance(value, list) else value
        for key, value in prediction.items()
    }


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Of `dist-train evaluate --compare`, and of the drafters of one evaluation."""
    rows = [
        [
            *_condition(row),
            f"{row['of']} - {row['over']}",
            f"{row['runs'][0]}, {row['runs'][1]}",
            f"{row['difference']['value']:+.3f} [{row['difference']['low']:+.3f}, {row['difference']['high']:+.3f}]",
            row["verdict"],
        ]
        for row in comparisons
    ]
    return [*_CONDITION, "difference of", "runs", "block efficiency", "verdict"], rows


def results_markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown whose columns also line up on a screen."""
    return _as_markdown(results_tables(results), notes(results))


def served_markdown(served: Sequence[Mapping[str, Any]]) -> str:
    """Likewise, of what servers made of the prompts alone."""
    return _as_markdown(_served_tables(served), notes({"served": served}))


def _as_markdown(tables: Mapping[str, Table], below: Sequence[str]) -> str:
    shown = [f"{title}:\n\n{markdown(*table)}" for title, table in tables.items()]
    return "\n".join([*shown, *(f"{escaped(note)}\n" for note in below)])


def interval(estimate: Mapping[str, float]) -> str:
    """Its 95 % interval."""
    return f"[{estimate['low']:.2f}, {estimate['high']:.2f}]"


def shares(values: Sequence[float]) -> str:
    """Percentages by position."""
    return " ".join(f"{value:.0%}" for value in values)


def escaped(text: str) -> str:
    """In one line, a backslash before what Markdown takes for the end of a cell, HTML, code, emphasis or a link."""
    return re.sub(r"([\\|<>`*]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table, whose cells are shown as they are."""
    header, rows = [*map(escaped, header)], [[*map(escaped, row)] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


_CONDITION = ("task", "gamma", "T", "drafting")
_PREDICTED = ("task", "T", "drafting", "drafter")


def _condition(row: Mapping[str, Any]) -> list[str]:
    return [row["task"], f"{row['gamma']:g}", f"{row['temperature']:g}", row["drafting"]]


def _predicted(row: Mapping[str, Any]) -> list[str]:
    return [row["task"], f"{row['temperature']:g}", row["drafting"], row["drafter"]]


def _thresholds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one condition all speed-ups, and what the best threshold gives."""
    best = max(rows, key=lambda row: row["speed_up"])
    speed_ups = _numbers([row["speed_up"] for row in rows])
    return [speed_ups, f"{best['threshold']:g}", f"{best['tokens_per_call']:.2f}", f"{best['drafts_per_call']:.2f}"]


def _numbers(values: Sequence[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.2f}" for value in values)
