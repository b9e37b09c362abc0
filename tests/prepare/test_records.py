"""Records as users have them: a text where one is wanted, else a line that names the record, or it is left out."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from data_shards import ShardedTokens

NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    """sentencepiece itself is the reference."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))


@pytest.fixture
def prepared(tiny, command, tmp_path):
    """`prepared(path, "format=chat")` is the exit code, the documents, and all that was said."""

    def run(path, *words):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        code, said, complaint = command(
            "prepare", f"inputs={path}", f"tokenizer={tiny.tokenizer}", f"out={out}", *words
        )
        if code:
            return code, [], complaint
        corpus = ShardedTokens(out)
        return code, [corpus.document(i).tolist() for i in range(corpus.num_documents)], said

    return run


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("value", [7, True, NAN, ["the model"], {"the": "model"}, None], ids=str)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_is_no_text_stops_or_is_left_out(prepared, tokenizer, tmp_path, value, name):
    path = write(tmp_path / name, [{"text": "the model"}, {"text": value}, {"text": "the drafter"}])
    where = f"{path}:2: " if name == "a.jsonl" else f"{path}, item 2: "
    kind = "" if value is None else f" but a value of type {type(value).__name__}"
    code, _, complaint = prepared(path)
    assert code == 2 and complaint.count("\n") == 1
    assert f"{where}the record has no text in 'text'{kind}; its fields are text" in complaint
    code, documents, said = prepared(path, "faults.malformed=skip")
    assert code == 0 and f"left out (malformed): {where}" in said and "1 malformed left out" in said
    assert documents == [[1, *tokenizer.encode(text), 2] for text in ("the model", "the drafter")]


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2]), pa.array([0.5, None]), pa.array([b"a", b"b"]), pa.array([datetime.date(2020, 1, 1)] * 2)],
)
def test_a_column_that_is_no_text_is_named_with_its_row(prepared, tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    code, _, complaint = prepared(tmp_path / "a.parquet")
    assert code == 2
    assert f"{tmp_path / 'a.parquet'}:1: the record has no text in 'text' but a value of type " in complaint
    code, _, complaint = prepared(tmp_path / "a.parquet", "faults.malformed=skip")
    assert code == 2 and "no documents in the input" in complaint


def test_ids_are_used_where_both_are_there_else_the_texts(prepared, tokenizer, tmp_path):
    texts = {"prompt": "the model", "response": "agrees"}
    by_text = [1, *tokenizer.encode("[INST] the model [/INST]"), *tokenizer.encode("agrees"), 2]
    cases = [
        ({**texts, "prompt_ids": [1, 5], "response_ids": [7, 2]}, [1, 5, 7, 2]),
        ({**texts, "prompt_ids": None, "response_ids": None}, by_text),
        ({**texts, "prompt_ids": None, "response_ids": [7, 2]}, by_text),
        ({**texts, "prompt_ids": [1, 5]}, by_text),
        ({"prompt_ids": [1, 5], "response_ids": [7, 2]}, [1, 5, 7, 2]),
        (texts, by_text),
    ]
    code, documents, _ = prepared(write(tmp_path / "a.jsonl", [record for record, _ in cases]), "format=chat")
    assert code == 0
    assert documents == [expected for _, expected in cases]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": 5, "response": 6}, "no text in 'prompt' but a value of type int"),
        ({"prompt": "a", "response": False}, "no text in 'response' but a value of type bool"),
        ({"prompt_ids": None, "response_ids": [7, 2]}, "no text in 'prompt'; its fields are prompt_ids, response_ids"),
        (
            {"prompt": "a", "response": "b", "prompt_ids": "1 2", "response_ids": "3"},
            "'prompt_ids' is no list of token ids",
        ),
        ({"prompt_ids": [1], "response_ids": 7}, "'response_ids' is no list of token ids"),
        ({"prompt_ids": [1, None], "response_ids": [7]}, "'prompt_ids' is no list of token ids"),
        ({"prompt_ids": [True], "response_ids": [7]}, "'prompt_ids' is no list of token ids"),
        ({"prompt_ids": [1.0], "response_ids": [7]}, "'prompt_ids' is no list of token ids"),
        ({"prompt_ids": [[1]], "response_ids": [7]}, "'prompt_ids' is no list of token ids"),
        (
            {"prompt_ids": [1], "response_ids": [320]},
            "'response_ids' has an id outside the tokenizer's vocabulary of 320",
        ),
        ({"prompt_ids": [-1], "response_ids": [7]}, "'prompt_ids' has an id outside the tokenizer's vocabulary of 320"),
        ({"prompt_ids": [1 << 60], "response_ids": [7]}, "'prompt_ids' has an id outside the tokenizer's vocabulary"),
    ],
)
def test_conversations_that_cannot_be_used_stop_or_are_left_out(prepared, tmp_path, record, reason):
    good = {"prompt_ids": [1, 5], "response_ids": [7, 2]}
    path = write(tmp_path / "a.jsonl", [good, record])
    code, _, complaint = prepared(path, "format=chat")
    assert code == 2 and complaint.count("\n") == 1
    assert f"{path}:2: " in complaint and reason in complaint
    code, documents, said = prepared(path, "format=chat", "faults.malformed=skip")
    assert code == 0 and documents == [[1, 5, 7, 2]] and f"left out (malformed): {path}:2: " in said


def test_a_field_whose_name_no_terminal_can_show_is_told_all_the_same(prepared, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"\\ud800\\u001b[2J": 1}\n')
    code, _, said = prepared(path, "faults.malformed=skip")
    assert code == 0 and r"its fields are \ud800\x1b[2J" in said


def test_a_tokenizer_is_not_trained_on_what_is_no_text(refused, command, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "the model"}, {"text": 7}])
    complaint = refused("tokenizer", "train", path, "--out", tmp_path / "tokenizer")
    assert f"{path}:2: the record has no text in 'text'" in complaint
