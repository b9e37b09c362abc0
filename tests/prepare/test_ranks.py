"""`prepare` under MPI: what one rank meets alone, before it has met the others, ends all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MPIEXEC = Path(sys.executable).parent / "mpiexec"


def prepare(config):
    return ["-n", "1", sys.executable, "-m", "dist_train", "prepare", str(config)]


def test_a_configuration_that_one_rank_lacks_ends_all(tiny, tmp_path):
    text = tiny.root / "text.jsonl"
    (tmp_path / "good.yaml").write_text(f"inputs: {text}\ntokenizer: {tiny.tokenizer}\nout: {tmp_path / 'out'}\n")
    command = [MPIEXEC, *prepare(tmp_path / "good.yaml"), ":", *prepare(tmp_path / "missing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "missing.yaml: cannot be read: No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_it_with_one_signal(tiny, tmp_path):
    """As a terminal sends it: to the whole process group."""
    (tmp_path / "many.jsonl").write_bytes((tiny.root / "text.jsonl").read_bytes() * 400)
    words = [f"inputs={tmp_path}/many.jsonl", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'out'}", "--nproc", "2"]
    command = [sys.executable, "-m", "dist_train", "prepare", *words]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out").exists():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    complaint = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "assert" not in complaint and "Traceback" not in complaint, complaint
