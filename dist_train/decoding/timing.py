"""What single calls of drafters and target cost in this decoder, by batch size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.decoding.attention import grouped_attention
from dist_train.decoding.cache import RowReader
from dist_train.decoding.draft import Draft, drafts_of
from dist_train.decoding.rows import Rows
from dist_train.decoding.speculative import decode_block, read_block
from dist_train.models.chains import parallel_of
from dist_train.models.sizes import cached
from dist_train.runtime.free_memory import free_bytes

_MOST_ROUNDS, _LEAST_ROUNDS = 7, 3
_HEADROOM = 0.8


class CallTimes(NamedTuple):
    """Median seconds of a call for a batch of texts: `plain`, a step of plain decoding; `verify`, a call of the target
    that verifies 1 to gamma drafts; `draft`, of each drafter, one of the passes in which it drafts gamma tokens.
    """

    batch_size: int
    plain: float
    verify: list[float]
    draft: list[float]


@torch.inference_mode()
def time_calls(
    drafters: Sequence[Any], target: Any, gamma: int, batch_sizes: Sequence[int], length: int, seconds: float
) -> list[CallTimes]:
    """Greedy calls, each with `length` tokens in its caches, in shapes that stay the same, the smallest batch first.

    Batch sizes that memory or `seconds` do not allow are left out. One that is measured gets its share of the time: a
    round to warm up, and after it three to seven, of which the median counts (one where three do not fit). In each
    round every call has its turn, so that what slows the machine for a while slows all of them.
    """
    found: list[CallTimes] = []
    began, sizes = time.perf_counter(), sorted(set(batch_sizes))
    a_text = 0.0  # seconds that a round takes for one text; of a larger batch no more
    with grouped_attention(target, *drafters):
        for place, batch_size in enumerate(sizes):
            left = seconds - (time.perf_counter() - began)
            if (1 + _LEAST_ROUNDS) * a_text * batch_size > left or not _fits(
                drafters, target, gamma, batch_size, length
            ):
                break
            calls = _calls(drafters, target, gamma, batch_size, length)
            a_round, share = sum(map(_timed, calls)), left / (len(sizes) - place)
            least = _LEAST_ROUNDS if _LEAST_ROUNDS * a_round < left else 1
            rounds: list[list[float]] = []
            ends = time.perf_counter() + share - 2 * a_round
            while len(rounds) < least or (len(rounds) < _MOST_ROUNDS and time.perf_counter() < ends):
                rounds.append([_timed(call) for call in calls])
            a_text = sum(rounds[-1]) / batch_size
            plain, *others = [statistics.median(times) for times in zip(*rounds, strict=True)]
            passes = [1 if parallel_of(model.config) else gamma for model in drafters]
            draft = [whole / number for whole, number in zip(others[gamma:], passes, strict=True)]
            found.append(CallTimes(batch_size, plain, others[:gamma], draft))
    return found


def _calls(
    drafters: Sequence[Any], target: Any, gamma: int, batch_size: int, length: int
) -> list[Callable[[], object]]:
    """A plain step, verification of 1 to gamma drafts, gamma drafts of each drafter; each ends on the host."""
    some = torch.Generator().manual_seed(0)
    vocab_size = target.config.get_text_config().vocab_size
    prompts = torch.randint(vocab_size, (batch_size, length), generator=some).tolist()
    drafts = torch.randint(vocab_size, (batch_size, gamma), generator=some).to(target.device)

    def rows_for(count: int) -> Rows:
        rows = Rows(prompts, None, count, [1] * batch_size, (), None, target.device)
        rows.fill([])  # what stands in the caches changes no time
        return rows

    rows = [rows_for(count) for count in range(gamma + 1)]
    slots = rows[-1].slots
    reader = RowReader(target, batch_size, slots)

    def verify(count: int) -> object:
        def ready(_rows: Rows, _chances: Tensor) -> tuple[Tensor, None]:
            return drafts[:, :count], None

        return read_block(*decode_block(reader, ready, rows[count], None), [reader.nan])

    def draft(drafter: Draft) -> object:
        return drafter(rows[-1], rows[-1].chances()[:, :gamma])[0].tolist()

    some_drafters = [drafts_of(RowReader(model, batch_size, slots), gamma, None) for model in drafters]
    return [
        *(lambda count=count: verify(count) for count in range(gamma + 1)),
        *(lambda drafter=drafter: draft(drafter) for drafter in some_drafters),
    ]


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _fits(drafters: Sequence[Any], target: Any, gamma: int, batch_size: int, length: int) -> bool:
    """Whether caches and logits leave some of the free memory."""
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    configs = [model.config.get_text_config() for model in (target, *drafters)]
    numbers = (length + gamma + 3) * sum(map(cached, configs)) + 4 * (gamma + 1) * configs[0].vocab_size
    return bool(batch_size * numbers * target.dtype.itemsize < _HEADROOM * free_bytes(target.device))
