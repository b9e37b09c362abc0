"""The demo's report: one self-contained page, and the same as Markdown."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_shards.files import write_atomically
from dist_train.reports.plots import COLOURS, accepted_length_histogram, as_svg, block_efficiency_bars, style
from dist_train.reports.results import read_served, read_tables
from dist_train.reports.tables import interval, results_markdown, results_tables
from dist_train.runtime.run_folder import read_metrics
from dist_train.runtime.world import cores

TASK = "held-out"
CAUTION = (
    "This is a demonstration at small scale: a target of a few million parameters, a corpus of documentation strings, "
    "minutes of training. It shows that every part of the method works and in which direction alignment moves block "
    "efficiency; its figures say nothing about drafters for real models. Intervals are over prompts: each drafter was "
    "trained once, and another seed would move its bar as well."
)
REPETITION = (
    "A target trained for minutes repeats itself, which also makes it easy to guess: one reason why block efficiency "
    "is as high as it is here."
)
REAL_CAUTION = (
    "This is a demonstration: minutes of training align a drafter with a real chat model only a little, and at the "
    "questions of one kind that it was trained on. What a server gains or loses is measured on this machine. Intervals "
    "are over prompts: the drafter was trained once, and another seed would move its bar as well."
)


def write_report(out: Path, seconds: dict[str, float], losses: Sequence[str], *, is_real: bool) -> None:
    """Write `report.html` and `report.md` into `out` from what the steps left there.

    `seconds`: of each step; `losses`: with which drafters were distilled; `is_real`: the target was not made here.
    """
    results = read_tables(out / "evaluation")
    served = read_served(out / "served")
    facts = {
        "caution": REAL_CAUTION if is_real else CAUTION,
        "findings": [*reached(results), *gains(served)] if is_real else findings(results, losses),
        "figures": {
            "Block efficiency on held-out prompts, with 95 % bootstrap intervals": block_efficiency_bars(results, TASK),
            "How many drafted tokens were accepted": accepted_length_histogram(results, TASK, 0.0),
            "Training": _curves(out, losses, is_real=is_real),
        },
        "tables": results_tables({**results, "served": served}),
        "samples": _samples(out),
        "repetition": "" if is_real else REPETITION,
        "machine": f"{platform.machine()}, {cores()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in ("torch", "deepspeed", "transformers")),
        "steps": [(name, f"{spent:.0f} s") for name, spent in seconds.items()],
        "total": f"{sum(seconds.values()) / 60:.1f} minutes",
        "target": results["target"],
        "drafters": results["drafters"],
        "tensorboard": out / "runs",
        "out": out,
    }
    write_atomically(out / "report.html", [_render("report.html", facts).encode()])
    write_atomically(out / "report.md", [_markdown(facts, {**results, "served": served}).encode()])


def findings(results: dict[str, Any], losses: Sequence[str]) -> list[str]:
    """What the figures say, each sentence backed by an interval."""
    base = results["base"]
    sentences = []
    for loss in losses:
        rows = [row for row in results["rows"] if row["drafter"] == loss]
        above = [row for row in rows if row["difference"]["low"] > 0]
        below = [row for row in rows if row["difference"]["high"] < 0]
        best = max(rows, key=lambda row: row["difference"]["value"])
        gain = best["difference"]
        sentences.append(
            f"{loss}: above {base} by more than the interval in {len(above)} of {len(rows)} conditions"
            + (f", below it in {len(below)}" if below else "")
            + f"; most at gamma {best['gamma']}, T {best['temperature']:g}: "
            f"{best['block_efficiency']['value']:.2f} tokens per target call, "
            f"{gain['value']:+.2f} [{gain['low']:.2f}, {gain['high']:.2f}]."
        )
    intervals = [
        (row["block_efficiency"]["low"], row["block_efficiency"]["high"])
        for row in results["rows"]
        if row["drafter"] in losses and (row["gamma"], row["temperature"]) == (3, 0.0)
    ]
    if len(losses) > 1 and max(low for low, _ in intervals) <= min(high for _, high in intervals):
        sentences.append(
            f"At this scale the {len(losses)} losses are not told apart: their intervals overlap (gamma 3, greedy)."
        )
    return sentences


def reached(results: dict[str, Any]) -> list[str]:
    """Block efficiency of the drafters under each condition."""
    return [
        f"{row['drafter']}: {row['block_efficiency']['value']:.2f} {interval(row['block_efficiency'])} tokens per "
        f"target call at gamma {row['gamma']}, T {row['temperature']:g}."
        for row in results["rows"]
    ]


def gains(served: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much faster or slower a real server is with the drafter, a sentence for each condition."""
    if not served:
        return ["No server was measured: neither vLLM nor llama.cpp was found on this machine."]
    return [
        f"{one['engine']} {one['version']}, {one['weights']}, gamma {row['gamma']}, T {row['temperature']:g}, "
        f"{row['concurrency']} at a time: {row['tokens_per_s']:.1f} tokens/s with the drafter, "
        f"{row['plain_tokens_per_s']:.1f} without: {row['speed_up']:.2f}x, "
        + ("faster." if row["speed_up"] > 1 else "slower: this drafter does not pay here.")
        for one in served
        for row in one["rows"]
    ]


