"""The files of answers, as others read them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dist_train.generate.answers import SCHEMA, read_origin, write_answers
from dist_train.generate.statistics import Tally

ROW = {
    "seed": 0,
    "prompt": "p",
    "response": "r",
    "prompt_ids": [1, 5],
    "response_ids": [6, 2],
    "temperature": 0.7,
    "top_p": 0.95,
    "sample": 0,
    "request_seed": 1,
    "finish_reason": "stop",
    "reencoded": False,
}


@pytest.fixture
def folder(tmp_path):
    """Two units, the first as files were before: in 32 bits."""
    write_answers(tmp_path / "unit-000001.parquet", [ROW], {"target": "t"})
    old = pa.schema([pa.field(f.name, pa.float32() if f.type == pa.float64() else f.type) for f in SCHEMA])
    pq.write_table(pa.Table.from_pylist([ROW], old), tmp_path / "unit-000000.parquet")
    return tmp_path


def test_answers_are_found_by_the_temperature_that_was_asked_for(folder):
    table = pq.read_table(folder / "unit-000001.parquet")
    assert len(table.filter(pc.field("temperature") == 0.7)) == 1
    assert len(table.filter(pc.field("top_p") == 0.95)) == 1
    assert read_origin(folder / "unit-000001.parquet") == {"target": "t"}


def test_answers_of_before_are_read(folder):
    tally = Tally(0.7, 0.95)
    for path in sorted(folder.iterdir()):
        tally.add(path, 1.0)
    assert (tally.answers, tally.tokens) == (2, 4)
    assert pq.read_table(folder)["temperature"].to_pylist() == pytest.approx([0.7, 0.7])
