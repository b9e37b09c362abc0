"""The model card's Python, run as it stands; what its commands say of length, drafted tokens and files."""

from __future__ import annotations

import json

import pytest
import torch
from served_pair import blocks_of, make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SHORT = 128
STRETCHED = {"rope_type": "linear", "rope_theta": 70_000.0, "factor": 2.0}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """With tied heads, for fewer positions than the target's."""
    root = tmp_path_factory.mktemp("pair")
    return make_pair(
        tiny, root, f"serving_length={SHORT}", positions=SHORT, tie_word_embeddings=True, rope_parameters=STRETCHED
    )


def test_its_python_gives_the_targets_own_answer(pair, monkeypatch, capsys):
    (script,) = blocks_of(pair.drafter / "README.md", "python")
    monkeypatch.chdir(pair.drafter.parent)
    scope = {}
    exec(script, scope)
    said = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    chat = [{"role": "user", "content": "What is a draft model?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(pair.target).generate(**prompt, max_new_tokens=64)
    assert torch.equal(scope["answer"], plain)
    assert plain.shape[1] > prompt["input_ids"].shape[1] + 3
    assert tokenizer.decode(plain[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip() in said
    assert scope["drafter"].generation_config.num_assistant_tokens == 3


def test_its_commands_keep_servers_to_the_drafters_positions(tiny, pair, command, tmp_path):
    assert LlamaConfig.from_pretrained(pair.drafter).max_position_embeddings == SHORT
    bash = "".join(blocks_of(pair.drafter / "README.md", "bash"))
    options = (f"--max-model-len {SHORT}", f" -c {SHORT}", f"--context-length {SHORT}")
    assert [bash.count(option) for option in options] == [1, 1, 1]
    out = tmp_path / "drafter"
    assert command("export", f"drafter={tiny.drafter}", f"target.path={tiny.target}", f"out={out}")[0] == 0
    whole = "".join(blocks_of(out / "README.md", "bash"))
    assert not any(option.split()[0] in whole.split() for option in options)


def test_older_versions_of_transformers_find_the_rope(pair):
    """They read `rope_theta` and `rope_scaling`, and take 10000 and none where these are missing."""
    config = json.loads((pair.drafter / "config.json").read_text())
    assert config["rope_theta"] == 70_000
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    del config["rope_parameters"]
    assert LlamaConfig.from_dict(config).rope_parameters == STRETCHED


def test_drafted_tokens_are_those_that_evaluate_predicts_to_be_best(tiny, command, tmp_path):
    results = tmp_path / "results"
    words = [f"target.path={tiny.target}", f"drafters={{tiny: {tiny.drafter}}}", f"out={results}", "temperatures=[0]"]
    task = f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 2}}]"
    code, _, complaint = command("evaluate", *words, task, "max_new_tokens=4", "gammas=[2]", "token_rate.prompts=0")
    assert code == 0, complaint
    from data_shards.files import read_json, write_json

    given = read_json(results / "results.json")
    row = {"drafter": "tiny", "batch_size": 1, "task": "chat", "temperature": 0, "drafting": "sampled"}
    more = {"acceptance": [0.5], "speed_up": [1.0]}
    for best, expected, said in (
        (None, 3, "a guess"),
        ([2, 4, 4], 4, "the best for one request at a time"),
        ([0], 1, "drafting does not pay"),
    ):
        prediction = best and {
            "length": 8,
            "costs": [],
            "thresholds": [],
            "speed_ups": [{**row, **more, "best_gamma": gamma} for gamma in best]
            + [{**row, **more, "batch_size": 64, "best_gamma": 5}] * 9,
        }
        write_json(results / "results.json", {**given, "prediction": prediction})
        out = tmp_path / f"out-{expected}"
        code, _, complaint = command(
            "export", f"drafter={tiny.drafter}", f"target.path={tiny.target}", f"out={out}", f"results={results}"
        )
        assert code == 0, complaint
        text = (out / "README.md").read_text()
        assert f'"num_speculative_tokens": {expected}' in text and f"--spec-draft-n-max {expected} " in text
        assert f"--speculative-num-steps {expected} " in text and said in text