def _samples(out: Path, count: int = 3) -> list[tuple[str, str]]:
    """A few instructions and the beginning of the target's greedy answers: what the drafters learn to guess."""
    import pyarrow.dataset as ds

    answers = ds.dataset(out / "answers", format="parquet")
    greedy = answers.head(count, columns=["prompt", "response"], filter=ds.field("temperature") == 0).to_pylist()
    return [(answer["prompt"], textwrap.shorten(answer["response"], 240, placeholder=" …")) for answer in greedy]


def _curves(out: Path, losses: Sequence[str], *, is_real: bool) -> str:
    """Loss of what comes first, pretraining or regression, over steps; acceptance of the distillations."""
    import matplotlib.pyplot as plt

    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
        if is_real:
            for place, loss in enumerate(losses, start=1):
                steps, values = _series(out / "runs" / loss, "train/loss", without="train/acceptance")
                left.plot(steps, values, color=COLOURS[place], label=loss, linewidth=1.2)
            left.set(xlabel="step", ylabel="mean squared error", title="regression of hidden states")
        else:
            for name, colour in (("target", "#222222"), ("base", COLOURS[0])):
                steps, values = _series(out / "runs" / name, "train/loss")
                left.plot(steps, values, color=colour, label=name, linewidth=1.2)
            left.set(xlabel="step", ylabel="cross-entropy", title="pretraining")
        left.legend()
        for place, loss in enumerate(losses, start=1):
            steps, values = _series(out / "runs" / loss, "train/acceptance")
            right.plot(steps, values, color=COLOURS[place], label=loss, linewidth=1.2)
        right.set(xlabel="step", ylabel="acceptance, Σ min(p, q)", title="distillation")
        right.legend()
        return as_svg(figure)


def _series(run: Path, tag: str, without: str | None = None) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over ten neighbours: single batches of this size are mostly noise.

    `without`: a tag that steps to be shown do not have.
    """
    points = [(line["step"], line[tag]) for line in read_metrics(run) if tag in line and without not in line]
    groups = [points[first : first + 10] for first in range(0, len(points), 10)]
    steps = [group[-1][0] for group in groups]
    return steps, [sum(value for _, value in group) / len(group) for group in groups]


def _markdown(facts: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [
        "# dist-train demo",
        "",
        f"> {facts['caution']}",
        "",
        *(f"- {sentence}" for sentence in facts["findings"]),
        "",
    ]
    lines += [results_markdown(results), "What the target says, greedily:", ""]
    lines += [f"- {prompt} — {response}" for prompt, response in facts["samples"]]
    lines += ["", facts["repetition"], ""]
    lines += [f"Steps ({facts['total']}; {facts['machine']}):", ""]
    lines += [f"- {name}: {spent}" for name, spent in facts["steps"]]
    lines += ["", f"TensorBoard: `tensorboard --logdir {facts['tensorboard']}`", ""]
    return "\n".join(lines)


def _render(template: str, facts: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template(template).render(facts)
