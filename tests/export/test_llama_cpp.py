"""An exported drafter drafts in llama.cpp for its exported target, with the target's own greedy output.

DIST_TRAIN_LLAMA_CPP names llama.cpp's source folder, with two programs built in its build/bin:

    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-speculative-simple llama-completion
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from served_pair import random_target

TOKENS = 40
PROMPTS = [
    "the model reads",
    "a token and the drafter",
    "what comes next",
    "agrees or not before the target",
    "guesses",
]
GREEDY = ["--temp", "0", "--top-k", "1", "-c", "256", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1"]
LAST_WORDS = b"unaccounted time ="


@pytest.fixture(scope="module")
def llama_cpp():
    named = os.environ.get("DIST_TRAIN_LLAMA_CPP")
    if not named:
        pytest.skip("DIST_TRAIN_LLAMA_CPP is not set: no llama.cpp here")
    return Path(named)


@pytest.fixture(scope="module")
def pair(tiny, llama_cpp, tmp_path_factory):
    """A random target and the same with noise, which guesses it often and not always; both exported with GGUF."""
    from dist_train.cli import main
    from dist_train.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("pair")
    model = random_target(tiny.vocab_size)
    model.save_pretrained(root / "target")
    load_tokenizer(tiny.tokenizer).save(root / "target")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(root / "drafter")
    common = [f"tokenizer={tiny.tokenizer}", "dtype=fp32", "gguf=true", f"llama_cpp={llama_cpp}"]
    assert main(["export", f"drafter={root / 'target'}", f"out={root / 'served'}", *common]) == 0
    given = [f"drafter={root / 'drafter'}", f"target.path={root / 'served'}", f"out={root / 'drafting'}"]
    assert main(["export", *given, *common]) == 0
    return root / "served", root / "drafting"


def written(reference, ids):
    """The bytes that llama.cpp prints for ids: it prints them as C strings, which leaves NUL out."""
    byte = re.compile("<0x([0-9A-F]{2})>")
    pieces = [reference.id_to_piece(i) for i in ids]
    return b"".join(
        bytes.fromhex(found[1]) if (found := byte.fullmatch(piece)) else piece.replace("\u2581", " ").encode()
        for piece in pieces
    ).replace(b"\0", b"")


def run(program, *arguments):
    """What a program of llama.cpp prints, to stdout and in all, up to its last words.

    One thread prints both in order, and llama.cpp lets it die with what it had not printed yet when the program ends
    (`common_log_main` in common/log.cpp, its issue 22142): on a busy machine the end is lost now and then.
    """
    for _ in range(20):
        done = subprocess.run([str(word) for word in (program, *arguments)], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        if LAST_WORDS in done.stderr:
            return done.stdout, done.stdout + done.stderr
    raise AssertionError(f"{program.name} never printed its last words: {done.stderr[-2000:]!r}")


def test_drafts_change_nothing_of_the_targets_greedy_output(tiny, pair, llama_cpp):
    import sentencepiece
    from transformers import AutoModelForCausalLM

    target, drafter = pair
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    model = AutoModelForCausalLM.from_pretrained(target)
    drafted = accepted = 0
    for prompt in PROMPTS:
        ids = [1, *reference.encode(prompt)]
        given = torch.tensor([ids])
        greedy = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2
        )
        answer = [i for i in greedy[0, len(ids) :].tolist() if i != 2]
        assert len(answer) > 5
        expected = written(reference, [*ids[1:], *answer])
        common = ["-m", target / "drafter.gguf", "-p", prompt, "-n", TOKENS, *GREEDY]
        plain, _ = run(llama_cpp / "build/bin/llama-completion", *common, "-no-cnv", "--no-warmup")
        assert expected in plain
        draft = ["-md", drafter / "drafter.gguf", "--spec-type", "draft-simple", "--spec-draft-n-max", "4"]
        speculative, log = run(llama_cpp / "build/bin/llama-speculative-simple", *common, *draft)
        assert expected in speculative
        drafted += int(re.search(rb"n_drafted = (\d+)", log)[1])
        accepted += int(re.search(rb"n_accept  = (\d+)", log)[1])
    print(f"llama.cpp accepted {accepted} of {drafted} drafted tokens on {len(PROMPTS)} prompts")
    assert 0.1 < accepted / drafted < 0.99  # it drafts, and what it guesses wrongly is corrected
