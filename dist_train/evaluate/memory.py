"""What an evaluation needs on each rank, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.config import EvaluateConfig
from dist_train.evaluate.tasks import load_prompts
from dist_train.models.drafter import read_drafter_config
from dist_train.models.load import DTYPES, read_target_config
from dist_train.models.target_tokenizer import load_target_tokenizer

_GIB = 2**30


def memory_report(config: EvaluateConfig, _world_size: int) -> str:
    """GiB a rank: weights, key-value caches of a batch, probabilities over the vocabulary. Each rank holds all models.

    Activations and what the libraries take for themselves come on top.
    """
    tasks = load_prompts(config, load_target_tokenizer(config.target, config.tokenizer)).values()
    tokens = max(max(map(len, task.ids)) + task.sampling.max_new_tokens for task in tasks)
    gamma, width = max(config.gammas), DTYPES[config.target.precision].itemsize
    target: Any = read_target_config(config.target)
    drafters: list[Any] = [read_drafter_config(path) for path in config.drafters.values()]
    room = config.batch_size * (tokens + gamma + 2)
    estimate = {
        "weights": width * sum(map(parameters, [target, *drafters])),
        "key-value caches": width * room * (cached(target) + max(map(cached, drafters))),
        # fp32: the target's logits and probabilities of a block, the drafts' probabilities.
        "logits": 4 * config.batch_size * (3 * gamma + 2) * target.vocab_size,
    }
    return render(estimate)


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
