"""Decoding on a GPU gives the tokens of a CPU, and the host reads once a block."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from generations import generation, rows
from transformers import AutoConfig, AutoModelForCausalLM

from data_shards.files import read_json
from dist_train.decoding import speculative
from dist_train.decoding.sampling import Sampler, draw, warp
from dist_train.decoding.speculative import speculative_generate

pytestmark = pytest.mark.gpu

EOS, VOCAB = 2, 61
FAMILIES = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 8},
    "gemma2": {"num_key_value_heads": 1, "sliding_window": 8, "head_dim": 16},
}


def pair_of(family, vocab=VOCAB, scale=0.15):
    """A target and a drafter that agrees with it at times, fp32, on the CPU."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": EOS, "bos_token_id": 1, "eos_token_id": EOS}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocab, initializer_range=scale, **sizes, **ids, **FAMILIES[family])
    target = AutoModelForCausalLM.from_config(config).eval()
    drafter = copy.deepcopy(target)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim > 1:
                weight += 0.3 * weight.std() * torch.randn_like(weight)
    return drafter, target


def prompts_of(count, vocab=VOCAB):
    """Of 1 to 30 tokens."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, vocab, size=1 + i % 30).tolist() for i in range(count)]


def alone(target, prompt, limit):
    """transformers' own greedy generation."""
    ids = torch.tensor([prompt], device=target.device)
    mask = torch.ones_like(ids)
    out = target.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, eos_token_id=EOS, pad_token_id=EOS
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_on_a_cpu(device, family, gamma):
    """Rows come and go meanwhile; blocks are those of our own decoder on a CPU."""
    drafter, target = pair_of(family)
    prompts = prompts_of(30)
    options = {"max_new_tokens": 24, "eos_ids": [EOS], "batch_size": 9}
    expected = [alone(target, prompt, 24) for prompt in prompts]
    blocks = speculative_generate(drafter, target, prompts, gamma, 0.0, **options).blocks
    found = speculative_generate(drafter.to(device), target.to(device), prompts, gamma, 0.0, **options)
    assert found.tokens == expected
    assert found.blocks == blocks


@pytest.mark.parametrize(("top_p", "draft_greedily"), [(0.9, False), (0.9, True), (1.0, False)])
def test_sampled_tokens_are_the_cpus(device, top_p, draft_greedily, monkeypatch):
    """In fp64, where no rounding moves a draw; from flat distributions, of whose nucleus 1,024 tokens are not all."""
    drafter, target = (model.double() for model in pair_of("llama", vocab=4096, scale=0.02))
    prompts = prompts_of(12, 4096)
    options = {"max_new_tokens": 10, "batch_size": 5, "seed": 3, "draft_greedily": draft_greedily}
    expected = speculative_generate(drafter, target, prompts, 3, 0.9, top_p, **options)

    looked, begin = Counter(), Sampler.begin

    def counted(self, *, whole=False):
        looked[whole] += 1
        begin(self, whole=whole)

    monkeypatch.setattr(Sampler, "begin", counted)
    monkeypatch.setattr(speculative, "Sampler", partial(Sampler, waits=False))  # as a GPU's is by itself
    found = speculative_generate(drafter.to(device), target.to(device), prompts, 3, 0.9, top_p, **options)
    assert found == expected
    assert (looked[True] > 0) == (top_p < 1)


@pytest.mark.parametrize(("scale", "is_flat"), [(6.0, False), (0.5, True)])
def test_the_sampler_tells_late_that_a_nucleus_was_not_found(device, scale, is_flat):
    logits = torch.randn(8, 3, 8192, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    expected = warp(logits, 0.7, 0.9)
    sampler = Sampler(0.7, 0.9, device, waits=False)
    first = sampler(logits.to(device))
    assert bool(sampler.incomplete) == is_flat
    sampler.begin(whole=True)
    found = sampler(logits.to(device))
    assert not sampler.incomplete
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-15)
    if not is_flat:
        torch.testing.assert_close(first.cpu(), expected, rtol=1e-12, atol=1e-15)
    chance = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert draw(found[:, 0], chance.to(device)).tolist() == draw(expected[:, 0], chance).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_block_is_made_without_waiting(device, temperature, monkeypatch):
    """Drafts, verification and sampling; the host reads once, what came of it."""
    drafter, target = (model.to(device) for model in pair_of("llama"))
    done, make, read = Counter(), speculative.decode_block, speculative.read_block

    def arm(mode):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def armed(*given):
        done["blocks"] += 1
        arm("error")
        try:
            return make(*given)
        finally:
            arm("default")

    def counted(*given):
        done["reads"] += 1
        return read(*given)

    monkeypatch.setattr(speculative, "decode_block", armed)
    monkeypatch.setattr(speculative, "read_block", counted)
    options = {"max_new_tokens": 12, "eos_ids": [EOS], "batch_size": 6}
    found = speculative_generate(drafter, target, prompts_of(20), 3, temperature, 0.9, **options)
    assert done["blocks"] == done["reads"] >= 12 // 4
    assert all(found.tokens)


# -- the commands ---------------------------------------------------------------------------------------------------


def test_evaluates_greedy_counts_are_the_cpus(tiny, device, command, on_cpu, tmp_path):
    def evaluation(out):
        return [
            *("evaluate", f"target.path={tiny.target}", "target.precision=fp32", f"out={out}", "token_rate.prompts=2"),
            f"drafters={{base: {tiny.drafter}, itself: {tiny.target}}}",
            f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 20}}]",
            *("temperatures=[0]", "gammas=[2, 3]", "max_new_tokens=12", "batch_size=4", "token_rate.repeats=1"),
        ]

    code, _, complaint = command(*evaluation(tmp_path / "found"))
    assert code == 0, complaint
    on_cpu(*evaluation(tmp_path / "expected"))
    found, expected = (read_json(tmp_path / name / "results.json") for name in ("found", "expected"))
    assert len(found["rows"]) == 4
    assert found["rows"] == expected["rows"]
    assert all(row["tokens_per_s"] > 0 for row in found["token_rate"])


def test_generates_greedy_answers_are_the_cpus(tiny, device, command, on_cpu, tmp_path):
    for name, run in (("found", command), ("expected", on_cpu)):
        run(*generation(tiny, tmp_path / name, "temperatures=[0]", "batch_size=60", "engine.rows=7"))
    found, expected = (rows(tmp_path / name) for name in ("found", "expected"))
    assert len(found) == 60
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in expected]


def test_doctor_on_one_gpu(device, command, tmp_path):
    """It names the device, measures it, and finds its operators right."""
    code, said, _ = command("doctor", "--folder", tmp_path)
    lines = said.splitlines()
    assert lines[-1] == "all well" if code == 0 else code == 1
    kinds = ("fp32", "bf16") if device.type == "cuda" else ("fp32",)
    for what in ("operators", *(f"gemm {kind}" for kind in kinds)):
        assert [line.split()[0] for line in lines if what in line] == ["ok"], said
    if device.type == "cuda":
        assert torch.cuda.get_device_name(device) in said
