"""The demo, from one end to the other, with a few steps of each training."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dist_train.drafter import read_drafter_config

SMOKE = "0.01"


def demo(*arguments):
    command = [sys.executable, "-m", "dist_train", "demo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.timeout(900)
def test_a_killed_demo_goes_on_with_the_step_it_was_in(tmp_path):
    """SIGKILL to all of its processes while it distils; the second start repeats nothing that was finished."""
    out = tmp_path / "demo"
    first = demo("--out", out, "--scale", SMOKE)
    deadline = time.monotonic() + 500
    while not (out / "runs" / "tvd" / "metrics.jsonl").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = json.loads((out / "demo.json").read_text())["seconds"]
    assert "distill kld" in done and "distill tvd" not in done

    second = demo("--out", out, "--scale", SMOKE)
    said = second.communicate(timeout=500)[0]
    assert second.returncode == 0, said
    assert said.count("done before") == len(done)
    page = (out / "report.html").read_text()
    assert "demonstration at small scale" in page
    assert page.count("<svg") == 3
    assert not re.search(r"<script|<link|@import|(src|href)=.(?!#)|url\((?!#)", page), "the page must stand alone"
    assert "# dist-train demo" in (out / "report.md").read_text()
    events = list((out / "runs" / "tvdpp" / "tensorboard").glob("events.out.tfevents.*"))
    assert events

    refused = demo("--out", out, "--scale", "0.5")
    assert "begun with other arguments" in refused.communicate(timeout=60)[0]
    assert refused.returncode == 2


@pytest.mark.timeout(600)
def test_a_demo_on_given_data_and_target(tiny, tmp_path):
    """A real target and real data take the place of what the demo would make."""
    out = tmp_path / "demo"
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(60)))
    given = ["--target", tiny.target, "--corpus", tiny.root / "text.jsonl", "--seeds", seeds]
    run = demo("--out", out, "--scale", SMOKE, "--nproc", 1, *given)
    try:  # from here on nothing depends on where data and target came from
        while not (out / "runs" / "kld" / "metrics.jsonl").exists():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.2)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert not (out / "target").exists()
    assert read_drafter_config(out / "runs" / "base").vocab_size == tiny.vocab_size


MISTAKES = {
    "a missing corpus": (["--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
    "an empty corpus": (["--corpus", "empty.jsonl"], "empty.jsonl"),
    "a missing target": (["--target", "./nowhere"], "nowhere"),
    "no processes": (["--nproc", "0"], "'0' processes"),
    "an unwritable folder": (["--out", "/proc/demo"], "--out /proc/demo: cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(tmp_path, mistake):
    arguments, expected = MISTAKES[mistake]
    (tmp_path / "empty.jsonl").touch()
    command = [sys.executable, "-m", "dist_train", "demo", "--out", tmp_path / "out", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and expected in done.stderr
