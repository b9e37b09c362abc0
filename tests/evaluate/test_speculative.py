"""Speculative decoding is lossless: greedy equals plain decoding, sampling follows the target's distribution."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from dist_train.evaluate.speculative import speculative_generate, warp

EOS = 2


def random_model(vocab_size, seed, width=32, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def pair():
    """A target and a drafter that agrees with it about half the time, float64."""
    target = random_model(61, seed=0)
    drafter = copy.deepcopy(target)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim > 1:
                weight += 0.3 * weight.std() * torch.randn_like(weight)
    return drafter, target


@pytest.fixture(scope="module")
def prompts():
    """Fifty prompts of 1 to 30 tokens."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, 61, size=1 + i % 30).tolist() for i in range(50)]


def assisted(target, prompt, max_new_tokens, drafter=None, gamma=0):
    """transformers' own greedy generation: the new tokens and the number of the target's calls."""
    calls, forward = [0], target.forward

    def counting(*arguments, **options):
        calls[0] += 1
        return forward(*arguments, **options)

    options = {}
    if drafter is not None:
        settings = drafter.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
        settings.assistant_confidence_threshold = 0
        options["assistant_model"] = drafter
    target.forward = counting
    try:
        ids = torch.tensor([prompt])
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
            **options,
        )
    finally:
        del target.forward
    return out[0, len(prompt) :].tolist(), calls[0]


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_tokens_and_target_calls_equal_transformers_assisted_generation(pair, prompts, gamma):
    drafter, target = pair
    found = speculative_generate(drafter, target, prompts, gamma, 0.0, max_new_tokens=40, eos_ids=[EOS])
    accepted = 0
    for prompt, tokens, blocks in zip(prompts, found.tokens, found.blocks, strict=True):
        expected, calls = assisted(target, prompt, 40, drafter, gamma)
        assert tokens == expected
        assert len(blocks) == calls
        assert all(1 <= count <= gamma + 1 for count in blocks)
        accepted += sum(blocks) - len(blocks)
    assert accepted > len(prompts)  # the pair does agree at times: this is not plain decoding


def test_plain_decoding_equals_transformers(pair, prompts):
    _, target = pair
    found = speculative_generate(None, target, prompts, 0, 0.0, max_new_tokens=40, eos_ids=[EOS])
    assert found.tokens == [assisted(target, prompt, 40)[0] for prompt in prompts]
    assert all(set(blocks) == {1} for blocks in found.blocks)


def exact_distribution(target, prompt, length, temperature, top_p):
    """Probability of every continuation of `length` tokens, by running the target on each prefix."""
    vocab = target.config.vocab_size
    found = {}
    for sequence in itertools.product(range(vocab), repeat=length):
        probability = 1.0
        for i, token in enumerate(sequence):
            logits = target(torch.tensor([[*prompt, *sequence[:i]]])).logits[0, -1]
            probability *= reference_warp(logits, temperature, top_p)[token]
        found[sequence] = probability
    return found


def reference_warp(logits, temperature, top_p):
    """Nucleus sampling from its definition (Holtzman et al., 2020), in plain Python."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    kept, total = [], 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        kept.append(token)
        total += p[token]
        if total >= top_p:
            break
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "draft_greedily"), [(1.0, 1.0, False), (0.7, 0.8, False), (1.0, 1.0, True)]
)
@torch.no_grad()
def test_sampled_tokens_follow_the_target_for_every_row(temperature, top_p, draft_greedily):
    """Chi-square over all continuations of three tokens, for rows of different lengths in one batch."""
    target, drafter = random_model(5, seed=3, width=16, layers=1), random_model(5, seed=4, width=16, layers=1)
    rows = [[1], [3, 4, 0, 1], [4, 4]]
    draws = 3000
    found = speculative_generate(
        drafter,
        target,
        rows * draws,
        3,
        temperature,
        top_p,
        max_new_tokens=3,
        seed=5,
        draft_greedily=draft_greedily,
    )
    for row, prompt in enumerate(rows):
        exact = exact_distribution(target, prompt, 3, temperature, top_p)
        counts = dict.fromkeys(exact, 0)
        for tokens in found.tokens[row :: len(rows)]:
            counts[tuple(tokens)] += 1
        impossible = [sequence for sequence, p in exact.items() if p == 0]
        assert not any(counts[sequence] for sequence in impossible)
        possible = sorted((s for s, p in exact.items() if p > 0), key=lambda s: exact[s])
        # Cells of fewer than 5 expected draws are joined, as the test asks.
        observed, expected = [0.0], [0.0]
        for sequence in possible:
            if expected[-1] >= 5:
                observed.append(0.0)
                expected.append(0.0)
            observed[-1] += counts[sequence]
            expected[-1] += exact[sequence] * draws
        assert len(expected) > 8
        assert stats.chisquare(observed, np.array(expected) / sum(expected) * draws).pvalue > 1e-4


def test_the_test_above_can_fail():
    """The drafter's own samples are told from the target's by the same statistic."""
    target, drafter = random_model(5, seed=3, width=16, layers=1), random_model(5, seed=4, width=16, layers=1)
    with torch.no_grad():
        exact = reference_warp(target(torch.tensor([[1]])).logits[0, -1], 1.0, 1.0)
        found = speculative_generate(None, drafter, [[1]] * 3000, 0, 1.0, max_new_tokens=1, seed=0)
    counts = np.bincount([tokens[0] for tokens in found.tokens], minlength=5)
    assert stats.chisquare(counts, np.array(exact) * 3000).pvalue < 1e-4


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 0.5), (1.0, 1.0), (2.0, 0.999)])
def test_warp_is_the_definition_of_nucleus_sampling(temperature, top_p):
    logits = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = warp(logits, temperature, top_p)
    for row in range(4):
        assert found[row].tolist() == pytest.approx(reference_warp(logits[row], temperature, top_p), abs=1e-12)


def test_a_sequence_stops_at_its_end_and_its_batch_goes_on(pair, prompts):
    drafter, target = pair
    found = speculative_generate(drafter, target, prompts, 3, 1.0, max_new_tokens=60, eos_ids=[EOS], seed=1)
    ended = [tokens for tokens in found.tokens if EOS in tokens]
    assert ended
    assert all(tokens.index(EOS) == len(tokens) - 1 for tokens in ended)
    for tokens, blocks in zip(found.tokens, found.blocks, strict=True):
        assert sum(blocks) == len(tokens) or (len(tokens) == 60 and sum(blocks) < 60 + 4)


def test_the_same_seed_gives_the_same_tokens(pair, prompts):
    drafter, target = pair
    runs = [
        speculative_generate(drafter, target, prompts[:8], 3, 0.8, max_new_tokens=20, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
