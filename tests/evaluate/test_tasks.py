"""Known datasets in their own columns, and whose sampling settings count."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig

from dist_train.config import EvaluateConfig, SeedsSection, TaskSection, load_config
from dist_train.errors import UserError
from dist_train.evaluate.tasks import Prompts, Sampling, load_prompts, read_task, refuse_long_prompts, sampling
from dist_train.prompts.seeds import read_seeds
from dist_train.tokenizer import load_tokenizer

RECORDS = {
    "dolly": (
        [
            {"instruction": "Name a {colour}.", "context": "", "response": "Red.", "category": "open_qa"},
            {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        ],
        ["Name a {colour}.", "Who?\n\nAda wrote it."],
    ),
    "xsum": (
        [{"document": "Long text.", "summary": "Short.", "id": "1"}],
        ["Summarize the following article in one sentence.\n\nLong text."],
    ),
    "cnn_dailymail": (
        [{"article": "News.", "highlights": "N.", "id": "1"}],
        ["Summarize the following article in a few sentences.\n\nNews."],
    ),
    "wmt18-de-en": (
        [{"translation": {"de": "Guten Tag.", "en": "Good day."}}],
        ["Translate the following German text to English.\n\nGuten Tag."],
    ),
    "questions": (
        [{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}],
        ["Write."],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer)


@pytest.mark.parametrize("preset", RECORDS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_preset_reads_the_datasets_own_columns(tmp_path, tokenizer, preset, kind):
    records, expected = RECORDS[preset]
    file = tmp_path / f"records.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records * 2), file)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    found = read_task(TaskSection(preset=preset, inputs=str(file)), tokenizer)
    assert found == [[{"role": "user", "content": prompt}] for prompt in expected]  # repeated ones once


def test_another_file_is_refused_by_its_fields(tmp_path, tokenizer):
    file = tmp_path / "other.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"other.jsonl:1: .*article.*fields are text"):
        read_task(TaskSection(preset="cnn_dailymail", inputs=str(file)), tokenizer)
    with pytest.raises(UserError, match=r"fields are text"):
        read_task(TaskSection(name="mine", template="{turns[0]}", inputs=str(file)), tokenizer)
    for template in ("{", "{text:d}", "{text!z}", "{text[a]b}", "{text]}"):
        with pytest.raises(UserError, match=r"other.jsonl:1: .*a brace that is meant as such is doubled"):
            read_task(TaskSection(name="mine", template=template, inputs=str(file)), tokenizer)
    found = read_task(TaskSection(name="mine", template="Say {text}", inputs=str(file)), tokenizer)
    assert found[0][0]["content"] == "Say a"
    file.write_text('{"text": "a"}\n{"text": "b \\ud800"}\n')
    with pytest.raises(UserError, match=r"other.jsonl:2: not Unicode: half a surrogate pair at character 6"):
        read_task(TaskSection(name="mine", template="Say {text}", inputs=str(file)), tokenizer)


@pytest.mark.parametrize(
    ("template", "record"),
    [
        ("Q {q}", {"q": None}),
        ("{turns[0]}", {"turns": "not a list of turns"}),
        ("{turns[1]}", {"turns": ["one"]}),
        ("{q}", {"q": ["a"]}),
        ("{q}", {"q": True}),
        ("{q}", {"q": math.nan}),
        ("{q[de]}", {"q": {"en": "a"}}),
        ("{q[de]}", {"q": ["a"]}),
        ("{q.__class__}", {"q": "a"}),
        ("{}", {"q": "a"}),
        ("{0}", {"q": "a"}),
    ],
)
def test_a_prompt_is_made_of_texts_that_a_record_has(tmp_path, tokenizer, template, record):
    file = tmp_path / "some.jsonl"
    good = {"q": {"de": "a"} if "[de]" in template else "a", "turns": ["a", "b"]}
    file.write_text("".join(json.dumps(one) + "\n" for one in (record, good)))
    with pytest.raises(UserError, match=r"some.jsonl:1: the record does not have what the prompt"):
        read_task(TaskSection(name="mine", template=template, inputs=str(file)), tokenizer)


@pytest.mark.parametrize("how", [{}, {"template": "{prompt}"}, {"preset": "dolly"}])
def test_prompts_held_out_here_are_those_that_generate_leaves_out(tmp_path, tokenizer, how):
    texts = [f"Question {number} of\n {number % 7}?" for number in range(300)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "instruction": text, "context": ""}) + "\n" for text in texts))
    share = {"inputs": str(file), "held_out": 0.2}
    trained = read_seeds(SeedsSection(**share, split="train", format="dolly" if "preset" in how else "prompt"))
    held_out = read_task(TaskSection(name="held", **share, **how, split="held_out"), tokenizer)
    assert 30 < len(held_out) < 90
    assert sorted(messages[0]["content"] for messages in trained + held_out) == sorted(texts)
    assert read_task(TaskSection(name="held", **share, **how, split="train"), tokenizer) == trained
    for kept in ({"split": "held_out", "limit": 3}, {"max_tokens": 4}):
        task = TaskSection(name="held", **{**share, "held_out": 1e-9}, **how, **kept)
        with pytest.raises(UserError, match=r"no prompts in it with (split=held_out|max_tokens=4)"):
            read_task(task, tokenizer)


def test_a_prompt_with_answer_and_drafts_may_fill_the_positions_but_not_more():
    tasks = {"a": Prompts([[1], [1] * 10], Sampling((0.0,), 1.0, 5))}
    refuse_long_prompts(tasks, "m", LlamaConfig(max_position_embeddings=17), gamma=2)
    with pytest.raises(UserError, match="m has 17 positions; a prompt of 10 tokens and 8 more"):
        refuse_long_prompts(tasks, "m", LlamaConfig(max_position_embeddings=17), gamma=3)


def test_what_is_named_twice_is_measured_once(tmp_path, tokenizer):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    task = {"name": "a", "inputs": str(file), "temperatures": [1, 0, 1.0]}
    words = ["target.path=t", "drafters={a: d}", "out=o", "gammas=[2,3,2]", "temperatures=[0,0.0]"]
    config = load_config(EvaluateConfig, None, [*words, "drafting=[greedy,greedy]", f"tasks={[task]}"])
    assert (config.gammas, config.temperatures, config.drafting) == ([2, 3], [0.0], ["greedy"])
    assert load_prompts(config, tokenizer)["a"].sampling.temperatures == (1.0, 0.0)
    config = load_config(EvaluateConfig, None, [*words, f"tasks={[task, task]}"])
    with pytest.raises(UserError, match="two are named a"):
        load_prompts(config, tokenizer)


def configured(*tasks):
    words = ["target.path=t", "drafters={a: d}", "out=o", "temperatures=[0, 1]", "top_p=0.8", "max_new_tokens=7"]
    return load_config(EvaluateConfig, None, [*words, f"tasks={list(tasks)}"])


def test_a_tasks_own_settings_go_before_its_presets_and_those_before_the_evaluations():
    config = configured(
        {"name": "plain", "inputs": "x"},
        {"preset": "dolly"},
        {"preset": "xsum", "name": "short", "max_new_tokens": 3},
        {"preset": "dolly", "name": "warm", "temperatures": [0.3], "top_p": 0.5},
    )
    assert [tuple(sampling(task, config)) for task in config.tasks] == [
        ((0.0, 1.0), 0.8, 7),
        ((0.6,), 0.9, 7),
        ((0.0,), 1.0, 3),
        ((0.3,), 0.5, 7),
    ]
    assert [task.name for task in config.tasks] == ["plain", "dolly", "short", "warm"]


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ({"inputs": "x"}, "name is required"),
        ({"name": "a"}, "task a: inputs is required"),
        ({"preset": "questions"}, "task questions: inputs is required"),
        ({"preset": "xsun"}, "xsum"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused(task, complaint):
    with pytest.raises(UserError, match=complaint):
        configured(task)
