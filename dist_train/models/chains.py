"""Drafters that draft a whole block in one pass: what stands behind the sequences that they learn from.

PARD (An et al., 2025, arXiv 2504.18583): after a text come its last token and k mask tokens, and the output at the k-th
is the distribution of the token k + 1 places on, given the text alone. In training any position of a sequence is such
a last token. Its masks, a chain, stand behind the sequence; they see the sequence up to their position and the chain up
to themselves, so that one pass learns from all positions as from a sequence of its own for each.

A mask at offset k is dropped with all behind it with probability 1 - keep at each offset: offset k then counts
keep^k in the loss, as often as it is reached where each draft is accepted with probability `keep`, and costs as much.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.errors import UserError
from dist_train.tokenizer import Tokenizer

_RESERVED = re.compile("reserved|unused|mask|unk", re.IGNORECASE)
_STEP = 64  # masks of a row are rounded up to multiples: kernels are compiled for few shapes


class Parallel(NamedTuple):
    """A drafter's way to draft `tokens` in one pass: its last token and `tokens` - 1 of `mask_id` behind it."""

    tokens: int
    mask_id: int

    def configure(self, config: Any) -> None:
        """Write it into a Hugging Face configuration.

        vLLM reads `pard_token` (0.32, v1/spec_decode/llm_base_proposer.py), and is told how many tokens to draft.
        """
        config.pard_token, config.parallel_tokens = self.mask_id, self.tokens


def parallel_of(config: Any) -> Parallel | None:
    """How a drafter of this configuration drafts; None for one token at a time."""
    mask_id = getattr(config, "pard_token", None)
    return None if mask_id is None else Parallel(int(getattr(config, "parallel_tokens", 1)), int(mask_id))


def find_mask_id(tokenizer: Tokenizer, vocab_size: int, wanted: int | None) -> int:
    """An id of the target's vocabulary that neither texts nor chats have: `wanted`, if it is one, or the first found.

    Ids beyond the tokenizer's own fill a vocabulary up; special tokens are kept in reserve, or stand for what is in no
    chat. Raises UserError where there is none.
    """
    templates = tokenizer.chat_template
    chats = templates if isinstance(templates, str) else "".join((templates or {}).values())
    free = {
        i: token
        for token, i in tokenizer.special_ids.items()
        if i not in (tokenizer.bos_id, tokenizer.eos_id) and token not in chats
    }
    if wanted is not None:
        if wanted in free or tokenizer.vocab_size <= wanted < vocab_size:
            return wanted
        raise UserError(
            f"drafter.parallel.mask_id {wanted}: {'a token of texts or chats' if wanted < vocab_size else 'no token'}; "
            f"free are {', '.join(map(str, sorted(free)[:5])) or 'none'}; or leave it null"
        )
    if vocab_size > tokenizer.vocab_size:
        return tokenizer.vocab_size
    reserved = [i for i, token in free.items() if _RESERVED.search(token)]
    if not free:
        raise UserError(
            f"{tokenizer.source}: no id is in reserve, every one is in texts or chats: no drafter.parallel for it"
        )
    return min(reserved) if reserved else max(free)  # the first ones tend to be ends of documents


