"""Prompts a second of an evaluation, batched, against evaluating one prompt at a time.

    python tests/benchmarks/evaluate.py demo 300m --threads 2
    python tests/benchmarks/evaluate.py 300m --device cuda --dtype bf16

Target and drafter are made here: the target is the drafter with more layers on top whose outputs are scaled down, so
that the two agree as often as a trained pair does (`noise`). At demo scale sizes are those of the demo, with 300m the
target has 300M parameters and the drafter its embedding, head and first layer. Peers, in the same process, greedy, with
the same gamma and the same prompts:

- transformers' assisted generation, constant gamma, confidence threshold 0, a prompt at a time: so also Spec-Bench,
  whose script for drafters that are models of their own (evaluation/inference_sps.py) calls it for each question;
- the leanest loop that we could write in that manner: batch 1, key-value caches that are allocated once and cut back to
  what was accepted, as Spec-Bench's scripts for drafting heads have them, without anything around it.

Ours decodes, at demo scale, as many prompts as a unit of `dist-train evaluate` has. Each gets a turn in each round;
figures are medians of rounds. Block efficiency must be the same for all: where float32 rounds a tie another way, a text
and its blocks differ, so it is compared to 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

from dist_train.decoding.speculative import speculative_generate
from dist_train.evaluate.stage import BATCHES_A_UNIT
from dist_train.models.kv_cache import as_argument

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Prompts = list[list[int]]
Outcome = tuple[int, int]  # tokens and calls of the target, without each text's last block, which the limit cuts

SCALES: dict[str, dict[str, Any]] = {
    "demo": {
        "target": {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 688},
        "drafter": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 176},
        "vocab_size": 2048,
        "noise": 0.1,
        "ours": BATCHES_A_UNIT * 32,
        "peers": 16,
    },
    "300m": {
        "target": {"hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 16, "intermediate_size": 2816},
        "drafter": {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 2816},
        "vocab_size": 10240,
        "noise": 0.02,
        "ours": 32,
        "peers": 4,
    },
}


def make_pair(scale: dict[str, Any]) -> tuple[Any, Any]:
    """Drafter and target that agree at times.

    Same width: the drafter's layers are the target's first, and the target's other layers add little. Otherwise the
    drafter's embedding, head and layers stand in the first columns of the target's, the rest of which adds little.
    """
    noise = scale["noise"]
    common = {"vocab_size": scale["vocab_size"], "max_position_embeddings": 1024, "initializer_range": 0.05}
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**scale["target"], **common)).eval()
    drafter = LlamaForCausalLM(LlamaConfig(**scale["drafter"], **common)).eval()
    narrow, wide = drafter.config.hidden_size, target.config.hidden_size
    with torch.no_grad():
        for layer in target.model.layers:  # near the identity: what they add is noise
            layer.self_attn.o_proj.weight *= noise
            layer.mlp.down_proj.weight *= noise
        for mine, theirs in (
            (drafter.model.embed_tokens, target.model.embed_tokens),
            (drafter.lm_head, target.lm_head),
        ):
            mine.weight.copy_(theirs.weight[:, :narrow])
            theirs.weight[:, narrow:] *= noise
        for model in (drafter, target):  # beside an embedding of size 1 the layers are what is small
            model.model.embed_tokens.weight *= 20
        for layer in drafter.model.layers:
            layer.self_attn.o_proj.weight *= noise
            layer.mlp.down_proj.weight *= noise
        if narrow == wide:
            first = target.model.layers[: len(drafter.model.layers)]
            drafter.model.layers.load_state_dict(first.state_dict())
    return drafter, target


def make_prompts(count: int, vocab_size: int) -> Prompts:
    """Of 8 to 96 tokens."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, vocab_size, size=int(n)).tolist() for n in drawn.integers(8, 97, count)]


# -- the three --------------------------------------------------------------------------------------------------


def ours(drafter: Any, target: Any, prompts: Prompts, gamma: int, limit: int) -> Outcome:
    """Batches of 32 that are kept full."""
    found = speculative_generate(drafter, target, prompts, gamma, 0.0, max_new_tokens=limit, batch_size=32)
    whole = [blocks[:-1] for blocks in found.blocks]
    return sum(map(sum, whole)), sum(map(len, whole))


