"""Quantised targets are what transformers makes of them, through the whole of what training asks of a target."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import distillation
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_train.config import TargetSection
from dist_train.models.load import load_causal_lm, target_bytes
from dist_train.models.sizes import matrix_parameters, num_parameters
from dist_train.models.target import Target, load_decoder, weights_digest

CPU = torch.device("cpu")
RANK = SimpleNamespace(device=CPU, rank=0, world_size=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Wide enough for blocks of 128."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder := tmp_path_factory.mktemp("plain"))
    return folder


def store(plain, folder, pack, quantization):
    """The plain model with `pack(name, weight)` in place of each projection."""
    stored = load_file(plain / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored |= pack(name, stored[name])
    shutil.copytree(plain, folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def pack_fp8(name, weight):
    blocks = weight.reshape(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    return {name: packed.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def pack_int8(name, weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def make_fp8(plain, folder):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    store(plain, folder, pack_fp8, quantization)


def make_compressed(plain, folder):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    shape = {"format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    store(
        plain,
        folder,
        pack_int8,
        {"quant_method": "compressed-tensors", **shape, "config_groups": {"group_0": group}},
    )


def make_bitsandbytes(plain, folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map={"": CPU})
    model.save_pretrained(folder)


@pytest.mark.parametrize("make", [make_fp8, make_compressed, make_bitsandbytes])
@torch.no_grad()
def test_a_quantised_target_is_transformers_own(plain, tmp_path, make):
    folder = tmp_path / "target"
    make(plain, folder)
    section = TargetSection(path=str(folder), precision="fp32")
    ids, positions = torch.arange(16)[None] * 7, torch.arange(16)[None]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": CPU})
    unpacked = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    expected = reference(ids).logits
    assert (unpacked(ids).logits - expected).abs().max() > 0.1, "else it is not quantised at all"
    target = Target(section, RANK)
    assert torch.equal(target.head.logits(target(ids, positions)), expected.float())

    model = load_decoder(section, CPU)
    assert torch.equal(model(ids).logits, expected)
    assert num_parameters(model) == unpacked.num_parameters() == target.matrix_parameters + 320 * 128
    assert matrix_parameters(model) == target.matrix_parameters
    assert target_bytes(section) == (folder / "model.safetensors").stat().st_size
    # One packed number more, and it is another target.
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("proj.weight"))
    packed = stored[name].view(torch.uint8).clone()
    packed.flatten()[5] ^= 1
    save_file({**stored, name: packed.view(stored[name].dtype)}, folder / "model.safetensors", {"format": "pt"})
    assert weights_digest(load_causal_lm(section)) != weights_digest(model)


def test_zero3_is_refused(tiny, tmp_path, refused):
    folder = shutil.copytree(tiny.target, tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    words = [*distillation(tiny, tmp_path / "run"), f"target.path={folder}", "--dry-run"]
    assert "take target.sharding=replicate" in refused(*words, "target.sharding=zero3")
