"""The global order: a permutation, the same for every world size, with exact shares of a mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_shards import DataError, Encoding, GlobalOrder, MixtureOrder, ShardedTokens, ShardWriter, Source, TokenLoader


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


# -- the loader -------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path):
    """Two corpora whose tokens tell where they come from."""
    found = []
    for name, first, count in (("a", 0, 4_001), ("b", 5_000, 2_001)):
        with ShardWriter(tmp_path / name, Encoding("sha", 10_000), 700) as writer:
            for start in range(first, first + count, 100):
                writer.add(list(range(start, min(start + 100, first + count))))
        found.append(ShardedTokens(tmp_path / name))
    return found


def loader(corpora, rank=0, world_size=1, micro_batch=2, seed=3):
    sources = [Source(corpora[0], 3.0), Source(corpora[1], 1.0)]
    return TokenLoader(
        sources,
        sequence_length=20,
        global_batch=24,
        micro_batch=micro_batch,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def global_step(corpora, step, world_size, micro_batch):
    """All samples of a global step, in global order."""
    return [
        row
        for rank in range(world_size)
        for batch in loader(corpora, rank, world_size, micro_batch).step(step)
        for row in batch.input_ids.tolist()
    ]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 2), (3, 4), (4, 1), (12, 2)])
def test_samples_of_a_step_are_the_same_for_every_world_size(corpora, world_size, micro_batch):
    for step in (0, 1, 17):
        assert global_step(corpora, step, world_size, micro_batch) == global_step(corpora, step, 1, 24)


def test_labels_are_the_next_tokens(corpora):
    for batch in loader(corpora).step(0):
        assert np.array_equal(batch.labels, batch.input_ids + 1)
        assert batch.mask.all()
        assert np.array_equal(batch.positions[0], np.arange(20))


def test_a_resumed_loader_goes_on_where_it_stopped_at_any_world_size(corpora):
    whole = loader(corpora)
    expected = [row for _ in range(6) for batch in next(whole) for row in batch.input_ids.tolist()]
    first = loader(corpora, 0, 2)
    for _ in range(2):
        next(first)
    state = first.state_dict()
    resumed = [loader(corpora, rank, 4) for rank in range(4)]
    for each in resumed:
        each.load_state_dict(state)
    rest = [row for _ in range(4) for each in resumed for batch in next(each) for row in batch.input_ids.tolist()]
    assert rest == expected[2 * 24 :]


def test_resuming_with_other_data_is_refused(corpora):
    state = loader(corpora, seed=3).state_dict()
    with pytest.raises(DataError, match="changed since the checkpoint"):
        loader(corpora, seed=4).load_state_dict(state)


def test_a_batch_that_cannot_be_cut_equally_is_refused(corpora):
    with pytest.raises(ValueError, match="not a multiple"):
        loader(corpora, 0, 5)


def test_corpora_of_different_tokenizers_do_not_mix(corpora, tmp_path):
    with ShardWriter(tmp_path / "other", Encoding("another", 10_000)) as writer:
        writer.add(list(range(100)))
    with pytest.raises(DataError, match="different tokenizers"):
        loader([corpora[0], ShardedTokens(tmp_path / "other")])
