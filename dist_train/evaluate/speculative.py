"""Batched speculative decoding (Leviathan et al., 2023; Chen et al., 2023), lossless for every row.

Rows of a batch accept different numbers of tokens. Their key-value caches are kept rectangular by never taking
anything out: every token read occupies a slot, and slots of rejected tokens are masked for good. `_Reader.compact`
squeezes them out when they are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_train.losses.head import working_dtype


@dataclass
class Generated:
    """What came out for each prompt: `tokens`, at most `max_new_tokens`, with the end-of-sequence id if one was drawn;
    and `blocks`, the number of tokens that each call of the target gave, 1 to gamma + 1. The last block counts in full
    also where it went beyond `max_new_tokens`, but not beyond the end of the sequence.
    """

    tokens: list[list[int]]
    blocks: list[list[int]]


@torch.no_grad()
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
) -> Generated:
    """Continue prompts (token ids, of any lengths, at least one each) with the target's own distribution.

    `drafter` and `target` are Hugging Face causal language models of one vocabulary; without a drafter, or with gamma
    0, this is plain decoding. Temperature 0 is greedy. The drafter samples under the same temperature and top-p, or,
    with `draft_greedily`, takes its likeliest token, as servers do by default.
    """
    if drafter is None:
        gamma = 0
    state = _Rows(input_ids, max_new_tokens + gamma + 1, target.device, eos_ids, max_new_tokens)
    generator = torch.Generator(target.device).manual_seed(seed)
    target_reader = _Reader(target)
    drafter_reader = _Reader(drafter) if gamma else None
    # The last token of a prompt is read with the first block; the drafter always reads the last two anew.
    target_reader.read(*state.up_to(state.lengths - 1))
    if drafter_reader:
        drafter_reader.read(*state.up_to(state.lengths - 2))

    while len(state.rows):
        drafts, p = [], []
        if drafter_reader:
            drafter_reader.forget_from(state.lengths - 2)
            tokens, positions = state.window(state.lengths - 2, 2)
            for _ in range(gamma):
                logits = drafter_reader.read(tokens, positions)[:, -1]
                p.append(warp(logits, 0.0 if draft_greedily else temperature, top_p))
                tokens, positions = _draw(p[-1], generator), positions[:, -1:] + 1
                drafts.append(tokens)
        target_reader.forget_from(state.lengths - 1)
        last, position = state.window(state.lengths - 1, 1)
        block = torch.cat([last, *drafts], 1)
        positions = position + torch.arange(gamma + 1, device=position.device)
        q = warp(target_reader.read(block, positions), temperature, top_p)
        accepted, extra = _verify(block[:, 1:], p, q, generator)
        finished = state.append(block[:, 1:], accepted, extra)
        if finished.any():
            state.select(~finished)
            target_reader.select(~finished)
            if drafter_reader:
                drafter_reader.select(~finished)
    return Generated(state.tokens_out, state.blocks_out)


def warp(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [..., V], fp32 or better, after temperature and nucleus; at temperature 0 all on the likeliest."""
    logits = logits.to(working_dtype(logits))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # Keep the fewest tokens that together reach top_p: a token stays while those before it fall short.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _verify(drafts: Tensor, p: Sequence[Tensor], q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row accepts [B], and the token drawn after them [B].

    A draft x is accepted with probability min(1, q(x)/p(x)); the first rejected one is replaced by a draw from
    max(q - p, 0), and if all are accepted one more comes from q. `drafts` [B, gamma]; `p` gamma times [B, V];
    `q` [B, gamma + 1, V].
    """
    rows, gamma = drafts.shape
    if gamma == 0:
        return torch.zeros(rows, dtype=torch.long, device=q.device), _draw(q[:, 0], generator)[:, 0]
    p_all = torch.stack(list(p), 1)
    q_drafts = q[:, :-1].gather(-1, drafts[..., None])[..., 0]
    p_drafts = p_all.gather(-1, drafts[..., None])[..., 0]
    chance = torch.rand(drafts.shape, generator=generator, device=q.device, dtype=q.dtype)
    accepted = (chance * p_drafts < q_drafts).long().cumprod(-1).sum(-1)
    row = torch.arange(rows, device=q.device)
    q_next = q[row, accepted]
    p_next = torch.nn.functional.pad(p_all, (0, 0, 0, 1))[row, accepted]  # zeros after the last draft: q itself
    residual = (q_next - p_next).clamp_min(0)
    # Rounding can leave nothing of a rejected token's residual; its limit is then q.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q_next)
    return accepted, _draw(residual, generator)[:, 0]


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One token [B, 1] of each row of unnormalised probabilities [B, V]."""
    return torch.multinomial(weights, 1, generator=generator)


