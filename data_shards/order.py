"""The order in which samples are seen: a keyed permutation that is known at every point without being stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 8


class GlobalOrder:
    """A pseudo-random permutation of `range(num_samples)`: `order[i]` for an int or an array of them.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it lands inside the
    range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no memory, no set-up, at most four times
    the work of one pass on average. The round keys are a hash of seed and epoch.
    """

    def __init__(self, num_samples: int, seed: int | str, epoch: int = 0) -> None:
        if num_samples < 1:
            raise ValueError(f"an order of {num_samples} samples")
        self.num_samples = num_samples
        half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half_bits)
        self._low = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __len__(self) -> int:
        """Number of samples."""
        return self.num_samples

    def __getitem__(self, i: int | npt.ArrayLike) -> Any:
        """The sample at position `i`: an int for an int, an int64 array for an array."""
        position = np.asarray(i)
        if position.size and (position.min() < 0 or position.max() >= self.num_samples):
            raise IndexError(f"position outside of {self.num_samples} samples")
        values = np.atleast_1d(position).astype(np.uint64)
        values = self._encrypt(values)
        while len(outside := np.flatnonzero(values >= self.num_samples)):
            values[outside] = self._encrypt(values[outside])
        return int(values[0]) if position.ndim == 0 else values.astype(np.int64).reshape(position.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return (left << self._half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BlockOrder:
    """A permutation of `range(num_samples)` that reads a parallel file system in blocks instead of single samples.

    `block` neighbouring samples are a block. The blocks are permuted, and the samples of `WINDOW` blocks at a time are
    permuted among each other: whoever reads positions in order needs `WINDOW` blocks at a time and each of them once.
    A corpus of one window is permuted whole. No memory, no set-up; the last, short block stays in the last window.
    """

    WINDOW = 64

    def __init__(self, num_samples: int, seed: int | str, epoch: int = 0, *, block: int = 1) -> None:
        self.num_samples, self.block = num_samples, block
        self._key, self._window = f"{seed}/{epoch}", self.WINDOW * block
        self._whole = GlobalOrder(num_samples, seed, epoch) if num_samples <= self._window else None
        self._num_blocks = num_samples // block  # whole ones
        self._blocks = GlobalOrder(max(self._num_blocks, 1), self._key)

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The samples at an array of positions."""
        if self._whole is not None:
            return np.asarray(self._whole[positions], dtype=np.int64)
        windows, within = np.divmod(positions, self._window)
        for window in np.unique(windows):
            here = windows == window
            size = min(self._window, self.num_samples - int(window) * self._window)
            within[here] = GlobalOrder(size, self._key, int(window) + 1)[within[here]]
        blocks, offsets = np.divmod(windows * self._window + within, self.block)
        whole = blocks < self._num_blocks
        blocks[whole] = self._blocks[blocks[whole]]
        return blocks * self.block + offsets


class MixtureOrder:
    """Which source fills a position of the global sequence of samples, and with which of its samples.

    Positions are cut into blocks of `BLOCK`; in every block each source has its exact share (largest remainder), at
    positions permuted by the seed; a source's samples follow its own `BlockOrder`, anew in each of its epochs. Every
    answer is a function of the position alone, so there is nothing to save and nothing that depends on the world size.
    `blocks`: for each source, the neighbouring samples that are read at once.
    """

    BLOCK = 1000

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], seed: int, blocks: Sequence[int] | None = None
    ) -> None:
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError("a mixture needs a weight above 0 and at least one sample for each source")
        self.sizes, self.seed = list(sizes), seed
        self._read_blocks = list(blocks) if blocks else [1] * len(sizes)
        self.counts = _largest_remainder(weights, self.BLOCK)
        if min(self.counts) == 0:
            raise ValueError(f"a weight below 1/{self.BLOCK} of the mixture never gets a sample")
        self._starts = np.cumsum([0, *self.counts])

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(source, sample within the source) at each position, two int64 arrays of the positions' shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.sizes) == 1:
            return np.zeros_like(positions), self._samples(0, self.sizes[0], positions)
        blocks, slots = np.divmod(positions, self.BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            slots[here] = GlobalOrder(self.BLOCK, self.seed, int(block))[slots[here]]
        sources = np.searchsorted(self._starts, slots, side="right").astype(np.int64) - 1
        samples = np.empty_like(positions)
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            mine = sources == source
            drawn = blocks[mine] * count + slots[mine] - self._starts[source]
            samples[mine] = self._samples(source, size, drawn)
        return sources, samples

    def drawn(self, positions: int) -> list[int]:
        """How many samples of each source the first `positions` positions hold; over the size, that is its epochs."""
        whole, rest = divmod(positions, self.BLOCK)
        sources, _ = self.locate(whole * self.BLOCK + np.arange(rest))
        last = np.bincount(sources, minlength=len(self.sizes))
        return [whole * count + int(more) for count, more in zip(self.counts, last, strict=True)]

    def _samples(self, source: int, size: int, drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, within = np.divmod(drawn, size)
        found = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            # Sources of equal size must not walk in step: the source is part of the seed.
            seed, block = self.seed * 1_000_003 + source + 1, self._read_blocks[source]
            order = BlockOrder(size, seed, int(epoch), block=block)
            found[here] = order[within[here]]
        return found


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    shares = np.array(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(int)
    for source in np.argsort(counts - shares, kind="stable")[: total - counts.sum()]:
        counts[source] += 1
    return [int(count) for count in counts]
