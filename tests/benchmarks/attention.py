"""Attention of packed documents: its kernels, its time and its memory, against one dense mask.

    python tests/benchmarks/attention.py --tokens 8192

One row of documents of 1 to `--longest` tokens, heads as a Llama of 7B has them, forward and backward: `packed` is what
`drafter.attention=auto` and `target.attention=auto` do, `dense` scaled_dot_product_attention under a mask of
[1, 1, T, T], as transformers makes it for packed documents. Prints a Markdown table; kernels are those that torch's
profiler saw on the GPU, or operators where there is none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dist_train.models.attention import Documents, packed_attention

Attend = Callable[[], Tensor]


def positions_of(tokens: int, longest: int) -> np.ndarray:
    """Places within documents of random lengths, [1, tokens]."""
    lengths = np.random.default_rng(0).integers(1, longest + 1, tokens)
    return np.concatenate([np.arange(length) for length in lengths[:tokens]])[None, :tokens]


def kernels(step: Callable[[], None], on_gpu: bool) -> str:
    """Those that attend, each once."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    events = profiler.events() or []
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = dict.fromkeys(event.name for event in events if event.device_type == wanted)
    said = ("flash", "fmha", "attention", "efficient", "softmax", "bmm", "sdpa")
    found = [name for name in names if any(word in name.lower() for word in said)]
    return ", ".join(name.replace("|", "/").split("<")[0][:70] for name in found) or "none that is known"


def measure(name: str, attend: Attend, parts: list[Tensor], repeats: int) -> None:
    """A row of the table."""
    on_gpu = parts[0].is_cuda

    def step() -> None:
        torch.autograd.grad(attend().float().sum(), parts)
        if on_gpu:
            torch.cuda.synchronize()

    step()
    peak = "-"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        step()
        peak = f"{(torch.cuda.max_memory_allocated() - level) / 2**20:.0f}"
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    print(f"| {name} | {1000 * min(times):.2f} | {peak} | {kernels(step, on_gpu)} |", flush=True)


def main() -> None:
    """Reads the sizes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, arguments.heads, arguments.tokens, arguments.size)
    parts = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    query, key, value = parts
    positions = positions_of(arguments.tokens, arguments.longest)
    documents = Documents.of_host(positions, device)
    numbers = torch.from_numpy((positions[0] == 0).cumsum()).to(device)
    mask = (numbers[:, None] == numbers).tril()[None, None]
    module = torch.nn.Module()
    count = int((positions == 0).sum())
    print(f"{arguments.tokens} tokens in {count} documents, {arguments.heads} heads of {arguments.size}, {dtype}\n")
    print("| attention | ms forward and backward | MiB | kernels |\n|--|--|--|--|")
    ways: dict[str, Attend] = {
        "packed": lambda: packed_attention(module, query, key, value, None, documents=documents)[0],
        "dense mask": lambda: F.scaled_dot_product_attention(query, key, value, mask),
    }
    for name, attend in ways.items():
        measure(name, attend, parts, arguments.repeats)


if __name__ == "__main__":
    main()
