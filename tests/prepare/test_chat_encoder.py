"""Records to documents: what the chat template says of them."""

from __future__ import annotations

import json
import shutil

import pytest

from data_shards import DataError
from dist_train.config import PrepareConfig
from dist_train.prepare.encoders import ChatEncoder
from dist_train.tokenizer import load_tokenizer

PICKY = "{% if 'rain' in messages[0].content %}{{ raise_exception('no rain') }}{% endif %}{{ messages[0].content }}"
RECORDS = [{"prompt": "the model", "response": "reads"}, {"prompt": "rain", "response": "falls"}]


def encoder(tokenizer, tmp_path):
    config = PrepareConfig(inputs="x", tokenizer="x", out=tmp_path, format="chat")
    return ChatEncoder(tokenizer, config)


def test_a_prompt_that_the_template_refuses_is_a_malformed_record(tiny, tmp_path):
    (tmp_path / "picky.jinja").write_text(PICKY)
    tokenizer = load_tokenizer(tiny.tokenizer, chat_template=str(tmp_path / "picky.jinja"))
    found = encoder(tokenizer, tmp_path)(RECORDS)
    assert found.ids.tolist() == [*tokenizer.encode("the model"), *tokenizer.encode("reads"), tokenizer.eos_id]
    assert [one[:2] for one in found.rejected] == [(1, "malformed")]
    assert "refuses the conversation: no rain" in found.rejected[0].reason


def test_only_texts_need_a_template(tiny, tmp_path):
    shutil.copy(tiny.tokenizer / "tokenizer.model", tmp_path)
    bare = load_tokenizer(tmp_path / "tokenizer.model")
    found = encoder(bare, tmp_path)([{"prompt_ids": [1, 5], "response_ids": [6, 2]}])
    assert found.ids.tolist() == [1, 5, 6, 2]
    with pytest.raises(DataError, match=r"has no chat template; name .* chat_template=FILE"):
        encoder(bare, tmp_path)(RECORDS)


def test_prepare_takes_the_template_that_is_named(tiny, tmp_path, command, refused):
    shutil.copy(tiny.tokenizer / "tokenizer.model", tmp_path)
    (tmp_path / "chat.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    words = [f"inputs={tmp_path}/chat.jsonl", f"tokenizer={tmp_path}/tokenizer.model", "format=chat"]
    assert "chat_template=FILE" in refused("prepare", *words, f"out={tmp_path}/refused")
    assert "chat_template=no.jinja: No such file" in refused(
        "prepare", *words, f"out={tmp_path}/a", "chat_template=no.jinja"
    )
    assert command("prepare", *words, f"out={tmp_path}/out", "chat_template=llama2")[0] == 0
