"""Results as tables: for Markdown, for a screen, for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def results_tables(results: dict[str, Any]) -> dict[str, Table]:
    """Title to (header, rows): block efficiency with intervals, difference from the first drafter and MBSU; rates."""
    base = results["base"]
    rows = [
        [
            row["task"],
            row["drafter"],
            f"{row['gamma']}",
            f"{row['temperature']:g}",
            f"{row['block_efficiency']['value']:.2f} {_interval(row['block_efficiency'])}",
            "" if row["drafter"] == base else f"{row['difference']['value']:+.2f} {_interval(row['difference'])}",
            f"{row['mbsu']:.2f}",
        ]
        for row in results["rows"]
    ]
    tables = {"Block efficiency": (["task", "drafter", "gamma", "T", "block efficiency", f"over {base}", "MBSU"], rows)}
    if results["token_rate"]:
        rates = [
            [
                row["drafter"] or "none (plain decoding)",
                f"{row['gamma']}" if row["drafter"] else "",
                f"{row['tokens_per_s']:.1f}",
                f"{row['speed_up']:.2f}x",
            ]
            for row in results["token_rate"]
        ]
        tables["Token rate, greedy, measured"] = (["drafter", "gamma", "tokens/s", "over plain"], rates)
    return tables


def results_markdown(results: dict[str, Any]) -> str:
    """The tables as Markdown whose columns also line up on a screen."""
    return "\n".join(f"{title}:\n\n{_markdown(*table)}" for title, table in results_tables(results).items())


def _interval(estimate: dict[str, float]) -> str:
    return f"[{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
