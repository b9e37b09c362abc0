"""The loader: the same samples at any world size and after any resume, read in large blocks, ahead of time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_shards.format
import data_shards.samples
from data_shards import BlockOrder, DataError, Encoding, ShardedTokens, ShardWriter, Source, TokenLoader
from data_shards.format import write_packs


def write(folder, tokens, shard_tokens=700, document_tokens=100):
    with ShardWriter(folder, Encoding("sha", 60_000), shard_tokens) as writer:
        for start in range(0, len(tokens), document_tokens):
            writer.add(tokens[start : start + document_tokens])
    return ShardedTokens(folder)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora whose tokens tell where they come from."""
    folder = tmp_path_factory.mktemp("corpora")
    return [write(folder / "a", range(4_001)), write(folder / "b", range(5_000, 7_001))]


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
    with ShardWriter(tmp_path / "other", Encoding("another", 60_000)) as writer:
        writer.add(list(range(100)))
    with pytest.raises(DataError, match="different tokenizers"):
        loader([corpora[0], ShardedTokens(tmp_path / "other")])


# -- elastic resume ---------------------------------------------------------------------------------------------

RUNS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 4, 6, 12, 24]),  # ranks
        st.integers(1, 24),  # micro-batch, where it divides
        st.integers(0, 3),  # steps read ahead
        st.integers(0, 4),  # steps until the run is killed
        st.integers(0, 2),  # of them, steps after its last checkpoint
    ),
    min_size=1,
    max_size=5,
)


@given(runs=RUNS, read_bytes=st.sampled_from([1, 200, 1 << 20]), epochs=st.booleans(), separate=st.booleans())
@settings(max_examples=60, deadline=None)
def test_however_often_a_run_is_killed_and_resized_its_samples_are_those_of_an_undisturbed_one(
    corpora, runs, read_bytes, epochs, separate
):
    kinds = {"epochs": 1.5} if epochs else {}
    sources = [Source(corpora[0], 3.0, **kinds), Source(corpora[1], 1.0, **kinds)]
    options = {"sequence_length": 20, "global_batch": 24, "seed": 3, "separate_documents": separate}
    before = data_shards.samples.READ_BYTES
    data_shards.samples.READ_BYTES = read_bytes
    try:
        whole = TokenLoader(sources, micro_batch=24, prefetch=0, **options)
        expected = [batch for (batch,) in (next(whole) for _ in range(20))]
        step, state = 0, whole.state_dict() | {"step": 0}
        for ranks, micro_batch, prefetch, steps, lost in runs:
            share = 24 // ranks
            micro_batch = next(size for size in range(min(micro_batch, share), 0, -1) if share % size == 0)
            loaders = [
                TokenLoader(sources, micro_batch=micro_batch, prefetch=prefetch, rank=rank, world_size=ranks, **options)
                for rank in range(ranks)
            ]
            for loader in loaders:
                loader.load_state_dict(state)
            for done in range(steps):
                if done == max(steps - lost, 0):
                    state = loaders[0].state_dict()
                batches = [batch for loader in loaders for batch in next(loader)]
                for whole_array, *parts in zip(expected[step + done], *batches, strict=True):
                    assert np.array_equal(np.concatenate(parts), whole_array)
            if not lost or not steps:
                state = loaders[0].state_dict()
            step = state["step"]
    finally:
        data_shards.samples.READ_BYTES = before


def test_an_epoch_holds_every_sample_once_and_the_next_in_another_order(tmp_path):
    corpus = write(tmp_path / "c", range(20 * 96 + 1))
    each = TokenLoader([Source(corpus)], sequence_length=20, global_batch=8, micro_batch=8, seed=1)
    epochs = [[int(row[0]) for _ in range(12) for batch in next(each) for row in batch.input_ids] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 20 * 96, 20))
    assert epochs[0] != epochs[1]
    assert each.epochs() == [2.0]


def test_sources_given_in_epochs_are_gone_through_so_often(corpora):
    sources = [Source(corpora[0], epochs=1), Source(corpora[1], epochs=4)]
    each = TokenLoader(sources, sequence_length=20, global_batch=20, micro_batch=20, seed=1)
    each.load_state_dict(each.state_dict() | {"step": 150})  # 3,000 samples: 5 times 200 and 20 times 100
    assert each.epochs() == pytest.approx([5, 20], abs=0.02)
    with pytest.raises(ValueError, match="every source"):
        TokenLoader([sources[0], Source(corpora[1])], sequence_length=20, global_batch=2, micro_batch=2, seed=1)


