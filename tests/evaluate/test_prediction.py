"""Predicted speed-ups against simulations, other gammas as they are decoded, and transformers' own thresholds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from data_shards.files import read_json
from dist_train.decoding.speculative import speculative_generate
from dist_train.decoding.timing import time_calls
from dist_train.evaluate.measures import block_efficiency
from dist_train.evaluate.prediction import Expected, acceptance_rate, expected
from dist_train.models.sizes import bytes_read

GAMMA = 5


def small_model(seed, vocab_size=61, **more):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, initializer_range=0.15, **sizes, **more)
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def pair():
    """A drafter that agrees with its target at times, more in some texts than in others."""
    target = small_model(0)
    drafter = copy.deepcopy(target)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim > 1:
                weight += 0.2 * weight.std() * torch.randn_like(weight)
    return drafter, target


@pytest.fixture(scope="module")
def prompts():
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, 61, size=1 + i % 30).tolist() for i in range(60)]


def decode(pair, prompts, gamma, temperature, greedy):
    found = speculative_generate(
        *pair, prompts, gamma, temperature, 0.95, max_new_tokens=48, draft_greedily=greedy, record_confidences=True
    )
    return {"blocks": found.blocks, "confidences": found.confidences}


@pytest.mark.parametrize(("alpha", "draft", "verify"), [(0.8, 0.05, 1.0), (0.6, 0.1, 1.9), (0.9, 0.02, 2.8)])
def test_the_formula_is_what_decoding_takes_by_a_clock(alpha, draft, verify):
    """A million tokens, each draft accepted with probability alpha, by the clock of both ways to decode."""
    drawn = np.random.default_rng(0)
    written = clock = 0.0
    blocks = []
    while written < 1_000_000:
        accepted = np.cumprod(drawn.random((10_000, GAMMA)) < alpha, axis=1).sum(1)
        blocks.append((accepted + 1).tolist())
        written += accepted.sum() + 10_000
        clock += 10_000 * (GAMMA * draft + verify)
    mean = expected({"blocks": blocks}, GAMMA)
    assert mean.tokens == pytest.approx((1 - alpha ** (GAMMA + 1)) / (1 - alpha), rel=0.01)  # Leviathan et al., eq. 1
    found = mean.speed_up(draft, [1.0, *[np.nan] * (GAMMA - 1), verify])
    assert np.isnan(found)  # no call verifies another number, and yet its cost would count
    found = mean.speed_up(draft, [1.0] * GAMMA + [verify])
    assert found == pytest.approx(written / clock)
    theorem = (1 - alpha ** (GAMMA + 1)) / ((1 - alpha) * (GAMMA * draft + 1))  # Leviathan et al., theorem 3.8: v = 1
    assert mean.speed_up(draft, [1.0] * (GAMMA + 1)) == pytest.approx(theorem, rel=0.01)


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_break_even_acceptance_gains_nothing(gamma):
    for cost in (1.0, 1.3, 1.9, gamma + 1.0):
        alpha = acceptance_rate(cost, gamma)
        chances = [alpha**k * (1 - alpha) for k in range(gamma)] + [alpha**gamma]  # of 0, 1, ..., gamma accepted
        assert sum(chance * (k + 1) for k, chance in enumerate(chances)) == pytest.approx(cost, abs=1e-7)
    assert acceptance_rate(gamma + 1.01, gamma) is None


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (0.8, False)])
def test_one_run_tells_what_smaller_gammas_give(pair, prompts, temperature, greedy):
    """Against decoding at these gammas. Without each prompt's weight gamma 1 would be 4 % off when greedy."""
    largest = decode(pair, prompts, GAMMA, temperature, greedy)
    for gamma in (1, 3, GAMMA):
        real = block_efficiency(decode(pair, prompts, gamma, temperature, greedy)["blocks"])
        off = 1e-12 if gamma == GAMMA else 0.03
        assert expected(largest, gamma).tokens == pytest.approx(real, rel=off)


