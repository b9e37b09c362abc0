"""Tokens a second of the decoder of `dist-train generate` against transformers' `generate`, in the same process.

    python tests/benchmarks/generate.py --threads 2 [--model FOLDER_OR_GGUF] [--continuous]
    python tests/benchmarks/generate.py --device cuda --dtype bf16 --layers 30

Prompts of 8 to 96 random tokens, sampled answers of 100 to 400 tokens; how long each is, is drawn before, since what a
model says is not to decide how much there is to do. Peers get the same prompts, lengths and sampling:

- transformers' `generate` on left-padded batches of as many prompts as ours has rows, each as long as its longest
  answer: what `dist-train generate` did before it had a decoder of its own;
- with `--continuous`, transformers' continuous batching, which takes requests as ours takes rows, over a paged cache.

Without a model a random one is made, as wide as SmolLM2-135M and with its vocabulary, of fewer layers; its logits are
scaled so that a nucleus has as many tokens as a chat model's. A GGUF file needs the `gguf` package. Each way has a turn
in each round; figures are medians of rounds. Seconds are the wall's; `--cpu-seconds`: the processor's, for a machine
that others use.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from dist_train.decoding.speculative import generate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Prompts = list[list[int]]
Way = Callable[[Any, Prompts, list[int], argparse.Namespace], int]


def load(path: Path | None, layers: int) -> Any:
    """A model in fp32, from a Hugging Face folder or a GGUF file, or made here."""
    if path is not None:
        file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent if file else path, dtype=torch.float32, **file)
        return model.eval()
    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152}
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **width, **heads)).eval()
    with torch.no_grad():
        made.lm_head.weight *= 8  # a nucleus of 0.95 has some hundred tokens
    return made


def make_work(count: int, vocab_size: int) -> tuple[Prompts, list[int]]:
    """Prompts, and how many tokens the answer to each has."""
    drawn = np.random.default_rng(0)
    prompts = [drawn.integers(3, vocab_size, size=int(n)).tolist() for n in drawn.integers(8, 97, count)]
    return prompts, drawn.integers(100, 401, count).tolist()


# -- the three: each returns how many tokens it made that are wanted --------------------------------------------------


def ours(model: Any, prompts: Prompts, lengths: list[int], arguments: argparse.Namespace) -> int:
    """Rows that are kept full."""
    found = generate(
        model,
        prompts,
        arguments.temperature,
        arguments.top_p,
        limits=lengths,
        eos_ids=[],
        seeds=range(len(prompts)),
        batch_size=arguments.rows,
    )
    return sum(map(len, found))


@torch.inference_mode()
def static(model: Any, prompts: Prompts, lengths: list[int], arguments: argparse.Namespace) -> int:
    """Left-padded batches, one after the other."""
    made = 0
    for first in range(0, len(prompts), arguments.rows):
        some, wanted = prompts[first : first + arguments.rows], lengths[first : first + arguments.rows]
        width = max(map(len, some))
        output = model.generate(
            input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in some]).to(model.device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some]).to(model.device),
            max_new_tokens=max(wanted),
            eos_token_id=None,
            pad_token_id=0,
            **_sampling(arguments),
        )
        assert output.shape[1] - width == max(wanted)
        made += sum(wanted)
    return made


@torch.inference_mode()
def continuous(model: Any, prompts: Prompts, lengths: list[int], arguments: argparse.Namespace) -> int:
    """Requests that come and go."""
    settings = ContinuousBatchingConfig(max_batch_tokens=max(map(len, prompts)) + arguments.rows)
    pages = sorted(-(-(len(p) + n) // settings.page_size) for p, n in zip(prompts, lengths, strict=True))
    settings.num_blocks = sum(pages[-arguments.rows :]) + 1
    asked = GenerationConfig(eos_token_id=-1, pad_token_id=0, **_sampling(arguments))
    manager = model.init_continuous_batching(asked, settings)
    for prompt, wanted in zip(prompts, lengths, strict=True):
        manager.add_request(prompt, max_new_tokens=wanted)
    manager.start()
    made = answered = 0
    while answered < len(prompts):
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            raise RuntimeError("continuous batching ended before its answers")
        if output is not None and output.error is not None:
            raise RuntimeError(output.error)
        if output is not None and output.is_finished():
            made, answered = made + len(output.generated_tokens), answered + 1
    manager.stop(block=True)
    manager.destroy()
    return made


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}


def main() -> None:
    """Reads what to do, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    model = load(arguments.model, arguments.layers).to(arguments.device, DTYPES[arguments.dtype])
    machine = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{arguments.threads} CPU threads"
    prompts, lengths = make_work(arguments.prompts, model.config.vocab_size)
    ways: dict[str, Way] = {"ours, rows kept full": ours, "transformers' generate, static batches": static}
    if arguments.continuous:
        ways["transformers' continuous batching"] = continuous
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():  # the first call pays for what later ones find ready
        run(model, prompts[:2], [2, 2], arguments)
    for _ in range(arguments.rounds):
        for way, run in ways.items():
            began = clock()
            assert run(model, prompts, lengths, arguments) == sum(lengths)
            times[way].append(clock() - began)
    unit = "CPU second" if arguments.cpu_seconds else "s"
    print(
        f"torch {torch.__version__}, {machine}, {model.num_parameters() / 1e6:.0f}M parameters, "
        f"vocabulary {model.config.vocab_size:,}; {len(prompts)} prompts, answers of {min(lengths)} to {max(lengths)} "
        f"tokens, {arguments.rows} at a time, T {arguments.temperature:g}, top-p {arguments.top_p:g}, "
        f"{arguments.dtype}, {arguments.rounds} rounds\n"
    )
    print(f"| way | tokens/{unit} | ours over it |\n|--|--|--|")
    mine = times["ours, rows kept full"]
    for way, seconds in times.items():
        ratio = statistics.median(theirs / our for theirs, our in zip(seconds, mine, strict=True))
        print(f"| {way} | {sum(lengths) / statistics.median(seconds):.0f} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