def test_steps_read_ahead_do_not_count(corpora):
    each = loader(corpora)
    first = next(each)
    assert each.state_dict()["step"] == 1
    each.load_state_dict(each.state_dict() | {"step": 0})
    assert np.array_equal(next(each)[0].input_ids, first[0].input_ids)


# -- reading ----------------------------------------------------------------------------------------------------


def test_a_rank_reads_each_block_once_and_whole(tmp_path, monkeypatch):
    """What a parallel file system sees: few calls, each of a block."""
    monkeypatch.setattr(data_shards.samples, "READ_BYTES", 2_000)  # 50 samples of 20 tokens of two bytes
    corpus = write(tmp_path / "c", np.arange(200_001) % 60_000, shard_tokens=1 << 20)
    calls = Counter()
    fromfile = np.fromfile

    def counted(path, dtype, count, offset):
        calls[offset] += 1
        assert count == 1_001
        return fromfile(path, dtype, count, offset=offset)

    monkeypatch.setattr(data_shards.format.np, "fromfile", counted)
    each = TokenLoader([Source(corpus)], sequence_length=20, global_batch=8, micro_batch=8, seed=1, prefetch=0)
    seen = [int(row[0]) for _ in range(1_250) for batch in next(each) for row in batch.input_ids]
    assert len(seen) == 10_000
    assert len(calls) == 200 > BlockOrder.WINDOW
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("shard_tokens", [1, 130, 10_000])
def test_separate_documents_do_not_see_each_other(tmp_path, shard_tokens):
    lengths = [1, 3, 45, 2, 1, 1, 90, 7, 20, 200, 30]
    with ShardWriter(tmp_path / "c", Encoding("sha", 1000), shard_tokens) as writer:
        for length in lengths:
            writer.add(range(length))  # a token is its position in its document
    corpus = ShardedTokens(tmp_path / "c")
    each = TokenLoader(
        [Source(corpus)], sequence_length=16, global_batch=24, micro_batch=24, seed=0, separate_documents=True
    )
    (batch,) = each.step(0)
    flat = np.concatenate([np.arange(length) for length in lengths])
    found = {}
    for ids, labels, mask, positions in zip(*batch, strict=True):
        start = next(
            at for at in range(0, 400, 16) if np.array_equal(flat[at : at + 16], ids) and at // 16 not in found
        )
        found[start // 16] = True
        document = 0
        for at in range(16):
            document = 0 if ids[at] == 0 or at == 0 else document + 1
            assert positions[at] == document
            assert mask[at] == (labels[at] != 0)
    assert len(found) == 24


def test_a_file_that_shrinks_under_the_reader_is_named(tmp_path):
    corpus = write(tmp_path / "c", range(2_001), shard_tokens=10_000)
    path = tmp_path / "c" / "shard-00000.tokens"
    path.write_bytes(path.read_bytes()[:100])
    each = TokenLoader([Source(corpus)], sequence_length=20, global_batch=2, micro_batch=2, seed=1)
    with pytest.raises(DataError, match="became shorter"):
        next(each)


def test_a_flipped_token_id_is_named_with_its_sample(tmp_path):
    corpus = write(tmp_path / "text", range(4_001))
    with ShardWriter(tmp_path / "chats", Encoding("sha", 60_000)) as writer:
        for start in range(0, 400, 20):
            writer.add(range(start, start + 20), [0] * 10 + [1] * 10)
        writer.commit(packs=write_packs(tmp_path / "chats", [[i] for i in range(20)], 20))
    for folder, position, sample in ((corpus.path, 2_345, 117), (tmp_path / "chats", 234, 11)):
        shard, at = divmod(position, 700)
        with (folder / f"shard-{shard:05d}.tokens").open("r+b") as file:
            file.seek(2 * at)
            file.write((60_000).to_bytes(2, "little"))
        source = Source(ShardedTokens(folder))
        size = 200 if folder == corpus.path else 20
        settings = {"sequence_length": 20, "global_batch": 10, "micro_batch": 5, "seed": 3}
        order = {rank: TokenLoader([source], rank=rank, world_size=2, **settings) for rank in (0, 1)}
        found = []
        for step in range(size // 10):
            for rank in order:
                try:
                    order[rank].step(step)
                except DataError as error:
                    found.append(str(error))
        (complaint,) = found
        assert complaint.startswith(f"{folder}: its sample {sample} (number ")
        assert "has the token id 60000, outside the vocabulary of 60000" in complaint
        # The number leads to it: one loader of that place alone.
        number = int(complaint.split("number ")[1].split(" ")[0])
        with pytest.raises(DataError):
            TokenLoader([source], sequence_length=20, global_batch=1, micro_batch=1, seed=3).step(number)
