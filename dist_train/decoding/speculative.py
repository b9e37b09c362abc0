"""Batched decoding, speculative (Leviathan et al., 2023; Chen et al., 2023) or plain, lossless for every row.

Rows of a batch accept different numbers of tokens and end at different times. Their caches let each advance on its own
(`cache.RowReader`), and prompts that wait take the places of those that are finished (`rows.Rows`), so that a batch
stays full. The host reads once a block what came out of it; all else stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.decoding.attention import grouped_attention
from dist_train.decoding.cache import RowReader
from dist_train.decoding.draft import Draft, Drafting, TokenByToken, drafts_of
from dist_train.decoding.rows import Generated, Rows
from dist_train.decoding.sampling import Sampler
from dist_train.decoding.verify import verify, verify_greedy

__all__ = ["Generated", "generate", "speculative_generate"]


def speculative_generate(
    drafter: Any | None,
    target: Any,
    input_ids: Sequence[Sequence[int]],
    gamma: int,
    temperature: float,
    top_p: float = 1.0,
    *,
    max_new_tokens: int = 128,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    draft_greedily: bool = False,
    draft_top_p: float | None = None,
    one_by_one: bool = False,
    record_confidences: bool = False,
    batch_size: int | None = None,
) -> Generated:
    """Continue prompts (token ids, of any lengths, at least one each) with the target's own distribution.

    `drafter` and `target` are Hugging Face causal language models of one vocabulary; without a drafter, or with gamma
    0, this is plain decoding. Temperature 0 is greedy. The drafter samples under the same temperature and top-p, or
    `draft_top_p` in its place, or, with `draft_greedily`, takes its likeliest token, as servers do by default. One that
    drafts in one pass (`models.chains`) takes a pass for each token with `one_by_one`. With `record_confidences` the
    drafter's confidence in each draft comes along (`draft.Draft`). `batch_size` prompts are decoded at a time (None:
    all). The random numbers of a prompt are its own, from `seed` and its place in `input_ids`: batch size and
    neighbours do not change them.
    """
    gamma = gamma if drafter is not None else 0
    seeds = None if temperature == 0 else [(seed, i) for i in range(len(input_ids))]
    limits = [max_new_tokens] * len(input_ids)
    rows = Rows(input_ids, batch_size, gamma, limits, eos_ids, seeds, target.device)
    sampler = Sampler(temperature, top_p, target.device) if temperature > 0 else None
    draft = None
    if gamma:
        own = sampler
        if draft_greedily:
            own = None
        elif sampler and draft_top_p is not None:
            own = Sampler(temperature, draft_top_p, target.device)
        reader = RowReader(drafter, rows.size, rows.slots)
        kind = TokenByToken if one_by_one else drafts_of
        draft = kind(reader, gamma, own, record=record_confidences)
    return _decode(RowReader(target, rows.size, rows.slots), draft, rows, sampler)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    top_p: float,
    *,
    limits: Sequence[int],
    eos_ids: Sequence[int],
    seeds: Sequence[int],
    batch_size: int | None,
) -> list[list[int]]:
    """Plain decoding: what `model` says to each prompt, the end-of-sequence id included.

    Each prompt has its own limit, the most tokens of its answer, and its own seed, from which its random numbers come.
    Otherwise as `speculative_generate`.
    """
    rows = Rows(prompts, batch_size, 0, limits, eos_ids, seeds if temperature > 0 else None, model.device)
    sampler = Sampler(temperature, top_p, model.device) if temperature > 0 else None
    return _decode(RowReader(model, rows.size, rows.slots), None, rows, sampler).tokens


@torch.inference_mode()
def _decode(target: RowReader, draft: Draft | None, rows: Rows, sampler: Sampler | None) -> Generated:
    """Decode until every prompt is answered; without a sampler greedily."""
    readers = [target, draft.reader] if draft else [target]
    samplers = {each for each in (sampler, draft and draft.sampler) if each}
    with grouped_attention(*(reader.model for reader in readers)):
        while rows.fill(readers):
            for whole in (False, True):
                for each in samplers:
                    each.begin(whole=whole)
                block, accepted = decode_block(target, draft, rows, sampler)
                flags = [*(reader.nan for reader in readers), *(each.incomplete for each in samplers)]
                told, found = read_block(block, accepted, flags)
                for reader, nan in zip(readers, found, strict=False):
                    if nan:
                        raise reader.nan_error()
                # A nucleus that was not found whole: again. What was read is written over, and nothing was committed.
                if not any(found):
                    break
            if draft and draft.record:
                rows.note(torch.stack(draft.confidences, 1))
            rows.commit(block, accepted, told, readers)
    return rows.finish()


def decode_block(
    target: RowReader, draft: Drafting | None, rows: Rows, sampler: Sampler | None
) -> tuple[Tensor, Tensor]:
    """Draft after each row and verify: tokens [B, gamma + 1], and how many of the drafts among them count [B].

    The token after the accepted ones is the target's; those beyond it mean nothing.
    """
    chances = rows.chances()  # gamma to draft with, gamma to accept with, one for the token after
    gamma = chances.shape[1] // 2
    last, position = rows.window(1)
    drafts, p = draft(rows, chances[:, :gamma]) if draft else (last[:, :0], None)
    positions = position + torch.arange(gamma + 1, device=position.device)
    logits = target.read(torch.cat([last, drafts], 1), positions, rows.width)
    if sampler:
        accepted, extra = verify(drafts, p, sampler(logits), chances[:, gamma:])
    else:
        accepted, extra = verify_greedy(drafts, logits.argmax(-1))
    return torch.cat([drafts, extra[:, None]], 1).scatter(1, accepted[:, None], extra[:, None]), accepted


def read_block(block: Tensor, accepted: Tensor, flags: list[Tensor]) -> tuple[list[list[int]], list[int]]:
    """The one thing that the host waits for: of each row its block and how many were accepted; and the flags."""
    rows, width = len(block), block.shape[1] + 1
    numbers = torch.cat([torch.cat([block, accepted[:, None]], 1).flatten(), torch.stack(flags).long()]).tolist()
    return [numbers[i * width : (i + 1) * width] for i in range(rows)], numbers[rows * width :]
