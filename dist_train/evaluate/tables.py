"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def results_markdown(results: dict[str, Any]) -> str:
    """Block efficiency with intervals and difference from the first drafter, MBSU, and token rates, as two tables."""
    base = results["base"]
    rows = [
        [
            row["task"],
            row["drafter"],
            f"{row['gamma']}",
            f"{row['temperature']:g}",
            f"**{row['block_efficiency']['value']:.2f}** {_interval(row['block_efficiency'])}",
            "" if row["drafter"] == base else f"{row['difference']['value']:+.2f} {_interval(row['difference'])}",
            f"{row['mbsu']:.2f}",
        ]
        for row in results["rows"]
    ]
    text = _table(["task", "drafter", "gamma", "T", "block efficiency", f"over {base}", "MBSU"], rows)
    if results["token_rate"]:
        rates = [
            [
                "plain decoding" if row["drafter"] is None else row["drafter"],
                f"{row['gamma']}" if row["gamma"] else "",
                f"{row['tokens_per_s']:.1f}",
                f"{row['speed_up']:.2f}x",
            ]
            for row in results["token_rate"]
        ]
        text += "\n" + _table(["greedy decoding", "gamma", "tokens/s", "over plain"], rates)
    return text


def _interval(estimate: dict[str, float]) -> str:
    return f"[{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up on a screen."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
