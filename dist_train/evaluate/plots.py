"""Plots of an evaluation, as SVG for a page."""

from __future__ import annotations

import io
from collections.abc import Iterator
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
    """Block efficiency with 95 % intervals: a group of bars for each gamma and temperature, a bar for each drafter."""
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["task"] == task]
    conditions = sorted({(row["temperature"], row["gamma"]) for row in rows})
    drafters = list(results["drafters"])
    width = 0.8 / len(drafters)
    with style():
        figure, axes = plt.subplots(figsize=(8.5, 3.6))
        for place, drafter in enumerate(drafters):
            mine = {
                (row["temperature"], row["gamma"]): row["block_efficiency"] for row in rows if row["drafter"] == drafter
            }
            estimates = [mine[condition] for condition in conditions]
            positions = [x + (place - (len(drafters) - 1) / 2) * width for x in range(len(conditions))]
            heights = [estimate["value"] for estimate in estimates]
            below = [estimate["value"] - estimate["low"] for estimate in estimates]
            above = [estimate["high"] - estimate["value"] for estimate in estimates]
            colour = COLOURS[place % len(COLOURS)]
            axes.bar(positions, heights, 0.9 * width, color=colour, label=drafter)
            axes.errorbar(positions, heights, [below, above], fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
            for x, height, rise in zip(positions, heights, above, strict=True):
                axes.text(x, height + rise + 0.04, f"{height:.2f}", ha="center", va="bottom", fontsize=8)
        axes.axhline(1, color="#222222", linewidth=0.8)
        axes.set_xticks(range(len(conditions)), [f"γ = {gamma}, T = {heat:g}" for heat, gamma in conditions])
        axes.set_ylabel("tokens per target call")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=len(drafters))
        return as_svg(figure)


def accepted_length_histogram(results: dict[str, Any], task: str, temperature: float) -> str:
    """Share of blocks that accepted 0 to gamma drafted tokens: a panel for each gamma, a line for each drafter."""
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["task"] == task and row["temperature"] == temperature]
    gammas = sorted({row["gamma"] for row in rows})
    with style():
        figure, panels = plt.subplots(1, len(gammas), figsize=(8.5, 3.0), squeeze=False, sharey=True)
        for axes, gamma in zip(panels[0], gammas, strict=True):
            for place, drafter in enumerate(results["drafters"]):
                (row,) = (row for row in rows if row["drafter"] == drafter and row["gamma"] == gamma)
                counts = row["accepted_histogram"]
                shares = [count / sum(counts) for count in counts]
                colour = COLOURS[place % len(COLOURS)]
                axes.plot(range(gamma + 1), shares, marker="o", markersize=4, color=colour, label=drafter)
            axes.set_xticks(range(gamma + 1))
            axes.set_title(f"γ = {gamma}, T = {temperature:g}", fontsize=10)
            axes.set_xlabel("drafted tokens accepted")
        panels[0][0].set_ylabel("share of blocks")
        panels[0][0].set_ylim(bottom=0)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
        return as_svg(figure)
