"""The global order: a permutation, the same for every world size, with exact shares of a mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_shards import BlockOrder, GlobalOrder, MixtureOrder


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_order_is_a_permutation(size, seed, epoch):
    order = GlobalOrder(size, seed, epoch)
    assert sorted(order[np.arange(size)].tolist()) == list(range(size))


def test_one_position_and_many_agree_far_into_a_huge_order():
    order = GlobalOrder(600_000_000_000, seed=1)
    positions = np.array([0, 1, 2**31, 599_999_999_999])
    assert [order[int(i)] for i in positions] == order[positions].tolist()
    assert len(set(order[np.arange(100_000)].tolist())) == 100_000


def test_seed_and_epoch_change_the_order():
    orders = [GlobalOrder(1000, seed, epoch)[np.arange(1000)].tolist() for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_where_a_sample_lands_is_uniform():
    """Over 4,000 seeds sample 0 of 20 is equally often at each position."""
    where = [GlobalOrder(20, seed)[np.arange(20)].tolist().index(0) for seed in range(4000)]
    assert stats.chisquare(np.bincount(where, minlength=20)).pvalue > 1e-4


def test_neighbours_are_independent():
    values = GlobalOrder(100_003, seed=5)[np.arange(100_003)]
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_is_an_error(position):
    with pytest.raises(IndexError):
        GlobalOrder(10, seed=0)[position]


@given(size=st.integers(1, 5000), block=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_block_order_is_a_permutation_that_needs_each_block_in_one_window_only(size, block, seed, epoch):
    order = BlockOrder(size, seed, epoch, block=block)[np.arange(size)]
    assert sorted(order.tolist()) == list(range(size))
    window = BlockOrder.WINDOW * block
    met = [set((order[at : at + window] // block).tolist()) for at in range(0, size, window)]
    assert max(map(len, met)) <= BlockOrder.WINDOW + 1  # the last may hold a short block too
    assert sum(map(len, met)) == len(set().union(*met))


def test_a_block_order_leaves_no_neighbours_together():
    """10 of 6,400 samples in a window are of the same block: neighbours in the order are so by chance alone."""
    order = BlockOrder(50_000, seed=3, block=100)[np.arange(50_000)]
    together = np.mean(order[1:] // 100 == order[:-1] // 100)
    assert together == pytest.approx(1 / BlockOrder.WINDOW, abs=0.004)
    assert BlockOrder(50_000, seed=3, epoch=1, block=100)[np.arange(100)].tolist() != order[:100].tolist()


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=3), positions=st.integers(0, 3500))
@settings(max_examples=40, deadline=None)
def test_what_was_drawn_of_each_source_is_what_the_order_gave(weights, positions):
    mixture = MixtureOrder([7] * len(weights), weights, seed=1)
    sources, _ = mixture.locate(np.arange(positions))
    assert mixture.drawn(positions) == np.bincount(sources, minlength=len(weights)).tolist()


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_mixture_has_exact_shares_and_whole_epochs(sizes, weights, seed):
    weights = weights[: len(sizes)]
    mixture = MixtureOrder(sizes, weights, seed)
    sources, samples = mixture.locate(np.arange(3 * MixtureOrder.BLOCK))
    for source, size in enumerate(sizes):
        drawn = samples[sources == source]
        share = weights[source] / sum(weights)
        assert abs(len(drawn) - 3 * MixtureOrder.BLOCK * share) <= 3
        counts = np.bincount(drawn, minlength=size)
        # Whole epochs, but for the block in which one ends and the next begins.
        assert counts.max() - counts.min() <= 2
        assert len(counts) == size


def test_a_single_source_is_read_once_per_epoch_in_its_own_order():
    sources, samples = MixtureOrder([37], [1.0], seed=4).locate(np.arange(74))
    assert not sources.any()
    assert sorted(samples[:37].tolist()) == sorted(samples[37:].tolist()) == list(range(37))
    assert samples[:37].tolist() != samples[37:].tolist()
