"""The command line: fast help with examples, and one line for every mistake."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from dist_train.cli import main

COMMANDS = ["demo", "tokenizer", "prepare", "pretrain", "generate", "distill", "evaluate", "export", "checkpoint"]
COMMANDS += ["submit", "status", "doctor", "plan"]


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), ["tokenizer", "train"], ["tokenizer", "check"]])
def test_help_comes_within_two_seconds_without_torch_and_has_an_example(command):
    began = time.monotonic()
    words = [sys.executable, "-X", "importtime", "-m", "dist_train", *command, "--help"]  # told on stderr
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 2
    assert f"example: dist-train {' '.join(command)}" in done.stdout or not command
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "dist_train.cli" in imported
    assert not imported & {"torch", "deepspeed", "transformers", "datasets"}


def test_every_command_is_listed_and_none_is_a_stub(cli):
    listed = re.findall(r"^    (\w+)", cli("--help").stdout, re.MULTILINE)
    assert set(COMMANDS) == set(listed)


def test_help_of_a_stage_lists_every_key_of_its_configuration(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    shown = capsys.readouterr().out
    for key in ("run.dir", "target.path", "loss.tvdpp_normalize=position", "train.learning_rate=", "checkpoint.every="):
        assert key in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "--nproc", "0"], "argument --nproc: '0' processes; it takes at least 1"),
        (["demo", "--nproc", "two"], "argument --nproc: 'two' processes"),
        (["demo", "--scale", "0"], "--scale 0.0: a share of the training steps, above 0"),
        (["demo", "--out", "/proc/nowhere"], "--out /proc/nowhere: cannot be written"),
        (["demo", "--corpus", "/nowhere.jsonl"], "/nowhere.jsonl: no such input file"),
        (["demo", "--target", "/nowhere"], "/nowhere: no such tokenizer file or folder"),
        (["distill", "train.leraning_rate=1"], "unknown key train.leraning_rate; did you mean train.learning_rate?"),
        (["pretrain", "--nporc", "2"], "unknown arguments: --nporc"),
        (["pretrain", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["pretrain", "--nproc", "0"], "it takes at least 1"),
        (["export", "--nproc", "2", "drafter=x", "target.path=y", "out=z"], "--nproc 2: one process does this"),
        (["evaluate", "--compare", "a", "b", "--nproc", "2"], "--nproc 2: --compare only reads results"),
        (["evaluate", "--compare", "a", "b", "--dry-run"], "--dry-run: --compare only reads results"),
        (["checkpoint", "ls", "/nowhere"], "/nowhere: no checkpoint here"),
        (["tokenizer", "check", "/nowhere", "/elsewhere"], "/nowhere: no such tokenizer"),
        (["tokenizer", "train", "/nowhere", "--out", "x"], "/nowhere: no such input file"),
    ],
)
def test_a_mistake_is_one_line_without_traceback_and_exit_code_2(capfd, words, message):
    try:
        code = main(words)
    except SystemExit as end:  # argparse
        code = end.code
    said, complaint = capfd.readouterr()
    assert code == 2
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not said


INTERRUPTED_TWICE = """
import os, signal
from dist_train import cli
from dist_train.cli import stages

def stage(options):
    raise KeyboardInterrupt("the same command goes on")

def tell(line, tell=cli._tell, **how):
    os.kill(os.getpid(), signal.SIGINT)  # as --nproc passes on what the terminal has sent already
    tell(line, **how)

stages._run_stage, cli._tell = stage, tell
cli.main(["prepare"])
"""


def test_a_second_ctrl_c_while_the_first_is_told_changes_nothing():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "dist-train prepare: stopped; the same command goes on\n")


INTERRUPTED_EARLY = """
import runpy, sys

class Finder:
    def find_spec(self, name, *more):
        if name == "dist_train.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
runpy.run_module("dist_train", run_name="__main__")
"""


def test_ctrl_c_before_the_command_line_is_there_leaves_no_traceback():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_EARLY], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_empty_corpus_is_refused_by_name(cli, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    done = cli("demo", "--out", tmp_path / "out", "--corpus", tmp_path / "empty.jsonl", expect=2)
    assert done.stderr == f"dist-train demo: --corpus {tmp_path / 'empty.jsonl'}: the file is empty\n"


def test_overrides_may_stand_after_options(command, tiny):
    told = command("prepare", f"inputs={tiny.chat_lines}", "--dry-run", f"tokenizer={tiny.tokenizer}", "out=b")[1]
    assert f"tokenizer: {tiny.tokenizer}" in told


def test_dry_run_prints_the_resolved_configuration_which_reads_back(command, tiny, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", f"tokenizer={tiny.tokenizer}", *tiny.data("corpus"), "train.steps=7"]
    code, shown, _ = command("pretrain", *words, "--dry-run")
    assert code == 0
    assert "steps: 7" in shown
    assert "learning_rate: 0.0003" in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert command("pretrain", tmp_path / "again.yaml", "--dry-run")[1] == shown


def test_dry_run_refuses_what_the_stage_would(refused, tiny, tmp_path):
    target, out = f"target.path={tiny.target}", f"out={tmp_path / 'out'}"
    for words, complaint in (
        (["prepare", "inputs=/no", f"tokenizer={tiny.tokenizer}", out], "/no: no such input file"),
        (["generate", target, "seeds.inputs=/no", out], "/no: no such input file"),
        (["export", "drafter=/no", target, out], "/no: no run, checkpoint or Hugging Face model here"),
        (["evaluate", target, "drafters={a: /no}", "tasks=[{name: a, inputs: /no}]", out], "/no: no run, checkpoint"),
    ):
        assert complaint in refused(*words, "--dry-run")


def test_dry_run_of_generate_tells_the_memory(command, tiny, tmp_path):
    """Llama 7B in bf16: 6,738,415,616 parameters are 12.55 GiB; a token leaves 2 x 32 layers x 4096 numbers."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from dist_train.tokenizer import load_tokenizer

    LlamaConfig().save_pretrained(tmp_path)  # transformers' defaults
    save_file({}, tmp_path / "model.safetensors")  # weights are counted by the configuration
    load_tokenizer(tiny.tokenizer).save(tmp_path)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"prompt": "hi"}\n')
    asked = [f"target.path={tmp_path}", f"seeds.inputs={seeds}", f"out={tmp_path}", "batch_size=32", "--dry-run"]
    told = command("generate", *asked, "max_new_tokens=1024")[1]
    assert re.search(r"# weights +12\.55 GiB", told)
    # 32 x 1024 tokens and the prompt's few: 16 GiB
    assert 16 <= float(re.search(r"# key-value cache +(\S+) GiB", told)[1]) < 17
    assert "the server's" in command("generate", *asked, "engine.kind=openai", "engine.url=http://x")[1]


def test_a_password_in_an_address_is_not_printed(command):
    _, shown, told = command("prepare", "inputs=s3://me:secret@host/x.jsonl", "tokenizer=t", "out=o", "--dry-run")
    assert "s3://***@host/x.jsonl" in shown and "secret" not in shown + told
