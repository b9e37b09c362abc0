"""A tiny world shared by the tests: a tokenizer, corpora, a random target; and the command line as users start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before any test imports torch: two cores are all that CI has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell starts what it puts into the background with SIGINT ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICE_VARIABLE = "DIST_TRAIN_TEST_DEVICE"
"""cpu: tests marked gpu that take their device from the fixture `device` go through their steps on a CPU."""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    is_twin = os.environ.get(DEVICE_VARIABLE) == "cpu" and "device" in item.fixturenames
    if not torch.cuda.is_available() and not is_twin:
        pytest.skip("no CUDA device here")


WORDS = "the model reads a token and the drafter guesses what comes next before the target agrees or not".split()


@pytest.fixture(scope="session")
def cli():
    """`cli("prepare", "out=x", expect=2)` runs dist-train and returns the finished process."""

    def run(*arguments, expect=0, timeout=300, env=None):
        command = [sys.executable, "-m", "dist_train", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def command(capfd):
    """`command("distill", "typo=1")` runs in this process: its exit code and what it printed, out and err."""
    from dist_train.cli import main

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(command):
    """`refused("distill", "typo=1")` is the one line of a command that ends with 2 before any process starts."""

    def run(*arguments):
        code, _, complaint = command(*arguments)
        assert code == 2
        assert complaint.count("\n") == 1, complaint
        return complaint

    return run


@dataclass(frozen=True)
class TinyWorld:
    """Folders and files of the tiny world."""

    root: Path
    tokenizer: Path
    corpus: Path
    chats: Path
    chat_lines: Path
    target: Path
    drafter: Path
    vocab_size: int = 320
    sequence_length: int = 32

    def data(self, *names):
        """The `data` overrides for corpora of equal weight."""
        sources = ", ".join(f"{{path: {getattr(self, name)}}}" for name in names)
        return [f"data.sources=[{sources}]", f"data.sequence_length={self.sequence_length}"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, cli):
    """Made once by the commands themselves, but for the random models."""
    import random

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_train.tokenizer import load_tokenizer, train_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    world = TinyWorld(
        root,
        root / "tokenizer",
        root / "corpus",
        root / "chats",
        root / "chat.jsonl",
        root / "target",
        root / "drafter",
    )
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randrange(5, 60))) for _ in range(400)]
    train_tokenizer(texts, world.tokenizer, world.vocab_size)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [{"prompt": f"Say {text[:20]}", "response": text[:60]} for text in texts[:200]]
    world.chat_lines.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    cli("prepare", f"inputs={root / 'text.jsonl'}", f"tokenizer={world.tokenizer}", f"out={world.corpus}")
    cli(
        "prepare",
        f"inputs={world.chat_lines}",
        f"tokenizer={world.tokenizer}",
        f"out={world.chats}",
        "format=chat",
        f"sequence_length={world.sequence_length}",
    )
    tokenizer = load_tokenizer(world.tokenizer)
    for folder, width, seed in ((world.target, 32, 1), (world.drafter, 16, 2)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=world.vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save(folder)
    return world


@pytest.fixture(scope="session")
def other_tokenizer(tiny):
    """As many pieces as the tiny target's, and others."""
    from dist_train.tokenizer import train_tokenizer

    texts = ["zebras quickly jump over every lazy fox who vexes xylophones of jazz" for _ in range(50)]
    train_tokenizer(texts, tiny.root / "other_tokenizer", tiny.vocab_size)
    return tiny.root / "other_tokenizer"


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and the real Llama 2 tokenizer, where there is one."""
    folder = os.environ.get("DIST_TRAIN_SHARED")
    if not folder:
        pytest.skip("DIST_TRAIN_SHARED is not set: no real data here")
    return Path(folder)
