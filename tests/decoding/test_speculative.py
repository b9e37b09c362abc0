"""Speculative decoding is lossless: greedy equals plain decoding, sampling follows the target's distribution."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dist_train.decoding.rows
from dist_train.decoding import speculative
from dist_train.decoding.rows import Rows
from dist_train.decoding.sampling import Sampler, draw, warp
from dist_train.decoding.speculative import speculative_generate
from dist_train.models.chains import Parallel

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


def in_one_pass(drafter, mask_id, tokens=5):
    """A drafter of the same weights that drafts all tokens of a block at once."""
    drafter = copy.deepcopy(drafter)
    Parallel(tokens, mask_id).configure(drafter.config)
    return drafter


@pytest.fixture(scope="module")
def prompts():
    """Fifty prompts of 1 to 30 tokens."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, 61, size=1 + i % 30).tolist() for i in range(50)]


def assisted(target, prompt, max_new_tokens, drafter=None, gamma=0):
    """transformers' own greedy generation: the new tokens, and the tokens that each call of the target but the last
    gave, told from how many it had in its cache when the next one came.
    """
    read = []

    def note(_module, _arguments, options):
        cache = options["cache"] if "cache" in options else options["past_key_values"]
        read.append(cache.get_seq_length())

    options = {}
    if drafter is not None:
        settings = drafter.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
        settings.assistant_confidence_threshold = 0
        options["assistant_model"] = drafter
    hook = target.register_forward_pre_hook(note, with_kwargs=True)
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
        hook.remove()
    written = np.diff([len(prompt) - 1, *read[1:]]).tolist()
    return out[0, len(prompt) :].tolist(), written


@pytest.mark.parametrize(("gamma", "count"), [(1, 8), (3, 50), (5, 8)])
def test_greedy_tokens_and_accepted_counts_equal_transformers_assisted_generation(pair, prompts, gamma, count):
    drafter, target = pair
    found = speculative_generate(
        drafter, target, prompts[-count:], gamma, 0.0, max_new_tokens=20, eos_ids=[EOS], batch_size=16
    )
    accepted = 0
    for prompt, tokens, blocks in zip(prompts[-count:], found.tokens, found.blocks, strict=True):
        expected, written = assisted(target, prompt, 20, drafter, gamma)
        assert tokens == expected
        assert blocks[:-1] == written
        assert 1 <= len(tokens) - sum(written) <= blocks[-1] <= gamma + 1  # the text may have ended within the last
        accepted += sum(blocks) - len(blocks)
    assert accepted > count  # the pair does agree at times: this is not plain decoding


