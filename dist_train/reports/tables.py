"""Results as tables: for Markdown, for a screen, for a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def results_tables(results: dict[str, Any]) -> dict[str, Table]:
    """Title to (header, rows): block efficiency with intervals, acceptance and MBSU; comparisons; token rates."""
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
    return tables


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
    return "\n".join(f"{title}:\n\n{markdown(*table)}" for title, table in results_tables(results).items())


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


def _condition(row: Mapping[str, Any]) -> list[str]:
    return [row["task"], f"{row['gamma']:g}", f"{row['temperature']:g}", row["drafting"]]
