"""Packed documents attend as separate ones do, and nothing of [T, T] is made."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from dist_train.errors import UserError
from dist_train.models import attention
from dist_train.models.attention import PACKED, Documents, packed_attention, use_attention
from dist_train.models.drafter import TrainableDrafter

LENGTHS = [[20, 7, 1, 12], [40]]
POSITIONS = np.array([np.concatenate([np.arange(length) for length in row]) for row in LENGTHS])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
}


def model_of(family, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more)).eval()


def states(model, ids, positions, **more):
    return model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **more).last_hidden_state


class Masks(TorchDispatchMode):
    """Notes every tensor that is made of at least [length, length]."""

    def __init__(self, length):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.length, self.length):
                self.found.append(function)
        return made


@pytest.mark.parametrize("of_device", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_as_separate_ones(family, of_device):
    """In a forward pass and in its gradients; the reference is transformers' own attention, a document at a time."""
    model = model_of(family, **FAMILIES[family])
    ids, positions = torch.randint(64, (2, 40)), torch.from_numpy(POSITIONS)
    separate = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        parts = row.split(lengths)
        separate.append(torch.cat([states(model, part[None], torch.arange(len(part))[None]) for part in parts], 1))
    expected = torch.cat(separate)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.get_decoder().parameters()]
    model.zero_grad()

    use_attention(model, "auto", "it")
    assert model.config._attn_implementation == PACKED
    documents = Documents.of_device(positions) if of_device else Documents.of_host(POSITIONS, torch.device("cpu"))
    found = states(model, ids, positions, **documents.arguments(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for parameter, gradient in zip(model.get_decoder().parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_no_dense_mask_is_made():
    """transformers' own way makes one, which shows that the count sees it."""
    ids, positions = torch.randint(64, (2, 40)), torch.from_numpy(POSITIONS)
    model = model_of("llama")
    with Masks(40) as dense:
        states(model, ids, positions).sum().backward()
    assert dense.found
    drafter = TrainableDrafter(model, gradient_checkpointing=True)
    documents = Documents.of_host(POSITIONS, torch.device("cpu"))
    with Masks(40) as packed:
        drafter(ids, positions, lambda hidden, head: hidden.sum(), documents).backward()
    assert not packed.found


def test_documents_found_on_the_device_are_those_of_the_host():
    host = Documents.of_host(POSITIONS, torch.device("cpu"))
    device = Documents.of_device(torch.from_numpy(POSITIONS))
    assert host.bounds.tolist() == [0, 20, 27, 28, 40, 80]
    assert device.bounds.unique().tolist() == host.bounds.tolist()
    assert device.bounds.diff().min() >= 0
    assert device.rows(40) == host.rows(40) == LENGTHS
    assert device.longest >= host.longest == 40


def test_a_family_that_attends_otherwise_keeps_its_own_way():
    """Gemma 2 caps its scores; a model whose layers do not see the documents would mix them."""
    capped = model_of("gemma2", head_dim=8)
    before = capped.config._attn_implementation
    use_attention(capped, "auto", "it")
    assert capped.config._attn_implementation == before

    deaf = model_of("llama")
    for layer in deaf.get_decoder().layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, documents=None, **kwargs: forward(*args, **kwargs)
    use_attention(deaf, "auto", "it")
    assert deaf.config._attn_implementation == "sdpa"


def test_a_name_that_is_not_to_be_had_is_one_line():
    with pytest.raises(UserError, match=r"runs/base: attention flash_attention_2: .*FlashAttention"):
        use_attention(model_of("llama"), "flash_attention_2", "runs/base")


def test_compiled_blocks_are_not_compiled_again_for_other_documents():
    from torch._dynamo.testing import CompileCounter

    drafter, counter = TrainableDrafter(model_of("llama")), CompileCounter()
    for block in drafter.model.get_decoder().layers:
        block.compile(backend=counter)
    ids = torch.randint(64, (1, 40))

    def compiled_for(lengths):
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        documents = Documents.of_host(positions, torch.device("cpu"))
        drafter(ids, torch.from_numpy(positions), lambda hidden, head: hidden.sum(), documents)
        return counter.frame_count

    assert compiled_for([40]) == compiled_for([20, 20]) == compiled_for([1, 39]) == compiled_for([10, 20, 10]) > 0


def varlen_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("knows neither scale nor window")


def varlen_of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    parts = zip(*(part.transpose(0, 1).split(cu_seq_q.diff().tolist(), 1) for part in (query, key, value)), strict=True)
    alone = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    return torch.cat(alone, 1).transpose(0, 1)


def varlen_of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [None, varlen_of_2_10, varlen_of_2_11, varlen_of_2_13])
def test_the_kernel_is_called_as_each_torch_has_it(kernel, monkeypatch):
    """Or not at all, where it is missing or does not take what is needed."""
    module = ModuleType("varlen")
    if kernel is not None:
        module.varlen_attn = kernel
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(attention, "_varlen_attn", attention._varlen_attn.__wrapped__)
    if kernel in (None, varlen_of_2_10):
        assert attention._varlen_attn() is None
        return
    query, key, value = (torch.randn(2, heads, 40, 8) for heads in (4, 2, 2))
    documents = Documents.of_host(POSITIONS, torch.device("cpu"))
    found = attention._varlen(query, key, value, documents, 0.3, None)
    expected, _ = packed_attention(None, query, key, value, None, scaling=0.3, documents=documents)
    torch.testing.assert_close(found, expected)
