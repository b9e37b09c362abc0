"""Word-wise encoding against sentencepiece itself, on text made to break it."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_train.tokenizer import PROBES
from dist_train.tokenizer.wordwise import WordwiseEncoder, can_split

CORNERS = [
    *PROBES,
    *("a ", "a  ", " ", "  ", "   ", "\u2581", " \u2581 ", "  \u2581 ", "a\u2581b", "\u2581\u2581a", "a \u2581", ""),
    *("\0", "a\0b", " \0 ", "\n", "\n ", " \n", "\t \t", "\u3000", "\u00a0 \u00a0", "x" * 5000, " " * 500),
]
# Spaces of many kinds, the marker, control characters, letters, digits, scripts and characters beyond the 16-bit plane.
AWKWARD = st.text(
    st.sampled_from(" \u2581\n\t\0\u00a0\u3000\u200b\u200dab1.<s>éß日本क🙂👩\ufeff\ufffd\U0010ffff"), max_size=40
)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def trained(**options):
    """A small model with Llama 2's settings, or others."""
    texts = ["the quick brown fox  jumps over   12 lazy dogs", "naïve café 日本語 🙂", "def f(x):\n    return  x"] * 30
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**defaults, **options}
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=["trained", "llama2"])
def processor(request):
    if request.param == "trained":
        return trained()
    model = request.getfixturevalue("shared") / "llama2" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def encoder(processor):
    assert can_split(processor)
    return WordwiseEncoder(processor)


def assert_equal(encoder, processor, texts):
    ids, lengths = encoder(texts)
    expected = processor.encode(texts)
    assert lengths.tolist() == [len(document) for document in expected]
    assert ids.tolist() == [i for document in expected for i in document]


def test_corners(encoder, processor):
    assert_equal(encoder, processor, CORNERS)
    for text in CORNERS:
        assert_equal(encoder, processor, [text])
    assert_equal(encoder, processor, [])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(AWKWARD | ANY, max_size=6))
def test_any_text(encoder, processor, texts):
    assert_equal(encoder, processor, texts)


def test_a_table_that_is_emptied_changes_nothing(encoder, processor, monkeypatch):
    monkeypatch.setattr("dist_train.tokenizer.wordwise._TABLE_BYTES", 2_000)
    fresh = WordwiseEncoder(processor)
    for start in range(0, 2_000, 50):
        assert_equal(fresh, processor, [f"word{i} and  number {i * i}" for i in range(start, start + 50)])
    assert len(fresh._numbers) < 2_000


def test_real_documents(shared, encoder, processor):
    with gzip.open(shared / "data" / "instructions.eval.jsonl.gz", "rt") as lines:
        texts = [json.dumps(json.loads(line), indent=2, ensure_ascii=False) for line in lines]
    assert_equal(encoder, processor, texts)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False, "vocab_size": 80},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["fox  jumps"]},
        {"split_by_whitespace": False, "vocab_size": 420},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_without_the_property_are_left_to_sentencepiece(options):
    assert not can_split(trained(**options))


def test_the_tokenizer_takes_the_fast_way_only_where_it_holds(tmp_path):
    from dist_train.tokenizer import load_tokenizer

    for options in ({}, {"add_dummy_prefix": False}):
        processor = trained(**options)
        (tmp_path / "tokenizer.model").write_bytes(processor.serialized_model_proto())
        ids, lengths = load_tokenizer(tmp_path / "tokenizer.model").encode_flat(CORNERS)
        expected = processor.encode(CORNERS)
        assert np.split(ids, np.cumsum(lengths)[:-1])[3].tolist() == expected[3]
        assert ids.tolist() == [i for document in expected for i in document]
