"""The demo, from one end to the other, with a few steps of each training."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_train.models.drafter import read_drafter_config

SMOKE = "0.01"


def demo(*arguments):
    command = [sys.executable, "-m", "dist_train", "demo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_when_there(file, run):
    """SIGKILL to all processes of a demo that has got as far as to write `file`."""
    deadline = time.monotonic() + 500
    while not file.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    said = run.communicate()[0]
    assert file.exists() and run.returncode == -signal.SIGKILL, said


@pytest.fixture(scope="module")
def on_given(tiny, tmp_path_factory):
    """A real target and real data in place of what the demo would make: its folder, and when it distils.

    It runs beside the demo that makes all by itself, which needs one core only for its corpus.
    """
    folder = tmp_path_factory.mktemp("given")
    out, seeds = folder / "demo", folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(60)))
    given = ["--target", tiny.target, "--corpus", tiny.root / "text.jsonl", "--seeds", seeds]
    run = demo("--out", out, "--scale", SMOKE, "--nproc", 1, *given)
    with ThreadPoolExecutor(1) as beside:  # from its first distillation on nothing depends on what was given
        yield out, beside.submit(kill_when_there, out / "runs" / "kld" / "metrics.jsonl", run)


@pytest.mark.usefixtures("on_given")
@pytest.mark.timeout(900)
def test_a_killed_demo_goes_on_with_the_step_it_was_in(tmp_path):
    """SIGKILL to all of its processes while it distils; the second start repeats nothing that was finished."""
    out = tmp_path / "demo"
    kill_when_there(out / "runs" / "tvd" / "metrics.jsonl", demo("--out", out, "--scale", SMOKE))
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
def test_a_demo_on_given_data_and_target(tiny, on_given):
    out, distils = on_given
    distils.result()
    assert not (out / "target").exists()
    assert read_drafter_config(out / "runs" / "base").vocab_size == tiny.vocab_size