def test_plain_decoding_equals_transformers(pair, prompts):
    _, target = pair
    found = speculative_generate(None, target, prompts, 0, 0.0, max_new_tokens=40, eos_ids=[EOS])
    assert found.tokens[::5] == [assisted(target, prompt, 40)[0] for prompt in prompts[::5]]
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
    kept, total = set(), 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        kept.add(token)
        total += p[token]
        if total >= top_p:
            break
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    ("gamma", "temperature", "top_p", "draft_greedily", "one_pass"),
    [
        (3, 1.0, 1.0, False, False),
        (3, 0.7, 0.8, False, False),
        (3, 1.0, 1.0, True, False),
        (3, 0.9, 0.9, True, False),
        (0, 0.9, 0.9, False, False),
        (3, 0.8, 0.9, False, True),
        (3, 1.0, 1.0, True, True),
    ],
)
@torch.no_grad()
def test_sampled_tokens_follow_the_target_for_every_row(gamma, temperature, top_p, draft_greedily, one_pass):
    """Chi-square over all continuations of three tokens, for rows of different lengths in one batch."""
    target, drafter = random_model(5, seed=3, width=16, layers=1), random_model(5, seed=4, width=16, layers=1)
    drafter = in_one_pass(drafter, 4) if one_pass else drafter
    rows = [[1], [3, 4, 0, 1], [4, 4]]
    draws = 3000
    found = speculative_generate(
        drafter,
        target,
        rows * draws,
        gamma,
        temperature,
        top_p,
        max_new_tokens=3,
        seed=5,
        draft_greedily=draft_greedily,
        batch_size=1000,
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
        assert sum(blocks[:-1]) < len(tokens) <= sum(blocks)  # the last block counts in full
        assert tokens[-1] == EOS or len(tokens) == 60


def test_the_same_seed_gives_the_same_tokens(pair, prompts):
    drafter, target = pair
    runs = [
        speculative_generate(drafter, target, prompts[:8], 3, 0.8, max_new_tokens=20, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("draft_greedily", "one_pass"), [(False, False), (True, False), (False, True)])
def test_neighbours_and_batch_size_change_nothing(pair, prompts, temperature, draft_greedily, one_pass):
    """A prompt's random numbers are its own, and rows that come and go do not touch each other."""
    drafter, target = pair
    drafter = in_one_pass(drafter, 60) if one_pass else drafter

    def decode(some, **how):
        how = {"max_new_tokens": 24, "eos_ids": [EOS], "seed": 3, "draft_greedily": draft_greedily, **how}
        return speculative_generate(drafter, target, some, 3, temperature, 0.9, **how)

    some = prompts[::3]
    whole = decode(some)
    for batch_size in (3, 8):
        assert decode(some, batch_size=batch_size) == whole
    assert decode(some[:1]).tokens == whole.tokens[:1]


@torch.no_grad()
def greedily_in_one_pass(drafter, target, prompt, gamma, limit):
    """Without a cache: each draft from the text and masks alone; tokens, and how many each call of the target gave."""
    text, blocks = list(prompt), []
    while len(text) < len(prompt) + limit and EOS not in text[len(prompt) :]:
        masked = [*text, *[drafter.config.pard_token] * (gamma - 1)]
        drafts = drafter(torch.tensor([masked])).logits[0, -gamma:].argmax(-1).tolist()
        own = target(torch.tensor([[*text, *drafts]])).logits[0, -gamma - 1 :].argmax(-1).tolist()
        accepted = next((k for k in range(gamma) if drafts[k] != own[k]), gamma)
        blocks.append(accepted + 1)
        text += own[: accepted + 1]
    new = text[len(prompt) :][:limit]
    return new[: new.index(EOS) + 1] if EOS in new else new, blocks


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_a_block_in_one_pass_is_drafted_from_the_text_and_masks(pair, prompts, gamma):
    """Rows that come and go in small batches; its caches never keep a mask."""
    target = pair[1]
    drafter = in_one_pass(target, 60)  # agrees on the first draft; on later ones by chance
    found = speculative_generate(
        drafter, target, prompts[::4], gamma, 0.0, max_new_tokens=24, eos_ids=[EOS], batch_size=4
    )
    for prompt, tokens, blocks in zip(prompts[::4], found.tokens, found.blocks, strict=True):
        assert (tokens, blocks) == greedily_in_one_pass(drafter, target, prompt, gamma, 24)
    assert max(map(max, found.blocks)) > 1


def test_a_drafter_of_one_pass_makes_one_a_block(pair, prompts):
    drafter, target = in_one_pass(pair[0], 60), pair[1]
    passes = Counter()
    hook = drafter.register_forward_pre_hook(lambda *_: passes.update(["drafter"]))
    options = {"max_new_tokens": 12, "seed": 1}
    found = speculative_generate(drafter, target, prompts[-1:], 4, 0.8, **options)
    assert passes["drafter"] == 1 + len(found.blocks[0])  # and one for the prompt
    passes.clear()
    found = speculative_generate(drafter, target, prompts[-1:], 4, 0.8, one_by_one=True, **options)
    assert passes["drafter"] == 1 + 4 * len(found.blocks[0])
    hook.remove()
    assert found == speculative_generate(pair[0], target, prompts[-1:], 4, 0.8, **options)
    with pytest.raises(ValueError, match="at most 5 tokens"):
        speculative_generate(drafter, target, prompts[-1:], 6, 0.8, **options)


WINDOW = {"sliding_window": 8, "num_key_value_heads": 1}
FAMILIES = {
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {**WINDOW, "head_dim": 8},
    "phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_decode_as_transformers_does(family, prompts):
    """Sliding windows shorter than the texts, grouped heads, soft caps, biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model_config = AutoConfig.for_model(
        family,
        vocab_size=61,
        initializer_range=0.3,
        pad_token_id=EOS,
        bos_token_id=1,
        eos_token_id=EOS,
        **sizes,
        **FAMILIES[family],
    )
    target = AutoModelForCausalLM.from_config(model_config).double().eval()
    some = prompts[5:30:6]
    found = speculative_generate(target, target, some, 3, 0.0, max_new_tokens=16, eos_ids=[EOS], batch_size=3)
    assert found.tokens == [assisted(target, prompt, 16)[0] for prompt in some]
    assert all(set(blocks) == {4} for blocks in found.blocks)  # it agrees with itself


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_host_reads_once_a_block(pair, prompts, temperature, monkeypatch):
    """Rows come and go meanwhile. On a GPU each read waits for all that was asked of it."""
    drafter, target = pair
    monkeypatch.setattr(speculative, "Sampler", partial(Sampler, waits=False))
    read = Counter()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
                read[name] += 1
            return function(*args, **(kwargs or {}))

    for name in ("tolist", "cpu", "numpy"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda it, whole=whole, name=name: read.update([name]) or whole(it))
    blocks = Counter()
    commit = Rows.commit
    monkeypatch.setattr(Rows, "commit", lambda *arguments: blocks.update(["all"]) or commit(*arguments))
    with Reads():
        speculative_generate(
            drafter, target, prompts[:20], 3, temperature, 0.9, max_new_tokens=12, eos_ids=[EOS], batch_size=6
        )
    assert read == {"tolist": blocks["all"]}


def test_on_a_gpu_passes_have_few_shapes(pair, prompts, monkeypatch):
    """So that a kernel is compiled, or a graph recorded, once for each; what fills them up changes nothing."""
    drafter, target = pair
    options = {"max_new_tokens": 90, "eos_ids": [EOS], "batch_size": 20, "seed": 3}
    expected = speculative_generate(drafter, target, prompts, 2, 0.9, 0.9, **options)
    monkeypatch.setitem(dist_train.decoding.rows._STEPS, "cpu", (8, 128))
    shapes = Counter()
    hook = target.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _arguments, given: (
            shapes.update([tuple(given["attention_mask"].shape)]) if given["attention_mask"] is not None else None
        ),
        with_kwargs=True,
    )
    found = speculative_generate(drafter, target, prompts, 2, 0.9, 0.9, **options)
    hook.remove()
    assert found == expected
    assert set(shapes) <= {(rows, 1, 3, 123) for rows in (8, 16, 20)}
    assert sum(shapes.values()) > 50


def test_grouped_heads_are_read_as_they_lie(prompts, monkeypatch):
    """No copy of a key or value for each query head; and the model is left as it was."""
    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", None)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=2, initializer_range=0.15, **sizes)).eval()
    found = speculative_generate(target, target, prompts[:6], 3, 0.0, max_new_tokens=16, eos_ids=[EOS], batch_size=3)
    monkeypatch.undo()
    assert found.tokens == [assisted(target, prompt, 16)[0] for prompt in prompts[:6]]
    assert target.config._attn_implementation == "sdpa"


def test_rare_tokens_are_drawn_and_impossible_ones_never():
    """Inversion at the very ends of a row's chances."""
    weights = torch.tensor([[0.0, 1e-12, 0.0, 1.0, 0.0]] * 4, dtype=torch.float64)
    chances = torch.tensor([0.0, 0.9e-12, 1.1e-12, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, chances).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab_size", [500, 20_000])
def test_a_nucleus_of_any_size_is_the_definition_s_and_a_device_is_not_asked_about_it(vocab_size):
    """Rows from certain to flat, in one batch; on a GPU the larger ones are found when all is done again."""
    drawn = torch.randn(6, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = drawn * torch.tensor([40.0, 5.0, 3.0, 1.5, 0.5, 0.01])[:, None]
    expected = torch.tensor([reference_warp(row, 1.0, 0.9) for row in logits], dtype=torch.float64)
    sizes = (expected > 0).sum(-1)
    assert sizes[0] == 1 and sizes[-1] > 0.85 * vocab_size
    assert torch.allclose(warp(logits, 1.0, 0.9), expected, atol=1e-12, rtol=0)
    sampler = Sampler(1.0, 0.9, logits.device, waits=False)
    found = sampler(logits)
    small = sizes <= 1024
    assert torch.allclose(found[small], expected[small], atol=1e-12, rtol=0)
    assert bool(sampler.incomplete) == (not small.all())
    sampler.begin(whole=True)
    assert torch.allclose(sampler(logits), expected, atol=1e-12, rtol=0)
    assert not sampler.incomplete
