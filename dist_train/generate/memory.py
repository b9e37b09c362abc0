"""What answering needs on each rank, before anything is loaded."""

from __future__ import annotations

from typing import Any

from dist_train.config import GenerateConfig
from dist_train.models.load import DTYPES, read_target_config, target_bytes
from dist_train.models.sizes import cached, render
from dist_train.models.target_tokenizer import load_target_tokenizer
from dist_train.prompts.seeds import read_encoded_seeds


def memory_report(config: GenerateConfig, _world_size: int) -> str:
    """GiB a rank, each of which holds the whole target: weights, key-value cache of a batch, logits of its last tokens.

    Activations and what the libraries take for themselves come on top.
    """
    if config.engine.kind == "openai":
        return "# memory: the server's; no model is loaded here"
    tokenizer = load_target_tokenizer(config.target, config.tokenizer, config.chat_template)
    prompts = read_encoded_seeds([config.seeds, *config.more_seeds], tokenizer).ids
    target: Any = read_target_config(config.target)
    width, tokens = DTYPES[config.target.precision].itemsize, max(map(len, prompts)) + config.max_new_tokens
    estimate = {
        "weights": target_bytes(config.target),
        "key-value cache": width * config.batch_size * tokens * cached(target),
        "logits": 4 * config.batch_size * target.vocab_size,
    }
    more = "\n# continuous batching: its cache takes what is free" if config.engine.batching == "continuous" else ""
    return render(estimate) + more