def assisted(drafter: Any, target: Any, prompts: Prompts, gamma: int, limit: int) -> Outcome:
    """transformers, one prompt at a time."""
    settings = drafter.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
    settings.assistant_confidence_threshold = 0
    read: list[int] = []  # tokens in the cache at each call of the target

    def note(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        cache = options["cache"] if "cache" in options else options["past_key_values"]
        read.append(cache.get_seq_length())

    tokens = calls = 0
    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    for prompt in prompts:
        read.clear()
        ids = torch.tensor([prompt], device=target.device)
        target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens, calls = tokens + read[-1] + 1 - len(prompt), calls + len(read) - 1
    hook.remove()
    return tokens, calls


@torch.inference_mode()
def one_by_one(drafter: Any, target: Any, prompts: Prompts, gamma: int, limit: int) -> Outcome:
    """A loop at batch 1 over caches allocated once, whose length alone is set back."""
    room = max(map(len, prompts)) + limit + gamma + 2
    caches: list[Any] = [StaticCache(model.config, max_cache_len=room) for model in (drafter, target)]
    tokens = calls = 0

    def forward(which: int, ids: torch.Tensor, start: int) -> torch.Tensor:
        model, cache = (drafter, target)[which], caches[which]
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(start)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        return model(input_ids=ids, position_ids=positions, use_cache=True, **as_argument(cache, model)).logits

    for prompt in prompts:
        text = torch.tensor([prompt], device=target.device)
        forward(0, text[:, :-1], 0)
        forward(1, text[:, :-1], 0)
        while text.shape[1] < len(prompt) + limit:
            length = text.shape[1]
            new, drafts = text[:, max(length - 2, 0) :], text
            for k in range(gamma):
                start = length - new.shape[1] if k == 0 else drafts.shape[1] - 1
                new = forward(0, new, start)[:, -1].argmax(-1, keepdim=True)
                drafts = torch.cat([drafts, new], 1)
            best = forward(1, drafts[:, length - 1 :], length - 1)[0].argmax(-1)
            right = int((drafts[0, length:] == best[:-1]).long().cumprod(0).sum())
            text = torch.cat([drafts[:, : length + right], best[None, right : right + 1]], 1)
            tokens, calls = tokens + right + 1, calls + 1
        tokens, calls = tokens - right - 1, calls - 1
    return tokens, calls


WAYS: dict[str, Callable[[Any, Any, Prompts, int, int], Outcome]] = {
    "ours, batch 32": ours,
    "transformers' assisted generation": assisted,
    "lean loop, one prompt at a time": one_by_one,
}


def measure(name: str, arguments: argparse.Namespace) -> None:
    """One scale: a table."""
    scale = SCALES[name]
    drafter, target = (model.to(arguments.device, DTYPES[arguments.dtype]) for model in make_pair(scale))
    prompts = make_prompts(scale["ours"], scale["vocab_size"])
    given = {way: prompts if way.startswith("ours") else prompts[: scale["peers"]] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    taus: dict[str, float] = {}
    for run in WAYS.values():
        run(drafter, target, prompts[:2], arguments.gamma, 4)
    for _ in range(arguments.rounds):
        for way, run in WAYS.items():
            began = time.perf_counter()
            tokens, calls = run(drafter, target, given[way], arguments.gamma, arguments.tokens)
            times[way].append((time.perf_counter() - began) / len(given[way]))
            taus[way] = tokens / calls
    # The peers have had the first prompts only.
    tokens, calls = ours(drafter, target, prompts[: scale["peers"]], arguments.gamma, arguments.tokens)
    taus["ours, batch 32"] = tokens / calls
    sizes = " / ".join(f"{model.num_parameters() / 1e6:.1f}M" for model in (target, drafter))
    print(
        f"\n{name}: {sizes} parameters, gamma {arguments.gamma}, {arguments.tokens} tokens a prompt, greedy, ", end=""
    )
    print(f"{arguments.dtype}\n")
    print("| way | prompts/s | tokens/s | ours over it | block efficiency |\n|--|--|--|--|--|")
    mine = times["ours, batch 32"]
    for way, seconds in times.items():
        ratio = statistics.median(theirs / our for theirs, our in zip(seconds, mine, strict=True))
        rate = 1 / statistics.median(seconds)
        cells = (way, f"{rate:.2f}", f"{rate * arguments.tokens:.0f}", f"{ratio:.1f}x", f"{taus[way]:.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Reads the scales, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scales", nargs="+", choices=SCALES)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    on_gpu = torch.device(arguments.device).type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{arguments.threads} CPU threads"
    print(f"torch {torch.__version__}, {machine}")
    for name in arguments.scales:
        measure(name, arguments)


if __name__ == "__main__":
    main()
