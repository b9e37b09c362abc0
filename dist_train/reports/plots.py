"""Plots of an evaluation, as SVG for a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#8a8f98", "#3b6fb6", "#2a9d77", "#d1603d", "#8e5ea2", "#c2a83e")
"""Of the first drafter, which the others are compared with, and of those after it."""


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib without a screen, text as text, quiet axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,  # names are names, whatever they spell
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e8eb",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    ):
        yield


def as_svg(figure: Any) -> str:
    """The figure as one <svg> element."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def block_efficiency_bars(results: dict[str, Any], task: str) -> str:
    """Block efficiency with 95 % intervals: a group of bars for each condition, a bar for each drafter."""
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["task"] == task]
    conditions = sorted({_condition(row) for row in rows})
    drafters = list(results["drafters"])
    width = 0.8 / len(drafters)
    with style():
        figure, axes = plt.subplots(figsize=(8.5, 3.6))
        for place, drafter in enumerate(drafters):
            mine = {_condition(row): row["block_efficiency"] for row in rows if row["drafter"] == drafter}
            estimates = [mine[condition] for condition in conditions]
            positions = [x + (place - (len(drafters) - 1) / 2) * width for x in range(len(conditions))]
            heights = [estimate["value"] for estimate in estimates]
            below = [estimate["value"] - estimate["low"] for estimate in estimates]
            above = [estimate["high"] - estimate["value"] for estimate in estimates]
            colour = COLOURS[place % len(COLOURS)]
            axes.bar(positions, heights, 0.9 * width, color=colour, label=drafter)
            axes.errorbar(positions, heights, [below, above], fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
            for x, height, rise in zip(positions, heights, above, strict=True):
                axes.text(x, height + rise + 0.04, f"{height:.2f}", ha="center", va="bottom", fontsize=7)
        axes.axhline(1, color="#222222", linewidth=0.8)
        names = [
            f"γ = {gamma}, T = {heat:g}" + (f"\n{drafting} drafts" if heat or drafting != "greedy" else "")
            for heat, drafting, gamma in conditions
        ]
        axes.set_xticks(range(len(conditions)), names, fontsize=8)
        axes.set_ylabel("tokens per target call")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=len(drafters))
        return as_svg(figure)


def accepted_length_histogram(results: dict[str, Any], task: str, temperature: float) -> str:
    """Share of blocks that accepted 0 to gamma drafted tokens: a panel for each gamma, a line for each drafter."""
    return _lines(results, task, temperature, _histogram_shares, "drafted tokens accepted", first=0)


def acceptance_by_position(results: dict[str, Any], task: str, temperature: float) -> str:
    """Share of blocks whose k-th draft was accepted: a panel for each gamma, a line for each drafter."""
    return _lines(results, task, temperature, lambda row: row["accepted_shares"], "position of the draft", first=1)


def _lines(
    results: dict[str, Any],
    task: str,
    temperature: float,
    shares: Callable[[dict[str, Any]], list[float]],
    label: str,
    first: int,
) -> str:
    """Greedy drafts are dashed where there are sampled ones too."""
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["task"] == task and row["temperature"] == temperature]
    gammas = sorted({row["gamma"] for row in rows})
    several = len({row["drafting"] for row in rows}) > 1
    with style():
        figure, panels = plt.subplots(1, len(gammas), figsize=(8.5, 3.0), squeeze=False, sharey=True)
        for axes, gamma in zip(panels[0], gammas, strict=True):
            for row in (row for row in rows if row["gamma"] == gamma):
                colour = COLOURS[list(results["drafters"]).index(row["drafter"]) % len(COLOURS)]
                name = f"{row['drafter']}, {row['drafting']}" if several else row["drafter"]
                dashes = "--" if several and row["drafting"] == "greedy" else "-"
                values = shares(row)
                where = range(first, first + len(values))
                axes.plot(where, values, dashes, marker="o", markersize=4, color=colour, label=name)
            axes.set_xticks(range(first, gamma + 1))
            axes.set_title(f"γ = {gamma}, T = {temperature:g}", fontsize=10)
            axes.set_xlabel(label)
        panels[0][0].set_ylabel("share of blocks")
        panels[0][0].set_ylim(bottom=0)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
        return as_svg(figure)


def _histogram_shares(row: dict[str, Any]) -> list[float]:
    counts = row["accepted_histogram"]
    return [count / sum(counts) for count in counts]


def _condition(row: dict[str, Any]) -> tuple[float, str, int]:
    return row["temperature"], row["drafting"], row["gamma"]
