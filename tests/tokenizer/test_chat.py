"""Chats: rendered by transformers, with its ids, save where a message spells out a special token."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
from chat_templates import CHATML, FAMILIES, conversations, make
from transformers import AutoTokenizer

from dist_train.errors import UserError
from dist_train.tokenizer import RefusedChatError, load_tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name, tiny, tmp_path):
    tokenizer = load_tokenizer(make(name, tmp_path / name, tiny))
    reference = AutoTokenizer.from_pretrained(tmp_path / name)
    own = {token: i for token, i in tokenizer.special_ids.items() if token != "<unk>"}
    for messages in conversations(200):
        said = "".join(message["content"] for message in messages)
        assert not any(token in said for token in own)
        found = tokenizer.encode_chat(messages)
        assert found.ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_a_message_spells_out_stay_text(name, tiny, tmp_path):
    """The rest is as transformers has it: all of the text, and the template's own special ids in their order."""
    tokenizer = load_tokenizer(make(name, tmp_path / name, tiny))
    reference = AutoTokenizer.from_pretrained(tmp_path / name)
    own = {token: i for token, i in tokenizer.special_ids.items() if token != "<unk>"}
    ids = set(own.values())
    spelled = [token for token in own if "reserved" not in token or token.endswith("_7|>")]
    told = []
    for messages in conversations(200, spelled):
        found = tokenizer.encode_chat(messages)
        rendered = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        harmless = [{**one, "content": re.sub("|".join(map(re.escape, own)), "a", one["content"])} for one in messages]
        plain = reference.apply_chat_template(harmless, add_generation_prompt=True)["input_ids"]
        assert [i for i in found.ids if i in ids] == [i for i in plain if i in ids]
        assert "".join(reference.decode(found.ids).split()) == "".join(rendered.split())
        as_served = reference(rendered, add_special_tokens=False).input_ids
        assert found.by_parts == (found.ids != as_served)
        told.append(found.by_parts)
    assert 50 < sum(told) < 200


def test_a_message_cannot_end_a_special_token_that_the_template_begins(tiny, tmp_path):
    folder = make("chatml", tmp_path / "tokenizer", tiny)
    template = tmp_path / "open.jinja"
    template.write_text("{% for m in messages %}<|im_start|>say <|im_{{ m.content }}|><|im_end|>{% endfor %}")
    tokenizer = load_tokenizer(folder, chat_template=str(template))
    special = tokenizer.special_ids
    for content in ("end", "start", " end|>", "end|> and more", "more"):
        found = tokenizer.encode_prompt([{"role": "user", "content": content}])
        assert [i for i in found if i in special.values()] == [special["<|im_start|>"], special["<|im_end|>"]], content


def test_what_cannot_be_told_apart_is_refused(tiny, tmp_path):
    """A template that ends a message only where it does not end itself."""
    template = tmp_path / "ends.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}{% if not m.content.endswith('<|im_end|>') %}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(make("chatml", tmp_path / "tokenizer", tiny), chat_template=str(template))
    assert not tokenizer.encode_chat([{"role": "user", "content": "hello"}]).by_parts
    with pytest.raises(RefusedChatError, match="spells out special tokens"):
        tokenizer.encode_chat([{"role": "user", "content": "hello<|im_end|>"}])


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_additional_templates_are_found(kind, tiny, tmp_path):
    shutil.copytree(tiny.tokenizer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    if kind == "huggingface":
        (tmp_path / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": "{{ tools }}"}
    assert "user" in tokenizer.decode(tokenizer.encode_prompt([{"role": "user", "content": "the model"}]))
    tokenizer.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.chat_template


def test_a_template_that_reads_parts_is_given_parts(tiny, tmp_path):
    template = tmp_path / "parts.jinja"
    loop = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    template.write_text(f"{{% for m in messages %}}<|im_start|>{loop}<|im_end|>{{% endfor %}}")
    folder = make("chatml", tmp_path / "tokenizer", tiny)
    found = load_tokenizer(folder, chat_template=str(template)).encode_prompt(
        [{"role": "user", "content": "the model"}]
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "the model"}]}]
    reference = AutoTokenizer.from_pretrained(folder)
    assert found == reference.apply_chat_template(parts, chat_template=template.read_text())["input_ids"]


def test_without_a_template_none_is_made_up(tiny, tmp_path):
    bare = tmp_path / "tokenizer.model"
    shutil.copy(tiny.tokenizer / "tokenizer.model", bare)
    with pytest.raises(UserError, match=r"has no chat template; name .* chat_template=FILE"):
        load_tokenizer(bare).encode_prompt([{"role": "user", "content": "x"}])
    load_tokenizer(bare).save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template is None
    load_tokenizer(bare, chat_template="llama2").save(tmp_path / "named")
    assert "[INST]" in AutoTokenizer.from_pretrained(tmp_path / "named").chat_template
    with pytest.raises(
        UserError, match="chat_template=llama3: No such file or directory; name a Jinja file, or one of"
    ):
        load_tokenizer(bare, chat_template="llama3")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | upper }}{{ 'x' }", "cannot be rendered: TemplateSyntaxError"),
        ("fixed text", "does not keep what a user says"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered: RecursionError"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "cannot be rendered: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered: SecurityError"),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 2 GiB"),
        ("{% for i in range(400) %}{{ 'a' * 100000 }}{% endfor %}", "makes 40,000,000 characters of 17"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
    ],
)
def test_a_template_that_does_not_work_ends_in_one_line(tiny, tmp_path, monkeypatch, template, message):
    monkeypatch.setattr("dist_train.tokenizer.chat._SECONDS", 0.5)
    (tmp_path / "bad.jinja").write_text(template)
    tokenizer = load_tokenizer(tiny.tokenizer, chat_template=str(tmp_path / "bad.jinja"))
    began = time.process_time()
    with pytest.raises(UserError, match=message) as raised:
        tokenizer.encode_prompt([{"role": "user", "content": "x"}])
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(tokenizer.source)
    assert time.process_time() - began < 4
