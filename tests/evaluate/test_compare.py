"""`dist-train evaluate --compare` on results folders that the command itself wrote and on ones made to measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_shards.files import read_json, write_json
from dist_train.evaluate.measures import Counts, bootstrap_runs

PROMPTS = 40


def folder(path, shift, *, target="t", precision="fp32", prompts=1, gammas=(3,), drafters=("d",)):
    """A results folder: `shift` tokens a block more than 2, on prompts that are hard or easy for all."""
    difficulty = np.random.default_rng(0).integers(0, 20, PROMPTS)
    rows, cells = [], []
    for drafter in drafters:
        for gamma in gammas:
            cell = {"task": "chat", "drafter": drafter, "gamma": gamma, "temperature": 0.0, "drafting": "greedy"}
            noise = np.random.default_rng([1, len(cells), int(1000 * shift)]).integers(-1, 2, PROMPTS)
            tokens = 20 + difficulty + noise + round(10 * shift)
            rows.append({**cell, "top_p": 1.0, "max_new_tokens": 8})
            cells.append({**cell, "tokens": tokens.tolist(), "calls": [10] * PROMPTS, "lengths": tokens.tolist()})
    path.mkdir()
    identity = {"path": target, "weights": target, "parameters": 9, "precision": precision, "revision": None}
    results = {"target": identity, "drafters": {name: {} for name in drafters}, "prompts": {"chat": prompts}}
    write_json(path / "results.json", {**results, "rows": rows})
    write_json(path / "counts.json", {"cells": cells})
    return path


def test_a_verdict_only_where_the_interval_excludes_zero(tmp_path, command):
    a, b, c = (folder(tmp_path / name, shift) for name, shift in (("a", 0.0), ("b", 0.001), ("c", 0.5)))
    code, said, _ = command("evaluate", f"out={tmp_path / 'out'}", "--compare", a, b, c)
    assert code == 0
    found = read_json(tmp_path / "out" / "comparison.json")
    verdicts = {(row["over"], row["of"]): row["verdict"] for row in found["comparisons"]}
    assert verdicts == {
        (str(a), str(b)): "not told apart",
        (str(a), str(c)): "higher",
        (str(b), str(c)): "higher",
    }
    for row in found["comparisons"]:
        one, other = (
            np.array(read_json(Path(row[side]) / "counts.json")["cells"][0]["tokens"]) for side in ("over", "of")
        )
        assert row["difference"]["value"] == pytest.approx((other.sum() - one.sum()) / (10 * PROMPTS))
    assert "not told apart" in said and "single trainings" in said
    assert said.strip() == (tmp_path / "out" / "comparison.md").read_text().strip()


def test_methods_of_several_runs_need_agreeing_runs(tmp_path, command):
    """Three runs each: a gain that every run shows is told, one as large as the runs' own spread is not."""
    base = [folder(tmp_path / f"base{i}", 0.1 * i) for i in range(3)]
    near = [folder(tmp_path / f"near{i}", 0.1 + 0.1 * i) for i in range(3)]
    far = [folder(tmp_path / f"far{i}", 1.0 + 0.1 * i) for i in range(3)]
    words = [f"{name}={','.join(map(str, runs))}" for name, runs in (("base", base), ("near", near), ("far", far))]
    code, said, _ = command("evaluate", f"out={tmp_path / 'out'}", "--compare", *words)
    assert code == 0 and "single trainings" not in said
    rows = {(row["over"], row["of"]): row for row in read_json(tmp_path / "out" / "comparison.json")["comparisons"]}
    assert rows["base", "near"]["verdict"] == "not told apart"
    assert rows["base", "far"]["verdict"] == rows["near", "far"]["verdict"] == "higher"
    assert rows["base", "far"]["runs"] == [3, 3]
    # One run of each would have called the near one better: the spread of runs is what makes the difference.
    command("evaluate", f"out={tmp_path / 'single'}", "--compare", base[0], near[0])
    assert read_json(tmp_path / "single" / "comparison.json")["comparisons"][0]["verdict"] == "higher"


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_two_equal_methods_are_told_apart_at_most_once_in_twenty(runs):
    """Runs vary by training and prompts by difficulty; 300 experiments of two methods that are the same."""
    generator = np.random.default_rng(runs)
    mistaken = 0
    for _ in range(300):
        difficulty = generator.normal(0, 4, 30)
        methods = []
        for _ in range(2):
            quality = generator.normal(0, 2, runs)
            tokens = 30 + difficulty + quality[:, None] + generator.normal(0, 1, (runs, 30))
            methods.append([Counts(row.tolist(), [10] * 30) for row in tokens])
        mistaken += bootstrap_runs(*methods).verdict != "not told apart"
    assert mistaken <= 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert bootstrap_runs(methods[0], methods[0][:1]).low < bootstrap_runs(methods[0][:1], methods[0][:1]).low == 0


