"""The figures of a generation as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.files import write_atomically
from dist_train.reports.plots import COLOURS, as_svg, style

PAGE = "_statistics.html"


def write_page(folder: Path, statistics: dict[str, Any], origin: dict[str, Any]) -> None:
    """Write the page beside the answers."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    facts = {"all": statistics, "origin": origin, "folder": folder, "name": condition_name}
    figures = {"lengths": _lengths(statistics)}
    page = environment.get_template("statistics.html").render(**facts, figures=figures)
    write_atomically(folder / PAGE, [page.encode()])


def condition_name(condition: dict[str, Any]) -> str:
    """Such as `T = 0.7, top-p 0.95`."""
    heat = f"T = {condition['temperature']:g}"
    return f"{heat}, greedy" if condition["top_p"] is None else f"{heat}, top-p {condition['top_p']:g}"


def _lengths(statistics: dict[str, Any]) -> str:
    """Share of answers by length: a line for each temperature and top-p."""
    import matplotlib.pyplot as plt

    with style():
        figure, axes = plt.subplots(figsize=(8.5, 3.4))
        for place, condition in enumerate(statistics["conditions"]):
            counts = condition["histogram"]
            edges = [statistics["longest"] * i / len(counts) for i in range(len(counts) + 1)]
            shares = [count / condition["answers"] for count in counts]
            colour = COLOURS[place % len(COLOURS)]
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=condition_name(condition))
        axes.set(xlabel="tokens of the answer", ylabel="share of answers", xlim=(0, statistics["longest"]))
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=4)
        return as_svg(figure)
