"""vLLM: its answers are the target's own, its counters say what our decoder says."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from dataclasses import replace

import pytest
from served_pair import (
    EAGER,
    GAMMA,
    NEW_TOKENS,
    POSITIONS,
    answered_by_vllm,
    assert_same_distribution,
    assert_same_efficiency,
    assert_served_as_offline,
    counters,
    evaluate_serving,
)

from data_shards.files import read_json
from dist_train.errors import UserError
from dist_train.models.chains import Parallel
from dist_train.serving.launch import running
from dist_train.serving.vllm import counted_between, vllm_command

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def start(pair, vllm_python, vllm_environment, tmp_path_factory):
    """`start(drafter=..., gamma=...)` is a `with` block in which vLLM serves the pair's target."""
    logs = tmp_path_factory.mktemp("logs")

    def running_vllm(patience=900.0, **how):
        command = vllm_command(vllm_python, pair.target, dtype="float32", positions=POSITIONS, more=EAGER, **how)
        return running(
            command._replace(environment={**command.environment, **vllm_environment}),
            logs / f"{len([*logs.iterdir()])}.log",
            patience,
        )

    return running_vllm


@pytest.fixture(scope="module")
def plain(start):
    """The address of a server of the target alone."""
    with start() as url:
        yield url


@pytest.fixture(scope="module")
def drafting(start, pair):
    """The address of a server that samples its drafts, where it samples at all."""
    with start(drafter=pair.drafter, gamma=GAMMA, sampled=True) as url:
        yield url


def test_greedy_answers_are_the_targets_with_and_without_a_drafter(pair, plain, drafting):
    assert answered_by_vllm(plain, pair.prompts) == pair.greedy
    assert answered_by_vllm(drafting, pair.prompts) == pair.greedy


def test_greedy_counters_are_our_decoders(pair, drafting):
    before = counters(drafting)
    answers = answered_by_vllm(drafting, pair.prompts)
    counted = counted_between(before, counters(drafting))
    assert answers == pair.greedy
    blocks = [block for of_prompt in pair.decode(pair.greedy).blocks for block in of_prompt]
    assert counted[:3] == (len(blocks), GAMMA * len(blocks), sum(blocks) - len(blocks))
    assert counted.by_position == tuple(sum(block - 1 > place for block in blocks) for place in range(GAMMA))


def test_sampled_answers_have_the_targets_distribution(pair, drafting):
    repeats, temperature = 30, 0.7
    many = replace(pair, prompts=pair.prompts * repeats)
    before = counters(drafting)
    answers = answered_by_vllm(drafting, many.prompts, temperature)
    counted = counted_between(before, counters(drafting))
    short = answered_by_vllm(drafting, pair.prompts[:1] * 1500, temperature, new_tokens=4)
    assert_same_distribution(pair, short, temperature)
    blocks = many.decode(answers, temperature, draft_greedily=False).blocks
    assert_same_efficiency(counted.drafts, counted.accepted, blocks)


def test_a_drafter_of_one_pass_drafts_as_ours_does(pair, start, tmp_path):
    """Greedy, to the unit: the same masks at the same positions, and none that stays in a cache."""
    folder, drafter = tmp_path / "drafter", copy.deepcopy(pair.drafter_model)
    shutil.copytree(pair.drafter, folder)
    Parallel(GAMMA, mask_id=5).configure(drafter.config)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pard_token": 5, "parallel_tokens": GAMMA}))
    one_pass = replace(pair, drafter_model=drafter)
    with start(drafter=folder, gamma=GAMMA, parallel=True) as url:
        answers = answered_by_vllm(url, pair.prompts)
        counted = counters(url)
    assert answers == pair.greedy
    blocks = [block for of_prompt in one_pass.decode(pair.greedy).blocks for block in of_prompt]
    assert {1, 2} <= {*blocks}  # its first drafts are good
    assert counted_between({}, counted).by_position == tuple(
        sum(block - 1 > place for block in blocks) for place in range(GAMMA)
    )


def test_evaluate_reads_its_counters(pair, drafting, tiny, command, tmp_path):
    code, _, complaint = command(
        "evaluate",
        f"target.path={pair.target}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 10}}]",
        f"out={tmp_path / 'out'}",
        "temperatures=[0]",
        f"max_new_tokens={NEW_TOKENS}",
        "--server",
        drafting,
    )
    assert code == 0, complaint
    (row,) = read_json(tmp_path / "out" / "served.json")["rows"]
    assert row["gamma"] == GAMMA and 1.2 < row["block_efficiency"] < GAMMA + 1


def test_why_it_does_not_start_is_told(start, tmp_path):
    told = pytest.raises(UserError, match="vLLM ended with exit code 1 before it answered; it said: ")
    with told as raised, start(drafter=tmp_path / "no-drafter", gamma=GAMMA):
        pass
    assert "no-drafter" in str(raised.value)


def test_evaluate_serves_the_pair_and_finds_what_it_finds_offline(
    pair, vllm_python, vllm_environment, tiny, command, tmp_path
):
    out, python = tmp_path / "out", tmp_path / "python"
    assigned = " ".join(f"{name}={shlex.quote(value)}" for name, value in vllm_environment.items())
    python.write_text(f'#!/bin/sh\nexec env {assigned} {vllm_python} "$@"\n')
    python.chmod(0o755)
    words = evaluate_serving(pair, tiny, out, f"serve.program={python}", f"serve.arguments={json.dumps(EAGER)}")
    code, said, complaint = command(*words, "--serve", "vllm")
    assert code == 0, complaint
    assert_served_as_offline(read_json(out / "results.json"), "vllm")
    assert "Served by vllm" in said and "40 of 40" in said