class _Rows:
    """The sequences of a batch; `rows` are the prompts still going on."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], room: int, device: torch.device, eos_ids: Sequence[int], limit: int
    ) -> None:
        if not prompts or min(map(len, prompts)) < 1:
            raise ValueError("every prompt needs at least one token")
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.tokens = torch.zeros(len(prompts), int(self.lengths.max()) + room, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.rows = torch.arange(len(prompts))
        self.tokens_out: list[list[int]] = [[] for _ in prompts]
        self.blocks_out: list[list[int]] = [[] for _ in prompts]
        self._eos_ids, self._limit = set(eos_ids), limit

    def window(self, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` tokens of each row from position `first` [B], and their positions; negative ones are not there."""
        positions = first[:, None] + torch.arange(count, device=first.device)
        return self.tokens.gather(1, positions.clamp_min(0)), positions

    def up_to(self, stop: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens before position `stop` [B] and their positions, aligned right."""
        width = max(int(stop.max()), 0)
        return self.window(stop - width, width)

    def append(self, drafts: Tensor, accepted: Tensor, extra: Tensor) -> Tensor:
        """Add each row's accepted drafts and the token after them; which rows are finished, [B]."""
        block = torch.cat([drafts, extra[:, None]], 1)
        block[torch.arange(len(block)), accepted] = extra
        finished = []
        for row, (tokens, count) in enumerate(zip(block.tolist(), (accepted + 1).tolist(), strict=True)):
            ends = [i for i, token in enumerate(tokens[:count]) if token in self._eos_ids]
            count = ends[0] + 1 if ends else count
            prompt, length = int(self.rows[row]), int(self.lengths[row])
            self.tokens[row, length : length + count] = block[row, :count]
            self.tokens_out[prompt] += tokens[:count]
            self.blocks_out[prompt].append(count)
            finished.append(bool(ends) or len(self.tokens_out[prompt]) >= self._limit)
            del self.tokens_out[prompt][self._limit :]
        self.lengths = self.lengths + accepted + 1
        return torch.tensor(finished, device=self.tokens.device)

    def select(self, going_on: Tensor) -> None:
        """Drop the finished rows."""
        self.tokens, self.lengths = self.tokens[going_on], self.lengths[going_on]
        self.rows = self.rows[going_on.cpu()]


class _Reader:
    """A model and its cache of what it has read: slots, each with a position and whether it still counts."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache()
        self._positions: Tensor | None = None
        self._counts: Tensor | None = None

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, n, V] after each of `tokens` [B, n]; those at negative positions are not there."""
        there = positions >= 0
        if self._positions is None or self._counts is None:
            self._positions, self._counts = positions, there
        else:
            self._positions = torch.cat([self._positions, positions], 1)
            self._counts = torch.cat([self._counts, there], 1)
        if not tokens.shape[1]:
            return torch.empty(0)
        return self._model(
            input_ids=tokens,
            position_ids=positions.clamp_min(0),
            attention_mask=self._counts.long(),
            past_key_values=self._cache,
            use_cache=True,
        ).logits

    def forget_from(self, position: Tensor) -> None:
        """What was read at `position` [B] or later was rejected or will be read anew."""
        assert self._positions is not None and self._counts is not None
        self._counts = self._counts & (self._positions < position[:, None])
        most = int(self._counts.sum(1).max())
        if self._counts.shape[1] > 2 * most + 32:
            self._compact(most)

    def select(self, rows: Tensor) -> None:
        """Keep the rows where the mask `rows` [B] is set."""
        assert self._positions is not None and self._counts is not None
        self._positions, self._counts = self._positions[rows], self._counts[rows]
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(rows.nonzero()[:, 0])

    def _compact(self, width: int) -> None:
        """Move the slots that count to the front of every row, in order, and cut the rest off."""
        assert self._positions is not None and self._counts is not None
        order = (~self._counts).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        self._positions, self._counts = self._positions.gather(1, order), self._counts.gather(1, order)
        layer: Any
        for layer in self._cache.layers:
            where = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, where), layer.values.gather(2, where)
