"""The texts that are decoded together: which prompt is in which row, how far it is, and which wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.decoding.cache import RowReader

_STEPS = {"cpu": (1, 1)}
"""Rows and slots are rounded up to multiples of these; on other devices to larger ones."""


@dataclass
class Generated:
    """What came out for each prompt: `tokens`, at most `max_new_tokens`, with the end-of-sequence id if one was drawn;
    and `blocks`, the number of tokens that each call of the target gave, 1 to gamma + 1.

    The last block counts in full, also where the text ended within it, by its end-of-sequence id or by
    `max_new_tokens`: how many drafts the target accepts does not depend on where a text is cut, and servers count so.
    `confidences`: of each block the drafter's confidence in each of its gamma drafts, where they are recorded.
    """

    tokens: list[list[int]]
    blocks: list[list[int]]
    confidences: list[list[list[float]]]


class Rows:
    """Sequences in rows 0 to `active` - 1 of a rectangle on the device, and the prompts that wait, longest first.

    The host knows lengths and texts from what `commit` is told, so that it asks the device for nothing. `count` rows
    and `width` slots are what a pass goes over: those in use, rounded up on a GPU to a few sizes, for which its kernels
    can be compiled or recorded once. What rows beyond `active` hold is of no meaning.

    `seeds`: of each prompt what numpy's generator takes, or None where nothing is drawn. Its chances, for each token
    2 gamma + 1, are its own: neighbours and the size of the batch do not change them. `limits`: the most tokens of
    each.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        size: int | None,
        gamma: int,
        limits: Sequence[int],
        eos_ids: Sequence[int],
        seeds: Sequence[Any] | None,
        device: torch.device,
    ) -> None:
        if not prompts or min(map(len, prompts)) < 1:
            raise ValueError("every prompt needs at least one token")
        self._prompts, self._gamma, self._limits, self._seeds = prompts, gamma, limits, seeds
        self._eos = frozenset(eos_ids)
        self.size = min(size or len(prompts), len(prompts))
        self.slots = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + gamma + 1
        self._steps = _STEPS.get(device.type, (8, 128))
        self.active = self.count = self.width = 0
        # Neighbours of like length: little padding, and the caches are read no further than needed.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self._tokens = torch.zeros(self.size, self.slots, dtype=torch.long, device=device)
        self._lengths, self._block = torch.ones(2, self.size, dtype=torch.long, device=device)
        blocks = max(limits) if seeds is not None else 1
        self._chances = torch.zeros(self.size, blocks, 2 * gamma + 1, dtype=torch.float64, device=device)
        self._who: list[int] = []
        self.found = Generated([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
        self._noted: list[tuple[list[int], Tensor]] = []

    def fill(self, readers: Sequence[RowReader]) -> bool:
        """Let waiting prompts in, several at a time, and read them; whether there is anything to decode."""
        free = self.size - self.active
        if self._waiting and free >= max(1, self.size // 8):
            self._enter([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))], readers)
        if self.active:
            longest = max(len(self._prompts[who]) + len(self.found.tokens[who]) for who in self._who)
            self.count = _rounded(self.active, self._steps[0], self.size)
            self.width = _rounded(longest + self._gamma, self._steps[1], self.slots)
        return self.active > 0

    def window(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens of each row and their positions, [B, count]; negative ones are not there."""
        lengths = self._lengths[: self.count]
        positions = lengths[:, None] - count + torch.arange(count, device=lengths.device)
        return self._tokens[: self.count].gather(1, positions.clamp_min(0)), positions

    def chances(self) -> Tensor:
        """Uniform random numbers [B, 2 gamma + 1] in [0, 1) for the block that comes."""
        block = self._block[: self.count, None, None].expand(-1, 1, self._chances.shape[2])
        return self._chances[: self.count].gather(1, block)[:, 0]

    def commit(
        self, block: Tensor, accepted: Tensor, told: Sequence[Sequence[int]], readers: Sequence[RowReader]
    ) -> None:
        """Add the first `accepted` [B] + 1 tokens of `block` [B, gamma + 1] to each row; take out what is finished.

        `told`: the same, as the host read it: of each row its block, and how many of it were accepted.
        """
        mine = slice(self.count)
        place = torch.arange(block.shape[1], device=block.device)
        # What lies beyond the accepted ones is overwritten by the next block.
        self._tokens[mine].scatter_(1, self._lengths[mine, None] + place, block)
        # Rows of no meaning stay within the rectangle.
        self._lengths[mine] = (self._lengths[mine] + accepted + 1).clamp_max(self.slots - self._gamma - 1)
        self._block[mine] = (self._block[mine] + 1).clamp_max(self._chances.shape[1] - 1)
        finished = [row for row in range(self.active) if self._write(self._who[row], told[row])]
        if finished:
            self._leave(finished, readers)

    def note(self, confidences: Tensor) -> None:
        """Keep the drafter's confidences [B, gamma] of the block that is committed next until the end."""
        self._noted.append((list(self._who), confidences[: self.active]))

    def finish(self) -> Generated:
        """What was found."""
        for rows, confidences in self._noted:
            for who, row in zip(rows, confidences.tolist(), strict=True):
                self.found.confidences[who].append(row)
        return self.found

    def _write(self, who: int, told: Sequence[int]) -> bool:
        """Keep what a block gave to a text; whether that ends it."""
        *block, accepted = told
        text, new = self.found.tokens[who], block[: accepted + 1]
        self.found.blocks[who].append(len(new))
        new = new[: self._limits[who] - len(text)]
        ends = [place for place, token in enumerate(new) if token in self._eos]
        text += new[: ends[0] + 1] if ends else new
        return bool(ends) or len(text) == self._limits[who]

    def _enter(self, new: list[int], readers: Sequence[RowReader]) -> None:
        device = self._tokens.device
        rows = slice(self.active, self.active + len(new))
        lengths = [len(self._prompts[i]) for i in new]
        width = max(lengths)
        ids = torch.tensor([[*self._prompts[i], *[0] * (width - len(self._prompts[i]))] for i in new]).to(device)
        self._tokens[rows, :width] = ids
        self._lengths[rows] = torch.tensor(lengths).to(device)
        self._block[rows] = 0
        if self._seeds is not None:
            drawn = [np.random.default_rng(self._seeds[i]).random(self._chances.shape[1:]) for i in new]
            self._chances[rows] = torch.from_numpy(np.stack(drawn)).to(device)
        index = torch.arange(rows.start, rows.stop, device=device)
        for reader in readers:  # the last token is read with the first block
            reader.prefill(index, ids[:, : width - 1])
        self.active += len(new)
        self._who += new

    def _leave(self, finished: list[int], readers: Sequence[RowReader]) -> None:
        """The last rows take the places of those that are finished."""
        self.active -= len(finished)
        gone = set(finished)
        sources = [row for row in range(self.active, self.active + len(finished)) if row not in gone]
        targets = [row for row in finished if row < self.active]
        for source, target in zip(sources, targets, strict=True):
            self._who[target] = self._who[source]
        del self._who[self.active :]
        if not targets:
            return
        of, to = torch.tensor([sources, targets]).to(self._tokens.device)
        for state in (self._tokens, self._lengths, self._block, self._chances):
            state[to] = state[of]
        for reader in readers:
            reader.move(of, to, self.width)


def _rounded(value: int, step: int, most: int) -> int:
    return min(-(-value // step) * step, most)
