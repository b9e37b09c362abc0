"""The commands of a model card, as they stand in it, start real servers that draft with what was exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from served_pair import (
    EAGER,
    GAMMA,
    NEW_TOKENS,
    answered_by_vllm,
    card_command,
    counters,
    make_pair,
    named,
    random_target,
)

from dist_train.models.load import read_config
from dist_train.serving.gguf import write_gguf
from dist_train.serving.http import Client
from dist_train.serving.launch import running
from dist_train.serving.llama_cpp import complete, find_program, llama_cpp_command
from dist_train.serving.vllm import counted_between

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

SHORT = 256  # llama.cpp rounds up to multiples of it
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # a cache in fp16 is the default
# All that an exported drafter may have and the other tests' has not.
TIED_AND_STRETCHED = {
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.fixture(scope="module")
def stretched(tiny, tmp_path_factory):
    """A pair with tied heads and scaled RoPE, exported for fewer positions than the target's."""
    root = tmp_path_factory.mktemp("stretched")
    return make_pair(tiny, root, f"serving_length={SHORT}", positions=SHORT, **TIED_AND_STRETCHED)


@pytest.fixture
def programs(tmp_path):
    """A folder for PATH, in which `programs(name, script)` puts a program."""

    def put(name, script):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
        return folder

    return put


def test_vllms(stretched, vllm_python, vllm_environment, programs, tmp_path):
    # `vllm serve MODEL` is this; the wheel for CPUs lacks the metadata that its own `vllm` looks for.
    script = f'[ "$1" = serve ] && exec {vllm_python} -m vllm.entrypoints.openai.api_server --model "${{@:2}}"'
    command = card_command(stretched.drafter, "vllm", programs("vllm", script), *EAGER, "--dtype", "float32")
    command = command._replace(environment={**command.environment, **vllm_environment})
    with running(command, tmp_path / "log", patience=600) as url:
        models = Client(f"{url}/v1", None, timeout=60, patience=0).ask("GET", "/models")
        before = counters(url)
        answers = answered_by_vllm(url, stretched.prompts)
        counted = counted_between(before, counters(url))
    assert models["data"][0]["max_model_len"] == SHORT
    assert answers == stretched.greedy
    blocks = [block for of_prompt in stretched.decode(stretched.greedy).blocks for block in of_prompt]
    assert counted[:3] == (len(blocks), GAMMA * len(blocks), sum(blocks) - len(blocks))
    assert '"draft_sample_method": "probabilistic"' in (stretched.drafter / "README.md").read_text()


def test_llama_cpps(stretched, llama_cpp, programs, tmp_path):
    """With the converter's line, for a drafter that was exported without GGUF."""
    root = stretched.drafter.parent
    write_gguf(stretched.target, root / "target.gguf", llama_cpp, "f32")
    (root / "llama.cpp").symlink_to(llama_cpp)
    programs("python", f'exec {sys.executable} "$@"')
    server = find_program(llama_cpp, "llama-server")
    command = card_command(
        stretched.drafter, "llama-server", programs("llama-server", f'exec {server} "$@"'), *EXACT, "-t", "1"
    )
    with running(command, tmp_path / "log", patience=120) as url:
        client = Client(url, None, timeout=120, patience=0)
        answers = [complete(client, prompt, NEW_TOKENS) for prompt in stretched.prompts]
        slots = client.ask("GET", "/props")["default_generation_settings"]["n_ctx"]
    assert slots <= SHORT
    assert [answer.tokens for answer in answers] == stretched.greedy
    assert sum(answer.accepted for answer in answers) > 0.3 * sum(answer.drafted for answer in answers)


def test_a_gguf_targets(command, llama_cpp, programs, tmp_path, monkeypatch):
    """SmolLM2, and a drafter of random weights for it, in GGUF of q8_0 and as a folder."""
    monkeypatch.setenv("DIST_TRAIN_GGUF_CACHE", str(tmp_path / "cache"))
    file = named("DIST_TRAIN_SMOLLM2")
    target, trained, out = tmp_path / file.name, tmp_path / "trained", tmp_path / "drafter"
    target.symlink_to(file)
    model = random_target(
        49_152, **{**TIED_AND_STRETCHED, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2}
    )
    model.save_pretrained(trained)
    words = [f"drafter={trained}", f"target.path={target}", f"out={out}", "gguf_type=q8_0"]
    code, said, complaint = command("export", *words, f"llama_cpp={llama_cpp}")
    assert code == 0, complaint
    assert "drafter.gguf, q8_0" in said
    assert read_config(out, "drafter").max_position_embeddings == 8192
    assert Path(f"{out}/drafter.gguf").stat().st_size < Path(f"{out}/model.safetensors").stat().st_size
    server = find_program(llama_cpp, "llama-server")
    started = card_command(out, "llama-server", programs("llama-server", f'exec {server} "$@"'), "-t", "1")
    prompt, answers = [1, 4093, 198, 1780, 314, 253, 2], []
    for one in (started, llama_cpp_command(server, file, threads=1)):
        with running(one, tmp_path / "log", patience=120) as url:
            answers.append(complete(Client(url, None, timeout=120, patience=0), prompt, 16))
    assert answers[0].drafted > 0
    assert answers[1].drafted == 0
    assert answers[0].tokens == answers[1].tokens
