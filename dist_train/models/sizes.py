"""What a model takes, by its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GIB = 2**30


def render(estimate: Mapping[str, int]) -> str:
    """Bytes a rank of each kind, as YAML comments."""
    lines = [f"# {kind:<18} {size / _GIB:8.2f} GiB" for kind, size in estimate.items()]
    total = sum(estimate.values()) / _GIB
    return "\n".join([f"# memory a rank: {total:.2f} GiB and activations", *lines])


def parameters(config: Any) -> int:
    """Of a causal language model of this configuration, made without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def cached(config: Any) -> int:
    """Numbers that a token leaves in the caches of all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size
