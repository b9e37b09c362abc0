"""Known datasets in their own columns, and whose sampling settings count."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.config import EvaluateConfig, TaskSection, load_config
from dist_train.errors import UserError
from dist_train.evaluate.tasks import read_task, sampling

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


@pytest.mark.parametrize("preset", RECORDS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_preset_reads_the_datasets_own_columns(tmp_path, preset, kind):
    records, expected = RECORDS[preset]
    file = tmp_path / f"records.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records * 2), file)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    found = read_task(TaskSection(preset=preset, inputs=str(file)))
    assert found == [[{"role": "user", "content": prompt}] for prompt in expected]  # repeated ones once


def test_another_file_is_refused_by_its_fields(tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"other.jsonl: .*article.*fields are text"):
        read_task(TaskSection(preset="cnn_dailymail", inputs=str(file)))
    with pytest.raises(UserError, match=r"fields are text"):
        read_task(TaskSection(name="mine", template="{turns[0]}", inputs=str(file)))
    assert read_task(TaskSection(name="mine", template="Say {text}", inputs=str(file)))[0][0]["content"] == "Say a"


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
