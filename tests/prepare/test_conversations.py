"""Files of conversations through prepare, distill and evaluate; what of them is trained on."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import MIXED, arguments, figures, run_by
from transformers import AutoTokenizer

from data_shards import ShardedTokens
from data_shards.files import read_json

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def conversation(number):
    messages = [{"role": "system", "content": "the model reads"}] * (number % 2)
    for turn in range(3):
        messages += [
            {"role": "user", "content": f"what comes next {number} {turn}"},
            {"role": "assistant", "content": f"the drafter guesses {number} {turn}"},
        ]
    return messages


def as_sharegpt(messages):
    return {"conversations": [{"from": NAMES[one["role"]], "value": one["content"]} for one in messages]}


@pytest.fixture
def files(tmp_path):
    """The same twelve conversations of three turns, as ShareGPT, as messages, and as Parquet."""
    found = [conversation(number) for number in range(12)]
    (tmp_path / "sharegpt.json").write_text(json.dumps([as_sharegpt(messages) for messages in found]))
    lines = [json.dumps({"messages": messages, "prompt": "not this"}) + "\n" for messages in found]
    (tmp_path / "messages.jsonl").write_text("".join(lines))
    pq.write_table(pa.Table.from_pylist([{"messages": messages} for messages in found]), tmp_path / "rows.parquet")
    return [tmp_path / name for name in ("sharegpt.json", "messages.jsonl", "rows.parquet")]


def prepared(tiny, file, out, *more):
    return ["prepare", f"inputs={file}", f"tokenizer={tiny.tokenizer}", f"out={out}", "format=chat", *more]


def test_every_form_gives_the_same_documents_and_trains_every_answer(tiny, files, command, tmp_path):
    reference = AutoTokenizer.from_pretrained(tiny.tokenizer)
    for file in files:
        out = tmp_path / f"shards-{file.stem}"
        code, _, complaint = command(*prepared(tiny, file, out, "sequence_length=512"))
        assert code == 0, complaint
        corpus = ShardedTokens(out)
        assert corpus.num_documents == 12
        for number in range(12):
            messages = conversation(number)
            assert corpus.document(number).tolist() == reference.apply_chat_template(messages)["input_ids"]
        (mask,) = (path.read_bytes() for path in out.glob("*.mask"))
        spans = "".join(map(str, mask)).split("0")
        assert sum(bool(span) for span in spans) == 36
        ids = corpus[0 : len(corpus)].tolist()
        trained = reference.decode([i for i, one in zip(ids, mask, strict=True) if one])
        answers = [one["content"] for number in range(12) for one in conversation(number) if one["role"] == "assistant"]
        assert [text.strip() for text in trained.split("</s>")[:-1]] == answers


def test_they_train_and_are_evaluated(tiny, files, command, tmp_path):
    sources = []
    for file in files[:2]:
        out = tmp_path / f"shards-{file.stem}"
        assert command(*prepared(tiny, file, out, "sequence_length=128"))[0] == 0
        sources.append(f"{{path: {out}}}")
    target = [f"target.path={tiny.target}", "target.precision=fp32", MIXED]
    data = [f"data.sources=[{', '.join(sources)}]", "data.sequence_length=128"]
    run_by(
        1, "distill", *arguments(tiny, tmp_path / "run", *target, *data, f"drafter.init_from={tiny.drafter}", steps=3)
    )
    assert len(figures(tmp_path / "run")) == 3
    code, _, complaint = command(
        "evaluate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"drafters={{base: {tiny.drafter}, tuned: {tmp_path / 'run'}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 4}}]",
        f"out={tmp_path / 'results'}",
        "max_new_tokens=8",
        "gammas=[2]",
        "temperatures=[0]",
        "token_rate.prompts=0",
    )
    assert code == 0, complaint
    assert {row["drafter"] for row in read_json(tmp_path / "results" / "results.json")["rows"]} == {"base", "tuned"}


@pytest.mark.parametrize(
    ("record", "kind", "reason"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, "malformed", "message 1 has the role 'alien'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "empty", "no answer to a user's message"),
        ({"messages": "no JSON"}, "malformed", "no chat messages in 'messages' or 'conversations'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud83d"}]},
            "encoding",
            "half a surrogate pair",
        ),
    ],
)
def test_a_record_that_is_no_such_conversation_is_named(tiny, refused, command, tmp_path, record, kind, reason):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in ({"messages": conversation(0)}, record)))
    words = prepared(tiny, file, tmp_path / kind, "sequence_length=512")
    if kind != "empty":  # those are left out unless told otherwise
        complaint = refused(*words)
        assert f"{file}:2" in complaint and reason in complaint
    code, said, complaint = command(*words, f"faults.{kind}=skip", f"out={tmp_path / 'out'}")
    assert code == 0, complaint
    assert reason in said and ShardedTokens(tmp_path / "out").num_documents == 1
