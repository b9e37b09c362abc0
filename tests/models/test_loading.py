"""How a target's weights come to where they are used: straight to a device, or gathered layer by layer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from dist_train.config import TargetSection
from dist_train.models.attention import Documents
from dist_train.models.load import load_causal_lm, zero3_configuration
from dist_train.models.target import Target
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.world import World

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        # Four projections, three of the MLP, two norms.
        (LlamaConfig(), 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096),
        (
            LlamaConfig(**LLAMA_70B, num_attention_heads=64),
            2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192,
        ),
        # Eight experts and their router.
        (
            MixtralConfig(),
            2 * 4096**2 + 2 * 4096 * 1024 + 8 * (3 * 4096 * 14336) + 8 * 4096 + 2 * 4096,
        ),
    ],
    ids=["llama-7b", "llama-70b", "mixtral"],
)
def test_two_layers_of_a_partitioned_target_are_gathered_ahead(tmp_path, config, layer):
    config.save_pretrained(tmp_path)
    zero = zero3_configuration(TargetSection(path=str(tmp_path), sharding="zero3"))
    assert zero["stage3_prefetch_bucket_size"] == 2 * layer
    # DeepSpeed gathers ahead no further than this allows, beside the layer that calculates.
    assert zero["stage3_max_live_parameters"] >= 3 * layer


@pytest.fixture
def loads(monkeypatch):
    """What transformers is asked for, in place of loading."""
    asked = []

    def from_pretrained(path, **how):
        asked.append(how)
        model = torch.nn.Linear(1, 1)
        model.to = None  # what is loaded where it belongs is not moved
        return model, {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return asked


def test_weights_go_straight_to_a_gpu(tiny, loads):
    section = TargetSection(path=str(tiny.target), precision="fp32")
    load_causal_lm(section, torch.device("cuda", 0))
    assert loads[0]["device_map"] == {"": torch.device("cuda", 0)}
    load_causal_lm(section)
    assert "device_map" not in loads[1]


def test_a_device_map_loads_what_the_cpu_has(tiny):
    """transformers with that key on the only device there is, against without."""
    mapped = AutoModelForCausalLM.from_pretrained(
        tiny.target, device_map={"": torch.device("cpu")}, dtype=torch.float32
    )
    plain = load_causal_lm(TargetSection(path=str(tiny.target), precision="fp32"), torch.device("cpu"))
    assert all(torch.equal(weight, mapped.state_dict()[name]) for name, weight in plain.state_dict().items())


def test_a_compiled_target_gives_the_states_of_transformers_own(tiny):
    """For packed documents, against each alone through the eager model."""
    runtime = Runtime(World(0, 0, 1, "127.0.0.1", 0, "single process"), torch.device("cpu"))
    section = TargetSection(path=str(tiny.target), precision="fp32", compile=True)
    target = Target(section, runtime)
    blocks = target._decoder.layers
    assert all(block._compiled_call_impl is not None for block in blocks)
    whole = AutoModelForCausalLM.from_pretrained(tiny.target, dtype=torch.float32).eval().model
    ids = torch.randint(tiny.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    for lengths in ([24], [10, 14], [1, 23]):
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
        documents = Documents.of_host(positions.numpy(), runtime.device)
        with torch.no_grad():
            expected = torch.cat([whole(part).last_hidden_state for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(target(ids, positions, documents), expected, atol=1e-5, rtol=1e-5)


def test_a_target_that_is_cut_is_not_compiled(refused, tiny, tmp_path):
    from runs import distillation

    told = refused(*distillation(tiny, tmp_path / "run", "target.sharding=zero3", "target.compile=true"))
    assert "blocks of a target that is cut by zero3 run eagerly; set it to false" in told
