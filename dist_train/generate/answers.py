"""The file of one unit of answers: its columns, what is said of its origin, and how it is written."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.files import write_atomically

SCHEMA = pa.schema(
    {
        "seed": pa.int64(),  # number of the prompt among the seeds
        "prompt": pa.string(),  # its last message
        "response": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "temperature": pa.float64(),  # as it was asked for: 0.7 in 32 bits is not 0.7
        "top_p": pa.float64(),
        "sample": pa.int32(),  # 0 to samples - 1
        "request_seed": pa.int64(),
        "finish_reason": pa.string(),
        "reencoded": pa.bool_(),  # response_ids were made of the text: the server told no ids
    }
)
SCHEMA_OF_TURNS = SCHEMA.append(pa.field("turn", pa.int32()))  # of the conversation, from 1
ORIGIN = b"dist_train"  # key of the Parquet metadata


def write_answers(
    path: Path, rows: Sequence[Mapping[str, Any]], origin: Mapping[str, Any], *, by_turn: bool = False
) -> None:
    """Write one unit, whole or not at all; the same rows give the same bytes. Raises DataError on a full disk.

    One that is there already stays: this process was taken for dead, and another made it meanwhile.
    """
    if path.exists():
        return
    schema = (SCHEMA_OF_TURNS if by_turn else SCHEMA).with_metadata({ORIGIN: json.dumps(origin, sort_keys=True)})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    write_atomically(path, [buffer.getbuffer()])


def read_origin(path: Path) -> dict[str, Any]:
    """Which target answered, through what, with which tokenizer."""
    return json.loads(pq.read_schema(path).metadata[ORIGIN])