class Chains(NamedTuple):
    """The masks behind a micro-batch [B, T], M a row: `anchors` [B, M], the position after which a mask's chain stands,
    and `offsets` [B, M], its place in the chain, from 1 on; -1 is no mask but fills the row up. `masks`: how many
    these are, `mask_id`: what they read.
    """

    anchors: Tensor
    offsets: Tensor
    masks: int
    mask_id: int

    def behind(self, tokens: Tensor, masks: Tensor | int) -> Tensor:
        """[B, T + M] of `tokens` [B, T], and of `masks` [B, M], or one value of all, behind them."""
        if isinstance(masks, int):
            masks = torch.full_like(self.anchors, masks)
        return torch.cat([tokens, masks.to(tokens.dtype)], 1)

    def places(self, length: int) -> Tensor:
        """Of each position [B, T + M] the one of the sequence that it stands for."""
        own = torch.arange(length, device=self.anchors.device).expand(len(self.anchors), length)
        return torch.cat([own, (self.anchors + self.offsets).clamp(0, length - 1)], 1)

    def seen(self, positions: Tensor) -> Tensor:
        """What each position sees, bool [B, 1, T + M, T + M]; `positions` [B, T] begin anew with each document."""
        length = positions.shape[1]
        own = torch.arange(length, device=positions.device).expand_as(positions)
        ends, depths = torch.cat([own, self.anchors], 1), torch.cat([torch.zeros_like(own), self.offsets], 1)
        documents = (positions == 0).cumsum(1).gather(1, ends)
        query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
        is_token = torch.arange(ends.shape[1], device=ends.device) < length
        tokens = (documents[query] == documents[key]) & (ends[key] <= ends[query]) & is_token
        chain = (ends[query] == ends[key]) & (depths[key] <= depths[query]) & ~is_token & ~is_token[:, None]
        return (tokens | chain)[:, None]

    def by_place(self, values: Tensor, trained: Tensor, tokens: int) -> Tensor:
        """`values` [B, T + M] as [B, T, tokens]: of the token next to each position, and of those that its chain is
        for; NaN where there is none or, by `trained` [B, T], it is not one that counts.
        """
        length = trained.shape[1]
        nothing = torch.full_like(values[:, :1], torch.nan)
        table = nothing.expand(-1, length * tokens + 1).clone()
        places = torch.where(self.offsets > 0, self.anchors * tokens + self.offsets, length * tokens)
        table.scatter_(1, places, values[:, length:])
        table = table[:, :-1].unflatten(1, (length, tokens))
        table[..., 0] = torch.where(trained, values[:, :length], torch.nan)
        return table


def lay_out(
    ids: NDArray[Any],
    positions: NDArray[Any],
    trained: NDArray[Any],
    parallel: Parallel,
    keep: float,
    seed: tuple[int, ...],
) -> Chains:
    """Chains behind the rows [B, T] of a micro-batch that is still on the host.

    A chain stands after each position with a `trained` label, and goes on as long as all labels up to the one that it
    is for are, within the document. What is dropped depends on `seed` and a row's own ids: not on its place among rows
    and ranks.
    """
    rows = []
    for row, starts, labels in zip(ids, positions, trained.astype(bool), strict=True):
        drawn = np.random.default_rng([*seed, zlib.crc32(np.ascontiguousarray(row).tobytes())])
        deepest = np.full(len(row), parallel.tokens - 1.0)
        if keep < 1:  # at least k with probability keep^k
            deepest = np.minimum(deepest, np.log(1 - drawn.random(len(row))) // np.log(keep))
        depths = np.minimum(_run_lengths(starts, labels) - 1, deepest).clip(0).astype(np.int64)
        anchors = np.repeat(np.arange(len(row)), depths)
        first = np.repeat(np.cumsum(depths) - depths, depths)
        rows.append((anchors, np.arange(len(anchors)) - first + 1))
    width = -(-max(1, *(len(anchors) for anchors, _ in rows)) // _STEP) * _STEP
    laid = np.full((2, len(rows), width), -1)
    laid[0] = ids.shape[1] - 1
    for i, row in enumerate(rows):
        laid[:, i, : len(row[0])] = row
    anchors, offsets = torch.from_numpy(laid)
    return Chains(anchors, offsets, sum(len(row[0]) for row in rows), parallel.mask_id)


def _run_lengths(positions: NDArray[Any], trained: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each position how many labels in a row are trained from it on, within its document."""
    place = np.arange(len(trained))
    ends = ~trained | np.append(positions[1:] == 0, True)  # the last one of a run, or none of one
    following = np.minimum.accumulate(np.where(ends, place, len(trained))[::-1])[::-1]
    return np.where(trained, following - place + np.where(trained[following], 1, 0), 0)
