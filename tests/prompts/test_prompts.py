"""Seeds: formats of well-known sets, duplicates, and a division that nothing crosses."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
from generations import generation

from data_shards import DataError
from dist_train.config import SeedsSection
from dist_train.errors import UserError
from dist_train.prompts.seeds import is_held_out, read_all_seeds, read_seeds
from dist_train.tokenizer import load_tokenizer


@pytest.fixture
def seeds(tmp_path):
    """`seeds([record, ...], format="oig")` reads records through a file."""

    def read(records, tokenizer=None, **options):
        path = tmp_path / "seeds.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_seeds(SeedsSection(inputs=str(path), **options), tokenizer)

    return read


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


THREE = [user("a?"), bot("b"), user("c?"), bot("d")]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("prompt", {"prompt": " a? "}, [user(" a? ")]),
        ("prompt", {"prompt": THREE}, THREE[:3]),
        ("chat", {"messages": THREE}, THREE[:3]),
        ("chat", {"conversations": SHARED}, [{"role": "system", "content": "s"}, user("a?")]),
        ("oig", {"user": "a?", "chip2": "b"}, [user("a?")]),
        ("oig", {"text": "<human>: a?\n<bot>: b", "metadata": {}}, [user("a?")]),
        ("oig", {"text": "<human>: a?\n<bot>: b\n<human>: is x<y?\n<bot>: d"}, [user("a?"), bot("b"), user("is x<y?")]),
        ("dolly", {"instruction": "a?", "context": "c", "response": "b"}, [user("a?\n\nc")]),
        ("dolly", {"instruction": "a?", "context": "", "response": "b"}, [user("a?")]),
        ("alpaca", {"instruction": "a?", "input": "i", "output": "b"}, [user("a?\n\ni")]),
        ("alpaca", {"instruction": "a?", "output": "b"}, [user("a?")]),
    ],
)
def test_formats(seeds, form, record, expected):
    assert seeds([record], format=form) == [expected]


TOOL = [
    user("Weather?"),
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "sky"}}]},
    {"role": "tool", "content": "rain"},
    user("And then?"),
]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": None, "conversations": SHARED}, [{"role": "system", "content": "s"}, user("a?")]),
        ({"messages": THREE, "conversations": None}, THREE[:3]),
        ({"messages": json.dumps(THREE)}, THREE[:3]),
        ({"conversations": json.dumps(SHARED)}, [{"role": "system", "content": "s"}, user("a?")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "?"}]}]}, [user("a?")]),
        ({"messages": [{"role": "user", "content": ["a", "?"]}]}, [user("a?")]),
        (
            {"messages": [{"role": "developer", "content": "s"}, user("a?")]},
            [{"role": "system", "content": "s"}, user("a?")],
        ),
        ({"messages": [{"role": "User", "content": "a?"}]}, [user("a?")]),
        ({"messages": [{"role": "user", "content": None, "value": "a?"}]}, [user("a?")]),
        *(
            (
                {"messages": [{"role": role, "content": "rain"}, user("a?")]},
                [{"role": "tool", "content": "rain"}, user("a?")],
            )
            for role in ("tool", "observation", "function")
        ),
        # What comes after the prompt need not be clear.
        ({"messages": [user("a?"), {"role": "bing", "content": None}]}, [user("a?")]),
        ({"messages": [{"role": "assistant", "content": "b", "tool_calls": []}, user("a?")]}, [bot("b"), user("a?")]),
    ],
)
def test_conversations_as_they_are_released(seeds, record, expected):
    assert seeds([record], format="chat") == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TOOL}, "message 2 calls a tool, which is no text"),
        (
            {"messages": [{"role": "assistant", "content": "b", "tool_calls": [{}]}, user("a?")]},
            "message 1 calls a tool",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}, user("a?")]},
            "message 1 has the role 'function_call'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, user("a?")]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has no text"),
        ({"messages": [{"role": "\x1b[2J", "content": "a"}]}, r"message 1 has the role '\\x1b[2J'"),
        ({"messages": "not JSON"}, "no prompt in 'messages' or 'conversations'; its fields are messages"),
        ({"messages": None}, "no prompt in 'messages' or 'conversations'; its fields are messages"),
        ({"messages": ["a?"]}, "no prompt in 'messages' or 'conversations'"),
        ({"messages": [user("a \ud800?")]}, "half a surrogate pair at character 2"),
    ],
)
def test_conversations_that_are_not_clear_are_named_or_left_out_and_told(seeds, tmp_path, capfd, record, message):
    good = {"messages": THREE}
    with pytest.raises(DataError) as error:
        seeds([good, record], format="chat")
    assert str(error.value).startswith(f"{tmp_path / 'seeds.jsonl'}:2: ") and message in str(error.value)
    kind = "encoding" if "surrogate" in message else "malformed"
    assert str(error.value).endswith(f"; mend it, or set seeds.faults.{kind}=skip")
    assert seeds([good, record, {"messages": [user("e?")]}], format="chat", faults={kind: "skip"}) == [
        THREE[:3],
        [user("e?")],
    ]
    said = capfd.readouterr().err
    assert f"seeds: left out ({kind}): {tmp_path / 'seeds.jsonl'}:2: " in said
    assert f"seeds: {tmp_path / 'seeds.jsonl'}: 1 {kind} left out\n" in said


def test_what_goes_before_a_tool_is_clear(seeds):
    assert seeds([{"messages": TOOL}], format="chat", turns="first") == [TOOL[:1]]
    policy = {"faults": {"malformed": "skip"}}
    assert seeds([{"messages": TOOL}], format="chat", turns="each", **policy) == [TOOL[:1]]


def message(name, parent, role, text):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "lang": "en"}


TREES = [
    message("1", None, "prompter", "a?"),
    message("3", "2", "prompter", "c?"),
    message("2", "1", "assistant", "b"),
    message("4", "1", "assistant", "b2"),
    message("5", "4", "prompter", "e?"),
    message("6", None, "prompter", "lone?"),
    message("8", "7", "prompter", "parent deleted"),
]


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("prompt", {"question": "a"}, "no prompt in 'prompt' (a text or chat messages); its fields are question"),
        ("chat", {"messages": [{"role": "wizard", "content": "a"}]}, "'messages' or 'conversations'"),
        ("oig", {"text": "a"}, "<human>: ... <bot>: ..."),
        ("dolly", {"prompt": "a"}, "'instruction' and 'context'"),
        ("prompt", {"prompt": "\ud800 x"}, "half a surrogate pair at character 0"),
        ("openassistant", {"text": "a"}, "message_id, parent_id, text, role"),
        ("openassistant", message("2", "1", "wizard", "a"), "message_id, parent_id, text, role"),
        ("openassistant", message("2", "1", "prompter", None), "message_id, parent_id, text, role"),
        ("openassistant", message(["2"], "1", ["prompter"], "a"), "message_id, parent_id, text, role"),
        ("openassistant", message("2", ["1"], "prompter", "a"), "are not of one kind"),
        ("openassistant", message("2", "1", "prompter", "a \ud800"), "half a surrogate pair at character 2"),
        ("openassistant", message(True, None, "prompter", "a"), "message_id, parent_id, text, role"),
        ("openassistant", message("2", 1, "prompter", "a"), "are not of one kind"),
        ("openassistant", message("1", None, "prompter", "b?"), "message_id '1' is another message's at "),
        ("openassistant", message("2", "2", "prompter", "a"), "its own ancestor"),
    ],
)
def test_records_of_another_format_are_named_with_their_line(seeds, tmp_path, form, record, message):
    good = {"prompt": "a", "messages": THREE, "user": "a", "instruction": "a", "context": "", **TREES[0]}
    with pytest.raises((UserError, DataError)) as error:
        seeds([good, record], format=form, turns="each")
    assert str(error.value).startswith(f"{tmp_path / 'seeds.jsonl'}:2: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b'{"prompt": ', b'{"prompt": "\xff"}', b"[1]"])
def test_a_line_that_is_no_record_is_named_and_what_is_told_can_be_done(tiny, refused, command, tmp_path, line):
    (tmp_path / "seeds.jsonl").write_bytes(b'{"prompt": "a"}\n' + line)
    complaint = refused(*generation(tiny, tmp_path / "out", f"seeds.inputs={tmp_path / 'seeds.jsonl'}"))
    assert f"{tmp_path / 'seeds.jsonl'}:2: not" in complaint
    kind = "encoding" if b"\xff" in line else "malformed"
    assert f"mend it, or set seeds.faults.{kind}=skip" in complaint
    with_policy = [f"seeds.inputs={tmp_path / 'seeds.jsonl'}", f"seeds.faults.{kind}=skip", "--dry-run"]
    code, _, said = command(*generation(tiny, tmp_path / "out", *with_policy))
    assert code == 0
    assert f"seeds: left out ({kind}): {tmp_path / 'seeds.jsonl'}:2: not" in said and f"1 {kind} left out" in said


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (None, [[user("a?")], [user("lone?")]]),
        (
            "each",
            [[user("a?")], [user("a?"), bot("b"), user("c?")], [user("a?"), bot("b2"), user("e?")], [user("lone?")]],
        ),
        ("last", [[user("a?"), bot("b"), user("c?")], [user("a?"), bot("b2"), user("e?")], [user("lone?")]]),
    ],
)
def test_openassistant_trees(seeds, turns, expected):
    assert seeds(TREES, format="openassistant", turns=turns) == expected
    # Numbers from 0, those of parents as pandas has them.
    number = {None: math.nan, **{str(name): float(name - 1) for name in range(1, 10)}}
    numbered = [
        {**record, "message_id": int(record["message_id"]) - 1, "parent_id": number[record["parent_id"]]}
        for record in TREES
    ]
    assert seeds(numbered, format="openassistant", turns=turns) == expected


@pytest.mark.parametrize("turns", ["each", "last"])
def test_messages_that_are_each_others_parent_are_named(seeds, tmp_path, turns):
    circle = [message("5", "6", "prompter", "a?"), message("6", "5", "assistant", "b")]
    with pytest.raises(UserError, match="its own ancestor"):
        seeds([*TREES[:1], *circle], format="openassistant", turns=turns)


def test_a_message_that_is_there_twice_counts_once(seeds):
    for root in (math.nan, ""):
        again = [{**record, "parent_id": record["parent_id"] or root} for record in TREES]
        assert seeds(TREES + again, format="openassistant") == [[user("a?")], [user("lone?")]]


def test_turns_of_a_conversation(seeds):
    record = {"messages": THREE}
    assert seeds([record], format="chat", turns="first") == [THREE[:1]]
    assert seeds([record], format="chat", turns="each") == [THREE[:1], THREE[:3]]


def test_duplicates_differ_in_more_than_white_space(seeds):
    texts = ["a b", "a  b", " a b\n", "a B", "", "  "]
    assert seeds([{"prompt": text} for text in texts]) == [[user("a b")], [user("a B")]]


def test_duplicates_across_sources_count_once(tmp_path, tiny):
    for name, texts in (("one", ["a", "b"]), ("two", ["b", "c", "d"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sections = [SeedsSection(inputs=str(tmp_path / f"{name}.jsonl"), limit=2) for name in ("one", "two")]
    found = read_all_seeds(sections, load_tokenizer(tiny.tokenizer))
    assert [messages[0]["content"] for messages in found] == ["a", "b", "c", "d"]


def test_where_and_limits(seeds, tiny):
    tokenizer = load_tokenizer(tiny.tokenizer)
    records = [{"prompt": "the model " * n, "lang": "en" if n % 2 else "de", "n": n} for n in range(1, 9)]
    assert len(seeds(records, where={"lang": "en"})) == 4
    lengths = [len(tokenizer.encode_prompt([user(record["prompt"])])) for record in records]
    kept = seeds(records, tokenizer, min_tokens=lengths[2], max_tokens=lengths[5], limit=3)
    assert [messages[0]["content"] for messages in kept] == [record["prompt"] for record in records[2:5]]
    with pytest.raises(UserError, match="no prompts in it with max_tokens=2"):
        seeds(records, tokenizer, max_tokens=2)
    with pytest.raises(UserError, match="where: a record has no 'language'"):
        seeds(records, where={"language": "en"})


TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no turns') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("format", ["chat", "openassistant"])
def test_a_conversation_that_the_template_refuses_is_named_or_counted(tmp_path, tiny, capfd, format):
    (tmp_path / "turns.jinja").write_text(TURNS)
    tokenizer = load_tokenizer(tiny.tokenizer, chat_template=str(tmp_path / "turns.jinja"))
    records = [{"messages": THREE}, {"messages": [user("a"), user("b")]}, {"messages": [user("the model")]}]
    if format == "openassistant":
        one = {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"}
        two = {"message_id": "2", "parent_id": "1", "text": "b", "role": "prompter"}
        records = [one, two, {**one, "message_id": "3", "text": "the model"}]
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = SeedsSection(inputs=str(path), format=format, turns="last")
    refusal = r"seeds\.jsonl:2: .*refuses the conversation: no turns.*seeds\.faults\.malformed=skip"
    with pytest.raises(DataError, match=refusal):
        read_all_seeds([section], tokenizer)
    skipping = section.faults.model_copy(update={"malformed": "skip"})
    kept = read_all_seeds([section.model_copy(update={"faults": skipping})], tokenizer)
    assert kept[-1] == [user("the model")]
    assert len(kept) == 2
    told = capfd.readouterr().err
    assert re.search(r"left out \(malformed\): .*seeds\.jsonl:2: .*no turns", told)
    assert "1 malformed left out" in told


def test_no_prompt_is_ever_on_both_sides(seeds):
    drawn = random.Random(3)
    prompts = [f"question {n} about {drawn.randrange(100)}" for n in range(4000)]
    noisy = [drawn.choice([text, f"  {text}\n", text.replace(" ", "   ")]) for text in prompts for _ in range(2)]
    drawn.shuffle(noisy)
    sides = {side: seeds([{"prompt": text} for text in noisy], split=side) for side in ("train", "held_out")}
    train, held = ({" ".join(messages[0]["content"].split()) for messages in sides[side]} for side in sides)
    assert not train & held
    assert train | held == set(prompts)
    assert 140 < len(held) < 262  # 200 expected, more than four standard deviations either way
    some = sorted(held)[:20] + sorted(train)[:20]
    for text in some:  # alone in its set, as among all
        assert (text in held) == is_held_out(f"\n{text}", 0.05)
    # Longer conversations go with their first message, whatever follows it and whatever the system says.
    records = [
        {"messages": [{"role": "system", "content": f"s{n}"}, user(text), bot("b"), user(f"and {n}?"), bot("d")]}
        for n, text in enumerate(prompts)
    ]
    for side, texts in (("train", train), ("held_out", held)):
        found = seeds(records, format="chat", turns="each", split=side)
        assert {messages[1]["content"] for messages in found} == texts
        assert len(found) == 2 * len(texts)


def test_anything_that_datasets_loads(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("instruction,context\na?,c\nb?,\n")
    section = SeedsSection(dataset={"path": str(tmp_path / "set")}, format="dolly")
    assert read_seeds(section) == [[user("a?\n\nc")], [user("b?")]]
    with pytest.raises(UserError, match=r"dataset .*nowhere"):
        read_seeds(SeedsSection(dataset={"path": str(tmp_path / "nowhere")}))


def test_a_conversation_in_which_no_user_speaks_is_counted(tmp_path, capfd):
    records = [
        {"messages": [], "conversations": [{"from": "human", "value": "b"}]},  # as joined tables have it
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "hello"}]},
    ]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    section = SeedsSection(inputs=str(tmp_path / "seeds.jsonl"), format="chat")
    assert read_seeds(section) == [[user("b")]]
    assert "2 empty left out" in capfd.readouterr().err
