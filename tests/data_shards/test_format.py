"""Shards on disk: what was written comes back, and nothing else passes for it."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import DataError, Encoding, ShardedTokens, ShardWriter
from data_shards.files import read_json, write_json

DOCUMENTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=30)


def write(folder, documents, vocab_size=1000, shard_tokens=50, **options):
    with ShardWriter(folder, Encoding("sha", vocab_size), shard_tokens, **options) as writer:
        for document in documents:
            writer.add(document)
    return ShardedTokens(folder)


@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 200), cut=st.tuples(st.integers(0, 600), st.integers(0, 600)))
@settings(max_examples=60, deadline=None)
def test_tokens_and_documents_come_back(tmp_path_factory, documents, shard_tokens, cut):
    corpus = write(tmp_path_factory.mktemp("corpus") / "c", documents, shard_tokens=shard_tokens)
    flat = [token for document in documents for token in document]
    assert len(corpus) == len(flat)
    assert corpus.num_documents == len(documents)
    start, stop = min(cut), max(cut)
    assert corpus[start:stop].tolist() == flat[start:stop]
    assert [corpus.document(i).tolist() for i in range(len(documents))] == documents


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, np.uint16), (65_536, np.uint32), (152_064, np.uint32)])
def test_type_of_a_token_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    corpus = write(tmp_path / "c", [[0, vocab_size - 1]], vocab_size)
    assert corpus[:].dtype == dtype
    assert corpus[:].tolist() == [0, vocab_size - 1]


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match="outside the vocabulary of 1000"):
        write(tmp_path / "c", [[1000]])
    assert not (tmp_path / "c" / "index.json").exists()


def test_an_interrupted_writer_leaves_no_corpus(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "c", Encoding("sha", 10)) as writer:
        writer.add([1, 2, 3])
        raise RuntimeError("killed")
    with pytest.raises(DataError, match="no prepared corpus"):
        ShardedTokens(tmp_path / "c")


def test_every_flipped_byte_is_found(tmp_path):
    write(tmp_path / "c", [[i, i + 1] for i in range(200)])
    files = sorted((tmp_path / "c").iterdir())
    drawn = random.Random(0)
    for _ in range(100):
        path = drawn.choice(files)
        data = bytearray(path.read_bytes())
        where, bit = drawn.randrange(len(data)), 1 << drawn.randrange(8)
        data[where] ^= bit
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            ShardedTokens(tmp_path / "c").verify()
        data[where] ^= bit
        path.write_bytes(data)
    ShardedTokens(tmp_path / "c").verify()


def test_missing_and_truncated_files_are_all_named_on_opening(tmp_path):
    write(tmp_path / "c", [[i] for i in range(200)])
    (tmp_path / "c" / "shard-00001.tokens").unlink()
    path = tmp_path / "c" / "shard-00002.offsets"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00001\.tokens is missing.*shard-00002\.offsets has"):
        ShardedTokens(tmp_path / "c")


def test_a_full_disk_is_one_clear_error_and_commits_nothing(tmp_path, monkeypatch):
    """The disk fills up while the second file of a shard is written."""
    import os

    calls = []
    fsync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free space"):
        write(tmp_path / "c", [[1, 2]])
    monkeypatch.undo()
    with pytest.raises(DataError, match="no prepared corpus"):
        ShardedTokens(tmp_path / "c")


def outside(content):
    content["shards"][0]["files"]["../other/shard-00000.tokens"] = content["shards"][0]["files"].pop(
        "shard-00000.tokens"
    )


OTHER = "index.json: not as this version writes it: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "names '../other/shard-00000.tokens', which is outside"),
        (lambda content: content["shards"][0].update(name="/etc/shard-00000"), "names '/etc/shard-00000'"),
        (lambda content: content["shards"][0].update(name="a\0"), r"names 'a\x00', which is outside"),
        (
            lambda content: content["shards"][0].update(name=7),
            OTHER + "shards.0.name",
        ),
        (lambda content: content.pop("shards"), OTHER + "shards: Field required"),
        (lambda content: content.update(shards=3), OTHER + "shards: "),
        (lambda content: content.update(tokens=4), "tokens are 4, those of the shards 3"),
        (
            lambda content: content["encoding"].update(more=1),
            OTHER + "encoding.more",
        ),
        (lambda content: content["shards"][0]["files"]["shard-00000.tokens"].pop("xxh64"), "xxh64: Field required"),
        (lambda content: content["shards"][0].update(faults={"counts": {}, "named": [[[], [], []]]}), "faults.named.0"),
    ],
)
def test_an_index_is_what_this_version_writes_of_its_own_folder(tmp_path, change, message):
    write(tmp_path / "other", [[1, 2, 3]])
    write(tmp_path / "c", [[1, 2, 3]])
    content = read_json(tmp_path / "c" / "index.json")
    change(content)
    write_json(tmp_path / "c" / "index.json", content)
    with pytest.raises(DataError, match=re.escape(message)):
        ShardedTokens(tmp_path / "c")
