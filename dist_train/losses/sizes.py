"""How many rows of logits are alive at once, and for how many the losses are taken at once."""

from __future__ import annotations

import torch

from dist_train.runtime.world import tell_once

_TOLD: set[int] = set()
# A chunk is what the heads are multiplied for: two tensors of logits are alive. Fewer rows than the least would leave
# the products waiting for the weights to be read and the weight's gradient to be written.
_CHUNK_ELEMENTS = {"cpu": 5 << 20, "cuda": 1 << 26}
_LEAST_ROWS = {"cpu": 704, "cuda": 512}
# Without a target, whose head is the wide one.
_LEAST_ROWS_ALONE = {"cpu": 240, "cuda": 512}
# On a CPU oneDNN is at its best with fewer rows. Compiled, the gradient has memory of its own: without a target that is
# the second tensor.
_FUSED_ELEMENTS = 7 << 20
_FUSED_ELEMENTS_ALONE = 5 << 20
_FUSED_LEAST_ROWS = 96
# A chunk's share of the free memory, of which it takes two tensors in fp32.
_FREE_SHARE = 1 / 4
# A block is what the losses are taken for, eagerly a dozen tensors: as many rows of a chunk as a cache holds of them,
# and not fewer than keep every core of a CPU busy with rows of its own. Compiled it is the whole chunk on a GPU.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 22}
_ROWS_PER_THREAD = 6
_FUSED_ROWS_PER_THREAD = 8


def chunk_rows(vocab_size: int, on_gpu: bool, *, alone: bool = False, fused: bool = False) -> int:
    """Rows of logits alive at once where none are asked for and memory is not short.

    `alone`: without a target; `fused`: for the compiled loss.
    """
    if fused and not on_gpu:
        return max(_FUSED_LEAST_ROWS, (_FUSED_ELEMENTS_ALONE if alone else _FUSED_ELEMENTS) // vocab_size)
    kind = "cuda" if on_gpu else "cpu"
    least = _LEAST_ROWS_ALONE if alone else _LEAST_ROWS
    return max(least[kind], _CHUNK_ELEMENTS[kind] // vocab_size // 32 * 32)


def affordable_rows(vocab_size: int, device: torch.device, *, alone: bool = False, fused: bool = False) -> int:
    """`chunk_rows`, halved until two fp32 tensors of them take no more than a share of the GPU's free memory.

    On a CPU a chunk is small beside what a model needs. Sizes change in such steps only, because the order in which
    sums are rounded changes with them.
    """
    rows = wanted = chunk_rows(vocab_size, device.type != "cpu", alone=alone, fused=fused)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while rows > 16 and 2 * 4 * rows * vocab_size > _FREE_SHARE * free:
            rows //= 2
    if rows < wanted:
        _tell_shrunk(wanted, rows)
    return rows


def _tell_shrunk(wanted: int, rows: int) -> None:
    """Once a process: that a chunk is smaller than is fast, and the mend."""
    if wanted in _TOLD:
        return
    _TOLD.add(wanted)
    tell_once(
        f"loss: {rows} rows of logits at a time, where {wanted} would be faster: little GPU memory is free; a smaller "
        "train.micro_batch leaves more, loss.chunk_size sets the rows"
    )


def block_rows(vocab_size: int, device: torch.device, *, fused: bool = False) -> int:
    """Rows for which the losses are taken at once, at the most."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        share = _BLOCK_ELEMENTS["cpu"] // vocab_size
        if fused:  # a whole number for each core
            return max(_FUSED_ROWS_PER_THREAD, share // threads) * threads
        return max(_ROWS_PER_THREAD * threads, share)
    return _CHUNK_ELEMENTS["cuda"] if fused else max(1, _BLOCK_ELEMENTS["cuda"] // vocab_size)
