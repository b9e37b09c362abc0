"""What an evaluation needs on each rank, before anything is loaded."""

from __future__ import annotations

from typing import Any

from dist_train.config import EvaluateConfig
from dist_train.evaluate.tasks import load_prompts
from dist_train.models.drafter import read_drafter_config
from dist_train.models.load import DTYPES, read_target_config, target_bytes
from dist_train.models.sizes import cached, parameters, render
from dist_train.models.target_tokenizer import load_target_tokenizer


def memory_report(config: EvaluateConfig, _world_size: int) -> str:
    """GiB a rank: weights, key-value caches of a batch, probabilities over the vocabulary. Each rank holds all models.

    Activations and what the libraries take for themselves come on top.
    """
    tasks = load_prompts(config, load_target_tokenizer(config.target, config.tokenizer, config.chat_template)).values()
    tokens = max(max(map(len, task.ids)) + task.sampling.max_new_tokens for task in tasks)
    gamma, width = max(config.gammas), DTYPES[config.target.precision].itemsize
    target: Any = read_target_config(config.target)
    drafters: list[Any] = [read_drafter_config(path) for path in config.drafters.values()]
    room = config.batch_size * (tokens + gamma + 2)
    estimate = {
        "weights": target_bytes(config.target) + width * sum(map(parameters, drafters)),
        "key-value caches": width * room * (cached(target) + max(map(cached, drafters))),
        # fp32, of a block: the target's logits, probabilities and nucleus, the drafts' probabilities; of one token
        # what is left of a rejected draft and, in float64, running sums.
        "logits": 4 * config.batch_size * (4 * (gamma + 1) + 4) * target.vocab_size,
    }
    return render(estimate)
