"""A drafter's positions are the target's: as many, and rotated alike, which transformers' own embedding tells."""

from __future__ import annotations

import pytest
import torch
from runs import distillation, run_by
from served_pair import random_target
from transformers import AutoConfig, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dist_train.config import DrafterSection
from dist_train.errors import UserError
from dist_train.models.drafter import drafter_config, load_drafter, read_drafter_config, warm_config
from dist_train.tokenizer import load_tokenizer

HEAD = {"hidden_size": 64, "num_attention_heads": 4}
SCALED = {
    "default": {"rope_theta": 100_000.0},
    "linear": {"rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
SECTION = {"hidden_size": 32, "layers": 1, "heads": 2, "mlp_size": 32}


def rotations(config):
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1, 1, 1), torch.arange(0, 8192, 7)[None])
    return torch.stack([cos, sin])


def made(target, **section):
    return drafter_config(DrafterSection(**SECTION, **section), 320, 1, 2, target)


@pytest.mark.parametrize("kind", SCALED)
def test_a_new_drafter_rotates_as_the_target_does(kind):
    target = LlamaConfig(
        **HEAD, max_position_embeddings=8192, rope_parameters={"rope_type": kind, **SCALED[kind]}
    )  # the same head size, so that the embeddings compare
    found = made(target)
    assert found.max_position_embeddings == 8192
    assert torch.equal(rotations(found), rotations(target))


def test_what_a_llama_of_another_size_cannot_have_is_left_out():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096}
    longrope = LlamaConfig(
        **HEAD, max_position_embeddings=8192, rope_parameters={"rope_type": "longrope", "rope_theta": 3e4, **factors}
    )
    assert made(longrope).rope_parameters == {"rope_type": "default", "rope_theta": 3e4}
    by_layer = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert made(by_layer).rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    learned = made(GPT2Config(n_positions=512))
    assert (learned.max_position_embeddings, learned.rope_parameters["rope_theta"]) == (512, 10_000)
    assert made(None).max_position_embeddings == 4096


def test_keys_have_the_last_word():
    target = LlamaConfig(**HEAD, max_position_embeddings=8192, rope_parameters={"rope_type": "yarn", **SCALED["yarn"]})
    found = made(target, max_positions=64, rope_theta=7e3, rope_scaling={"rope_type": "none"})
    assert found.max_position_embeddings == 64
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 7e3}
    found = made(None, rope_scaling={"rope_type": "linear", "factor": 3})
    expected = LlamaConfig(**HEAD, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0})
    assert torch.equal(rotations(found), rotations(expected))
    for wrong in ({"rope_type": "yarn", "factor": 2}, {"rope_type": "none", "factor": 2}, {"rope_type": "linear"}):
        with pytest.raises(ValueError, match=r"rope_type .* takes"):
            DrafterSection(rope_scaling=wrong)


def test_a_warm_start_keeps_its_rotation_and_gets_the_targets_positions(tiny):
    target = LlamaConfig(max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    section = DrafterSection(init_from=tiny.drafter)
    config = warm_config(section, target)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (1024, 10_000)
    assert warm_config(section, LlamaConfig(max_position_embeddings=64)).max_position_embeddings == 256
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        assert torch.equal(
            load_drafter(tiny.drafter)(ids).logits, load_drafter(tiny.drafter, config=config)(ids).logits
        )
    changed = warm_config(DrafterSection(init_from=tiny.drafter, rope_theta=99.0, max_positions=128), target)
    assert (changed.max_position_embeddings, changed.rope_parameters["rope_theta"]) == (128, 99.0)
    with pytest.raises(UserError, match="no run, checkpoint or Hugging Face model here"):
        warm_config(DrafterSection(init_from=tiny.root), target)


def test_a_distilled_drafter_passes_the_gate_that_its_start_fails(tiny, command, tmp_path):
    """The target has more positions than the drafter was made with."""
    target, run = tmp_path / "target", tmp_path / "run"
    random_target(tiny.vocab_size, max_position_embeddings=512).save_pretrained(target)
    load_tokenizer(tiny.tokenizer).save(target)
    words = ["export", f"drafter={tiny.drafter}", f"target.path={target}", f"out={tmp_path / 'out'}"]
    code, _, complaint = command(*words)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "positions: 256, the target has 512; servers stop drafting there" in complaint
    assert "drafter.max_positions=512" in complaint and "serving_length=256" in complaint
    given = [f"drafter.init_from={tiny.drafter}", "drafter.max_positions=null", f"target.path={target}"]
    run_by(1, *distillation(tiny, run, *given, steps=1))
    assert read_drafter_config(run).max_position_embeddings == 512
    assert command(*words, f"drafter={run}")[0] == 0
