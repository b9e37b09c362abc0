"""The demo, from one end to the other, with a few steps of each training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_train.demo import timed
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


# However short the time is: the least of every stage.
SHORT = """
import sys
from dist_train.cli import main
from dist_train.demo import timed

timed.LEAST_MINUTES = 0
sys.exit(main())
"""


@pytest.fixture(scope="module")
def on_given(tiny, tmp_path_factory):
    """A real target and real data in place of what the demo would make: its folder, and when it is done.

    It runs beside the demo that makes all by itself, which needs one core only for its corpus.
    """
    folder = tmp_path_factory.mktemp("given")
    out, seeds = folder / "demo", folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(60)))
    given = ["--target", tiny.target, "--corpus", tiny.root / "text.jsonl", "--seeds", seeds, "--minutes", "0.1"]
    command = [sys.executable, "-c", SHORT, "demo", "--out", out, "--nproc", 1, *given]
    without = {**os.environ, "DIST_TRAIN_LLAMA_CPP": "", "DIST_TRAIN_VLLM_PYTHON": ""}
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(
            subprocess.run, [*map(str, command)], capture_output=True, text=True, check=False, env=without
        )
        yield out, run


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
    out, run = on_given
    done = run.result()
    assert done.returncode == 0, done.stderr
    assert not (out / "target").exists()
    assert read_drafter_config(out / "drafter").vocab_size == tiny.vocab_size
    for said in ("0.1 minutes for ", "a step takes", "10 steps", "8 seeds", "served: no server here", "of 0.1 minutes"):
        assert said in done.stdout, said
    page = (out / "report.html").read_text()
    assert "No server was measured" in page and "another seed would move its bar" in page


def test_time_is_shared_among_what_is_left():
    """Each stage gets its share; what one takes too long, all later ones lose in proportion."""
    spent = 0.0
    for step, share in timed.SHARES.items():
        assert timed.share_of(step, 30, spent) == pytest.approx(1800 * share / 100)
        spent += 1800 * share / 100
    shares = list(timed.SHARES.values())
    late = timed.share_of("generate", 30, 1000)
    assert late == pytest.approx(800 * shares[2] / sum(shares[2:]))
    assert timed.share_of("export", 30, 1900) == 0
    assert (timed.fitting(10, 3, 2), timed.fitting(1, 3, 2), timed.fitting(100, 3, 2, most=8)) == (3, 2, 8)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--minutes", "20"], "--minutes: the demo without --target"),
        (["--target", "TINY", "--minutes", "2"], "--minutes 2: the least of every stage takes about 8"),
        (["--target", "TINY", "--scale", "2"], "--scale: with --target the demo takes --minutes"),
        (["--target", "/nowhere.gguf"], "/nowhere.gguf"),
        (["--target", "NO CHAT"], "has no chat template"),
    ],
)
def test_what_cannot_be_meant_is_told_at_once(tiny, tmp_path, refused, words, complaint):
    mute = tmp_path / "mute"
    shutil.copytree(tiny.target, mute)
    for file in mute.iterdir():
        if file.name == "chat_template.jinja":
            file.unlink()
        elif file.name == "tokenizer_config.json":
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    named = {"TINY": tiny.target, "NO CHAT": mute}
    assert complaint in refused("demo", "--out", tmp_path / "out", *(named.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()
