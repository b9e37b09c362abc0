"""Batched speculative decoding (Leviathan et al., 2023; Chen et al., 2023), lossless for every row.

Rows of a batch accept different numbers of tokens and end at different times. Their caches let each advance on its own
(`cache.RowReader`), and prompts that wait take the places of those that are finished, so that a batch stays full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.decoding.cache import RowReader
from dist_train.losses.head import working_dtype


@dataclass
class Generated:
    """What came out for each prompt: `tokens`, at most `max_new_tokens`, with the end-of-sequence id if one was drawn;
    and `blocks`, the number of tokens that each call of the target gave, 1 to gamma + 1.

    The last block counts in full, also where the text ended within it, by its end-of-sequence id or by
    `max_new_tokens`: how many drafts the target accepts does not depend on where a text is cut, and servers count so.
    """

    tokens: list[list[int]]
    blocks: list[list[int]]


@torch.inference_mode()
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
    batch_size: int | None = None,
) -> Generated:
    """Continue prompts (token ids, of any lengths, at least one each) with the target's own distribution.

    `drafter` and `target` are Hugging Face causal language models of one vocabulary; without a drafter, or with gamma
    0, this is plain decoding. Temperature 0 is greedy. The drafter samples under the same temperature and top-p, or,
    with `draft_greedily`, takes its likeliest token, as servers do by default. `batch_size` prompts are decoded at a
    time (None: all). The random numbers of a prompt are its own, from `seed` and its place in `input_ids`: batch size
    and neighbours do not change them.
    """
    gamma = gamma if drafter is not None else 0
    batch = _Batch(input_ids, batch_size, gamma, max_new_tokens, eos_ids, None if temperature == 0 else seed, target)
    target_reader = RowReader(target, batch.size, batch.slots)
    drafter_reader = RowReader(drafter, batch.size, batch.slots) if gamma else None
    readers = [target_reader, drafter_reader] if drafter_reader else [target_reader]
    sampled = temperature > 0 and not draft_greedily
    while batch.fill(readers):
        chances = batch.chances()  # gamma to draft with, gamma to accept with, one for the token after
        block, positions = batch.window(1)
        drafted: list[Tensor] = []
        if drafter_reader:
            # A draft accepted last has not been read by its drafter: it always reads the last two anew.
            tokens, at = batch.window(2)
            for k in range(gamma):
                logits = drafter_reader.read(tokens, at, batch.longest + k, keep=1)[:, -1]
                if sampled:
                    drafted.append(warp(logits, temperature, top_p))
                    tokens = _draw(drafted[-1], chances[:, k])[:, None]
                else:
                    tokens = logits.argmax(-1, keepdim=True)
                at = at[:, -1:] + 1
                block, positions = torch.cat([block, tokens], 1), torch.cat([positions, at], 1)
        logits = target_reader.read(block, positions, batch.longest + gamma)
        for reader in readers:
            reader.refuse_nan()
        if temperature == 0:
            accepted, extra = _verify_greedy(block[:, 1:], logits.argmax(-1))
        else:
            q = warp(logits, temperature, top_p)
            accepted, extra = _verify(block[:, 1:], drafted, q, chances[:, gamma:])
        batch.append(block[:, 1:], accepted, extra, readers)
    return Generated(batch.tokens_out, batch.blocks_out)


def warp(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [..., V], fp32 or better, after temperature and nucleus; at temperature 0 all on the likeliest."""
    logits = logits.to(working_dtype(logits))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = torch.softmax(logits / temperature, -1)
    return _nucleus(probabilities, top_p) if top_p < 1 else probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens that together reach `top_p`. A nucleus is mostly small: sort no more than it takes."""
    vocab_size = probabilities.shape[-1]
    count = min(vocab_size, 64)
    while True:
        ordered, order = probabilities.topk(count, -1)
        reached = ordered.cumsum(-1)
        if count == vocab_size or bool((reached[..., -1] >= top_p).all()):
            break
        count = min(vocab_size, 8 * count)
    # A token stays while those before it fall short.
    kept = ordered.masked_fill(reached - ordered >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))


def _verify_greedy(drafts: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """How many `drafts` [B, gamma] are the target's likeliest, `best` [B, gamma + 1]; and its own token then, [B]."""
    accepted = (drafts == best[:, :-1]).long().cumprod(-1).sum(-1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def _verify(drafts: Tensor, p: Sequence[Tensor], q: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row accepts [B], and the token drawn after them [B].

    A draft x is accepted with probability min(1, q(x)/p(x)); the first rejected one is replaced by a draw from
    max(q - p, 0), and if all are accepted one more comes from q. `drafts` [B, gamma]; `p` gamma times [B, V], or
    nothing where each draft was its drafter's certain choice; `q` [B, gamma + 1, V]; `chances` [B, gamma + 1] below 1.
    """
    rows, gamma = drafts.shape
    row = torch.arange(rows, device=q.device)
    accepted = torch.zeros_like(row)
    if gamma:
        q_drafts = q[:, :-1].gather(-1, drafts[..., None])[..., 0]
        p_drafts = torch.ones_like(q_drafts)
        if p:
            p_drafts = torch.stack([p[k].gather(-1, drafts[:, k : k + 1])[:, 0] for k in range(gamma)], 1)
        accepted = (chances[:, :-1] * p_drafts < q_drafts).long().cumprod(-1).sum(-1)
    q_next = q[row, accepted]
    residual = q_next.clone()
    for k in range(gamma):
        here = (accepted == k).nonzero()[:, 0]
        if p:
            residual[here] = (q_next[here] - p[k][here]).clamp_min_(0)
        else:
            residual[here, drafts[here, k]] = 0
    # Rounding can leave nothing of a rejected token's residual; its limit is then q.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q_next)
    return accepted, _draw(residual, chances[:, -1])


def _draw(weights: Tensor, chance: Tensor) -> Tensor:
    """One token [B] of each row of unnormalised probabilities [B, V], by inversion of `chance` [B] in [0, 1).

    Of NaN any token. In float64, where neither the sum over a vocabulary nor the chance rounds a rare token away.
    """
    reached = weights.double().cumsum(-1)
    total = reached[:, -1:]
    # Below the total even where the product rounds up to it: a token of probability 0 is never the first beyond.
    point = torch.minimum(chance[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, point, right=True)[:, 0].clamp_max(weights.shape[-1] - 1)


class _Batch:
    """The sequences being decoded, in rows 0 to `active` - 1, and the prompts that wait, longest first."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        size: int | None,
        gamma: int,
        limit: int,
        eos_ids: Sequence[int],
        seed: int | None,
        model: Any,
    ) -> None:
        if not prompts or min(map(len, prompts)) < 1:
            raise ValueError("every prompt needs at least one token")
        device = model.device
        self._prompts, self._gamma, self._limit, self._seed = prompts, gamma, limit, seed
        self.size = min(size or len(prompts), len(prompts))
        self.slots = max(map(len, prompts)) + limit + gamma + 1
        self.active, self.longest = 0, 0
        # Neighbours of like length: little padding, and the caches are read no further than needed.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self._tokens = torch.zeros(self.size, self.slots, dtype=torch.long, device=device)
        self._lengths, self._stops, self._block = torch.zeros(3, self.size, dtype=torch.long, device=device)
        self._chances = torch.zeros(self.size, limit, 2 * gamma + 1, dtype=torch.float64, device=device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self._who: list[int] = []
        self.tokens_out: list[list[int]] = [[] for _ in prompts]
        self.blocks_out: list[list[int]] = [[] for _ in prompts]

    def fill(self, readers: Sequence[RowReader]) -> bool:
        """Let waiting prompts in, several at a time, and read them; whether there is anything to decode."""
        free = self.size - self.active
        if self._waiting and free >= max(1, self.size // 8):
            new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._enter(new, readers)
        if self.active:
            self.longest = int(self._lengths[: self.active].max())
        return self.active > 0

    def _enter(self, new: list[int], readers: Sequence[RowReader]) -> None:
        rows = torch.arange(self.active, self.active + len(new), device=self._tokens.device)
        lengths = [len(self._prompts[i]) for i in new]
        width = max(lengths)
        ids = torch.tensor([[*self._prompts[i], *[0] * (width - len(self._prompts[i]))] for i in new]).to(rows.device)
        self._tokens[rows, :width] = ids
        self._lengths[rows] = torch.tensor(lengths, device=rows.device)
        self._stops[rows] = self._lengths[rows] + self._limit
        self._block[rows] = 0
        if self._seed is not None:
            drawn = [np.random.default_rng([self._seed, i]).random(self._chances.shape[1:]) for i in new]
            self._chances[rows] = torch.from_numpy(np.stack(drawn)).to(rows.device)
        self.active += len(new)
        self._who += new
        for reader in readers:  # the last token is read with the first block
            reader.prefill(rows, ids[:, : width - 1])

    def window(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens of each row and their positions; negative ones are not there."""
        lengths = self._lengths[: self.active]
        positions = lengths[:, None] - count + torch.arange(count, device=lengths.device)
        return self._tokens[: self.active].gather(1, positions.clamp_min(0)), positions

    def chances(self) -> Tensor:
        """Uniform random numbers [B, 2 gamma + 1] in [0, 1) for the block that comes."""
        rows = torch.arange(self.active, device=self._tokens.device)
        return self._chances[rows, self._block[: self.active]]

    def append(self, drafts: Tensor, accepted: Tensor, extra: Tensor, readers: Sequence[RowReader]) -> None:
        """Add each row's accepted drafts and the token after them; take out what is finished."""
        mine = slice(self.active)
        place = torch.arange(drafts.shape[1] + 1, device=drafts.device)
        block = torch.cat([drafts, extra[:, None]], 1).scatter(1, accepted[:, None], extra[:, None])
        # What lies beyond the accepted ones is overwritten by the next block.
        self._tokens[mine].scatter_(1, self._lengths[mine, None] + place, block)
        ended = (torch.isin(block, self._eos) & (place <= accepted[:, None])).any(1)
        self._lengths[mine] += accepted + 1
        self._block[mine] += 1
        finished = ended | (self._lengths[mine] >= self._stops[mine])
        for who, count in zip(self._who, (accepted + 1).tolist(), strict=True):
            self.blocks_out[who].append(count)
        for row in reversed(finished.nonzero()[:, 0].tolist()):
            self._leave(row, readers)

    def _leave(self, row: int, readers: Sequence[RowReader]) -> None:
        """Keep what `row` has written; the last row takes its place."""
        who, length = self._who[row], int(self._lengths[row])
        first = len(self._prompts[who])
        written = self._tokens[row, first : min(length, first + self._limit)]
        ends = torch.isin(written, self._eos).nonzero()[:, 0]
        self.tokens_out[who] = (written[: int(ends[0]) + 1] if len(ends) else written).tolist()
        self.active -= 1
        last = self._who.pop()
        if row < self.active:
            self._who[row] = last
            for state in (self._tokens, self._lengths, self._stops, self._block, self._chances):
                state[row] = state[self.active]
            for reader in readers:
                reader.move(self.active, row)