def test_prompts_weigh_as_many_calls_as_their_texts_take():
    """One always accepts, one never: at gamma 1 their 12 and 4 tokens take 6 and 4 calls."""
    mean = expected({"blocks": [[6, 6], [1, 1, 1, 1]]}, 1)
    assert mean == Expected(16 / 10, 1.0, [0.0, 1.0])


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (0.8, False)])
def test_thresholds_equal_a_replay_of_every_block(pair, prompts, temperature, greedy, keeps_last):
    counts = decode(pair, prompts, GAMMA, temperature, greedy)
    for threshold in (0.1, 0.3, 0.5, 0.9):
        tokens_of_all = calls_of_all = drafts_of_all = 0.0
        verified = np.zeros(GAMMA + 1)
        for blocks, confidences in zip(counts["blocks"], counts["confidences"], strict=True):
            gave, made, kept = [], [], []
            for tokens, row in zip(blocks, confidences, strict=True):
                passes = there = 0
                for confidence in row:
                    passes += 1
                    there += confidence >= threshold or keeps_last
                    if confidence < threshold:
                        break
                gave.append(min(tokens - 1, there) + 1)
                made.append(passes)
                kept.append(there)
            calls = sum(blocks) / np.mean(gave)
            tokens_of_all, calls_of_all = tokens_of_all + sum(blocks), calls_of_all + calls
            drafts_of_all += calls * np.mean(made)
            verified += calls * np.bincount(kept, minlength=GAMMA + 1) / len(kept)
        mean = expected(counts, GAMMA, threshold, keeps_last=keeps_last)
        assert mean.tokens == pytest.approx(tokens_of_all / calls_of_all)
        assert mean.passes == pytest.approx(drafts_of_all / calls_of_all)
        assert mean.verified == pytest.approx(verified / calls_of_all)
        assert mean.passes < GAMMA or threshold == 0.1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_confidences_are_the_drafters_own(pair, prompts, temperature):
    """Of the drafts that were accepted, and so stand in the text: by the drafter's pass over all of it."""
    drafter, _ = pair
    found = speculative_generate(
        *pair, prompts[:8], 3, temperature, max_new_tokens=20, record_confidences=True, batch_size=3
    )
    compared = 0
    for prompt, text, blocks, rows in zip(prompts, found.tokens, found.blocks, found.confidences, strict=False):
        with torch.no_grad():
            logits = drafter(torch.tensor([prompt + text])).logits[0]
        at = len(prompt)
        for tokens, row in zip(blocks, rows, strict=True):
            assert len(row) == 3
            for confidence, place in zip(row[: tokens - 1], range(at, len(prompt + text)), strict=False):
                before = logits[place - 1]
                if temperature:
                    chance = (before / temperature).softmax(-1)[(prompt + text)[place]]
                else:
                    chance = before.sort(descending=True).values[:10].softmax(-1)[0]
                assert confidence == pytest.approx(float(chance))
                compared += 1
            at += tokens
    assert compared > 20


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_are_those_of_head_and_blocks(tied):
    model = small_model(0, vocab_size=100, tie_word_embeddings=tied).float()
    by_name = {name: 4 * weight.numel() for name, weight in model.state_dict().items()}
    assert ("lm_head.weight" in by_name) and by_name["lm_head.weight"] == 4 * 100 * 32
    blocks = sum(size for name, size in by_name.items() if ".layers." in name or name == "model.norm.weight")
    assert bytes_read(model) == blocks + by_name["lm_head.weight"]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=2)).bfloat16()
    assert bytes_read(gpt2) == 2 * (gpt2.num_parameters() - 64 * 32)  # the table of positions; tokens' is the head too


def test_calls_are_timed_at_each_batch_size_that_fits_in(pair):
    drafter, target = pair
    found = time_calls([drafter, target], target, 3, [4, 1], 20, 5.0)
    assert [times.batch_size for times in found] == [1, 4]
    for times in found:
        assert len(times.verify) == 3 and len(times.draft) == 2
        assert min(times.plain, *times.verify, *times.draft) > 0
    assert [times.batch_size for times in time_calls([drafter], target, 1, [1, 10**6], 20, 1.0)] == [1]


def test_an_evaluation_predicts(tiny, command, tmp_path):
    words = [
        "evaluate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"drafters={{base: {tiny.drafter}, itself: {tiny.target}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 6}}]",
        f"out={tmp_path / 'out'}",
        *("max_new_tokens=12", "gammas=[2, 4]", "temperatures=[0, 0.6]", "token_rate.prompts=0"),
    ]
    code, said, _ = command(*words, "prediction.batch_sizes=[1, 2]")
    assert code == 0 and "Costs of calls in plain steps of the target" in said and "Speed-up predicted" in said
    results = read_json(tmp_path / "out" / "results.json")
    prediction = results["prediction"]
    costs = {(row["drafter"], row["batch_size"]): row for row in prediction["costs"]}
    assert costs.keys() == {(name, size) for name in ("base", "itself") for size in (1, 2)}
    assert all(len(row["verify"]) == len(row["break_even"]) == 4 for row in costs.values())
    assert costs["itself", 1]["draft_by_bytes"] == costs["itself", 1]["draft_by_parameters"] == 1
    assert len(prediction["speed_ups"]) == 2 * 2 * 3 and len(prediction["thresholds"]) == 2 * 3 * 10
    measured = {
        (row["drafter"], row["temperature"], row["drafting"], row["gamma"]): row["block_efficiency"]["value"]
        for row in results["rows"]
    }
    for row in prediction["speed_ups"]:
        for gamma in (2, 4):
            tokens = row["tokens_per_call"][gamma - 1]
            assert tokens == pytest.approx(measured[row["drafter"], row["temperature"], row["drafting"], gamma])
            cost = costs[row["drafter"], row["batch_size"]]
            takes = gamma * cost["draft"] + cost["verify"][gamma - 1]
            assert row["speed_up"][gamma - 1] == pytest.approx(tokens / takes)
    page = (tmp_path / "out" / "results.html").read_text()
    assert "Speed-up predicted" in page and "break-even acceptance" in page
    card = ["export", f"drafter={tiny.target}", f"out={tmp_path / 'export'}", f"target.path={tiny.target}"]
    assert command(*card, "target.precision=fp32", f"results={tmp_path / 'out'}")[0] == 0
    assert "Speed-up predicted" in (tmp_path / "export" / "README.md").read_text()
    assert command(*words, "prediction.seconds=0")[0] == 0
    assert "prediction" not in read_json(tmp_path / "out" / "results.json")
