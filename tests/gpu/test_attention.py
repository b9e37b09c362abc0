"""Packed documents on a GPU: the variable-length kernel against each document alone and against float64 on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from dist_train.models import attention
from dist_train.models.attention import PACKED, Documents, packed_attention
from dist_train.models.drafter import TrainableDrafter

pytestmark = pytest.mark.gpu

LENGTHS = [[130, 1, 60, 65], [256]]
POSITIONS = np.array([np.concatenate([np.arange(length) for length in row]) for row in LENGTHS])
TOKENS = POSITIONS.shape[1]


def distance(found, expected):
    """Relative, in norm."""
    return float((found.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm())


def reference(query, key, value, window):
    """Softmax of whole score matrices in float64, a document at a time; [B, T, H, D] of [B, H, T, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    found = []
    for row, lengths in enumerate(LENGTHS):
        parts = zip(*(part[row].split(lengths, 1) for part in (query, key, value)), strict=True)
        out = []
        for q, k, v in parts:
            behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
            seen = (behind >= 0) & (behind < (window or TOKENS))
            scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
            out.append(scores.softmax(-1) @ v)
        found.append(torch.cat(out, 1))
    return torch.stack(found).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize(
    ("size", "heads", "groups"), [(64, 8, 8), (64, 8, 2), (128, 8, 1), (128, 4, 4), (96, 4, 2), (256, 4, 1)]
)
def test_the_variable_length_kernel_is_document_by_document(device, size, heads, groups, window, monkeypatch):
    """Outputs and the three gradients, both ways, against the reference from the same rounded inputs."""
    torch.manual_seed(0)
    shapes = ((heads, size), (groups, size), (groups, size))
    rounded = [torch.randn(2, n, TOKENS, d).bfloat16() for n, d in shapes]
    weights = torch.randn(2, TOKENS, heads, size).bfloat16()
    exact = [part.double().requires_grad_() for part in rounded]
    expected = reference(*exact, window)
    gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)

    used = []
    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: used.append(1) or varlen(*given))
    documents = Documents.of_host(POSITIONS, device)
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(attention, "_has_varlen", lambda *given: False)
        parts = [part.to(device).requires_grad_() for part in rounded]
        found, _ = packed_attention(None, *parts, None, documents=documents, sliding_window=window)
        assert found.shape == (2, TOKENS, heads, size)
        assert distance(found, expected) <= 1e-2
        taken = torch.autograd.grad((found * weights.to(device)).float().sum(), parts)
        assert [distance(one, other) <= 2e-2 for one, other in zip(taken, gradients, strict=True)] == [True] * 3
    assert len(used) == (device.type == "cuda")


def test_documents_found_on_the_device_are_those_of_the_host(device):
    host, found = Documents.of_host(POSITIONS, device), Documents.of_device(torch.from_numpy(POSITIONS).to(device))
    assert host.bounds.device.type == found.bounds.device.type == device.type
    assert found.bounds.unique().tolist() == host.bounds.tolist()
    assert found.rows(TOKENS) == host.rows(TOKENS) == LENGTHS


FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": 40},
    "gemma3_text": {"sliding_window": 40, "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_reads_packed_documents_as_a_cpu_reads_them_alone(device, family, dtype, bound):
    """Hidden states and gradients; the reference is transformers' own attention, a document at a time, in fp32."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **FAMILIES[family]))
    ids, weights = torch.randint(64, (2, TOKENS)), torch.randn(2, TOKENS, 256)
    separate = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        parts = (part[None] for part in row.split(lengths))
        separate.append(torch.cat([model.get_decoder()(part, use_cache=False).last_hidden_state for part in parts], 1))
    expected = torch.cat(separate)
    (expected * weights).sum().backward()
    gradients = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()

    drafter = TrainableDrafter(model.to(device, dtype))
    assert model.config._attn_implementation == PACKED
    found = []
    loss = drafter(
        ids.to(device),
        torch.from_numpy(POSITIONS).to(device),
        lambda hidden, head: found.append(hidden) or (hidden * weights.to(device)).float().sum(),
        Documents.of_host(POSITIONS, device),
    )
    loss.backward()
    assert distance(found[0], expected.detach().double()) <= bound
    for name, weight in model.named_parameters():
        if name in gradients:
            assert distance(weight.grad, gradients[name]) <= 2 * bound, name


def long_documents(tokens=16_384):
    """Heads of 64 over one row of documents of 1 to 2,000 tokens: what a forward and a backward pass do."""
    lengths = np.random.default_rng(0).integers(1, 2000, tokens)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
    positions = np.concatenate([np.arange(length) for length in lengths])[None, :tokens]
    documents = Documents.of_host(positions, torch.device("cuda"))
    parts = [torch.randn(1, n, tokens, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]
    for part in parts:
        part.requires_grad_()

    def step():
        found, _ = packed_attention(None, *parts, None, documents=documents)
        torch.autograd.grad(found.float().sum(), parts)

    return tokens, step


def test_no_dense_mask_is_made():
    """Neither mask nor scores of [T, T], whatever their type: the memory of a pass over 16,384 tokens says so."""
    tokens, step = long_documents()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    level = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - level < tokens**2 / 2  # bytes: half of what a bool mask takes


def test_all_documents_go_through_one_flash_kernel():
    _, step = long_documents()
    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    forward = [name for name in on_device if "flash" in name.lower() and "fwd" in name.lower()]
    assert len(forward) == 1, on_device