def test_drafters_of_one_folder_and_picked_ones(tmp_path, command):
    one = folder(tmp_path / "one", 0.0, drafters=("kld", "tvdpp"))
    two = folder(tmp_path / "two", 0.3, drafters=("kld", "tvdpp"))
    assert command("evaluate", "--compare", one)[0] == 0
    code, said, _ = command("evaluate", "--compare", f"kld={one},{two}", f"other={one}:tvdpp,{two}:tvdpp")
    assert code == 0 and "other - kld" in said


def test_what_cannot_be_compared_is_refused(tmp_path, refused):
    a = folder(tmp_path / "a", 0.0)
    cases = {
        "targets differ: path t and u, weights t and u": folder(tmp_path / "b", 0.0, target="u"),
        "targets differ: precision fp32 and bf16": folder(tmp_path / "e", 0.0, precision="bf16"),
        "prompts of task chat": folder(tmp_path / "c", 0.0, prompts=2),
        "gamma 5": folder(tmp_path / "d", 0.0, gammas=(3, 5)),
    }
    for word, other in cases.items():
        assert word in refused("evaluate", "--compare", a, other)
    assert "no finished results" in refused("evaluate", "--compare", a, tmp_path)
    for out in (a / "results.json", "/proc/nowhere"):
        assert f"{out}: cannot be written" in refused(
            "evaluate", f"out={out}", "--compare", a, folder(tmp_path / Path(out).name, 0.0)
        )
    assert "one method alone" in refused("evaluate", "--compare", a)
    assert "is named twice" in refused("evaluate", "--compare", f"x={a}", f"y={a}")
    assert "no drafter 'z'" in refused("evaluate", "--compare", a, f"{a}:z")
    assert "not 'gammas=[3]'" in refused("evaluate", "gammas=[3]", "--compare", a, a)
    fewer = folder(tmp_path / "f", 0.0)
    seal(fewer / "counts.json", lambda content: [content["cells"][0][key].pop() for key in ("tokens", "calls")])
    assert "counts.json are of other conditions or prompts" in refused("evaluate", "--compare", a, fewer)
    content = json.loads((a / "counts.json").read_text())
    content["cells"][0]["tokens"][0] += 1
    (a / "counts.json").write_text(json.dumps(content))
    assert "checksum" in refused("evaluate", "--compare", a, cases["gamma 5"])


def seal(path, change):
    """Change a file, and its checksum with it: as of another version of dist-train."""
    content = read_json(path)
    change(content)
    write_json(path, content)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("counts.json", lambda content: content["cells"][0]["tokens"].append([]), "cells.0.tokens.40: "),
        ("counts.json", lambda content: content["cells"][0].update(calls=["1"] * PROMPTS), "cells.0.calls.0: "),
        (
            "counts.json",
            lambda content: content["cells"][0].update(calls=[0] * PROMPTS),
            "cells.0: Value error, no calls",
        ),
        ("counts.json", lambda content: content["cells"][0]["tokens"].pop(), "39 counts of tokens and 40 of calls"),
        ("counts.json", lambda content: content.pop("cells"), "cells: Field required"),
        ("results.json", lambda content: content["rows"][0].pop("temperature"), "rows.0.temperature: Field required"),
        ("results.json", lambda content: content.update(drafters=[]), "drafters: "),
        ("results.json", lambda content: content["target"].pop("weights"), "target.weights: Field required"),
    ],
)
def test_results_of_another_form_are_named(tmp_path, refused, file, change, told):
    a, b = (folder(tmp_path / name, 0.0) for name in "ab")
    seal(a / file, change)
    complaint = refused("evaluate", "--compare", a, b)
    assert f"{a / file}: not as this version writes it: " in complaint and told in complaint
