"""Which tokens of a conversation are answers: as transformers finds them by a template's {% generation %} marks."""

from __future__ import annotations

import shutil

import pytest
from chat_templates import CHATML, FAMILIES, LLAMA2, LLAMA3, MISTRAL, PHI3, QWEN25, SMOLLM2, conversations, make
from transformers import AutoTokenizer

from dist_train.tokenizer import RefusedChatError, encode_answers, load_tokenizer

BEGIN, END = "{% generation %}", "{% endgeneration %}"


def split(template, expression, before, answer, after):
    """`template` with `expression`, which it writes for every role, in three where the role is the assistant's."""
    assert template.count(expression) == 1
    rest = f"{{{{ {after} }}}}" if after else ""
    parts = f"{{{{ {before} }}}}{BEGIN}{{{{ {answer} }}}}{END}{rest}"
    condition = "{% if message['role'] == 'assistant' %}"
    return template.replace(expression, f"{condition}{parts}{{% else %}}{expression}{{% endif %}}")


def around(template, expression):
    """`template` with marks around what it writes for the assistant alone."""
    assert template.count(expression) == 1
    return template.replace(expression, f"{BEGIN}{expression}{END}")


HEADER = "'<|im_start|>' + message['role'] + '\\n'"
LLAMA3_HEADER = "'<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'"
MARKED = {
    "chatml": CHATML.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}",
    ),
    "smollm2": split(
        SMOLLM2,
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        HEADER,
        "message['content'] + '<|im_end|>'",
        "'\\n'",
    ),
    "qwen2.5": split(
        QWEN25,
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        HEADER,
        "message['content'] + '<|im_end|>'",
        "'\\n'",
    ),
    "llama3": split(
        LLAMA3,
        f"{{{{- {LLAMA3_HEADER} + message.content | trim + '<|eot_id|>' }}}}",
        LLAMA3_HEADER,
        "message.content | trim + '<|eot_id|>'",
        "",
    ),
    "phi3": split(
        PHI3,
        "{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>' + '\\n' }}",
        "'<|' + message['role'] + '|>' + '\\n'",
        "message['content'] + '<|end|>'",
        "'\\n'",
    ),
    "llama2": around(LLAMA2, "{{ ' ' + content.strip() + ' ' + eos_token }}"),
    "mistral": around(MISTRAL, "{{- ' ' + message['content'] | trim + eos_token }}"),
}


def answered(count):
    """Conversations that end with an answer, without reasoning."""
    found = []
    for number, messages in enumerate(conversations(count)):
        answer = {"role": "assistant", "content": f"{number} answers, and the rain goes on"}
        said = [(one, one["content"].replace("think>", "")) for one in [*messages, answer]]
        found.append([{**one, "content": text if text.strip() else "well"} for one, text in said])
    return found


@pytest.mark.parametrize("name", MARKED)
def test_they_are_those_of_transformers(name, tiny, tmp_path):
    tokenizer = load_tokenizer(make(name, tmp_path / name, tiny))
    reference = AutoTokenizer.from_pretrained(tmp_path / name)
    turns = merged = 0
    for messages in answered(500):
        if name == "mistral":  # it moves the system message from turn to turn
            messages = [one for one in messages if one["role"] != "system"]
        how = {"chat_template": MARKED[name], "return_dict": True, "return_assistant_tokens_mask": True}
        expected = reference.apply_chat_template(messages, **how)
        plain = reference.apply_chat_template(messages, tokenize=False)
        assert reference.apply_chat_template(messages, chat_template=MARKED[name], tokenize=False) == plain
        (found,) = encode_answers(tokenizer, messages)
        assert found.ids == expected["input_ids"]
        prompts = [messages[:k] for k, one in enumerate(messages) if one["role"] == "assistant"]
        served = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        other = [
            i for i, both in enumerate(zip(found.mask, expected["assistant_masks"], strict=True)) if len({*both}) > 1
        ]
        for place in other:
            # transformers gives a token to the answer that begins in its middle, or at white space which a special
            # token takes along. No server drafts it.
            assert (found.mask[place], found.mask[place - 1], found.mask[place + 1]) == (0, 0, 1)
            is_special = found.ids[place] in tokenizer.special_ids.values()
            assert (found.ids[: place + 1] in served) == is_special
        merged += len(other)
        turns += sum(one["role"] == "assistant" and bool(one["content"].strip()) for one in messages)
    assert turns > 900
    assert merged < turns / 4
    if name in ("llama2", "mistral", "llama3"):
        assert merged == 0  # these trim answers, and write a space or a special token first


def test_real_chat_models(shared, tmp_path):
    """Llama 2's own tokenizer and template."""
    (tmp_path / "llama2").mkdir()
    for path in shared.rglob("tokenizer.model"):
        shutil.copy(path, tmp_path / "llama2")
    tokenizer = load_tokenizer(tmp_path / "llama2", chat_template="llama2")
    tokenizer.save(tmp_path / "saved")
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for messages in answered(60):
        try:
            (found,) = encode_answers(tokenizer, messages)
        except RefusedChatError:
            continue
        spans, inside = [], False
        for i, one in zip(found.ids, found.mask, strict=True):
            if one:
                spans = [*spans[:-1], [*spans[-1], i]] if inside else [*spans, [i]]
            inside = bool(one)
        said = [one["content"].strip() for one in messages if one["role"] == "assistant" and one["content"].strip()]
        assert [reference.decode(ids, skip_special_tokens=True).strip() for ids in spans] == said
        assert all(ids[-1] == reference.eos_token_id for ids in spans)


def test_reasoning_that_is_taken_out_of_earlier_answers_is_trained_on_where_it_was(tiny, tmp_path):
    tokenizer = load_tokenizer(make("qwen3", tmp_path / "qwen3", tiny))
    reference = AutoTokenizer.from_pretrained(tmp_path / "qwen3")
    messages = []
    for number, thought in enumerate(("<think>\nit rains\n</think>\n\n", "", "<think>\nit hums\n</think>\n\n")):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"{thought}answer {number}"},
        ]
    documents = encode_answers(tokenizer, messages)
    assert len(documents) == 2
    expected = [messages[:2], messages]
    for document, written in zip(documents, expected, strict=True):
        assert document.ids == reference.apply_chat_template(written)["input_ids"]
    trained = [
        reference.decode([i for i, one in zip(document.ids, document.mask, strict=True) if one]).split("<|im_end|>")
        for document in documents
    ]
    assert trained[0] == ["<think>\nit rains\n</think>\n\nanswer 0", ""]
    assert trained[1] == ["answer 1", "<think>\nit hums\n</think>\n\nanswer 2", ""]
    for document, answers in zip(documents, ([1], [3, 5]), strict=True):
        starts = [i for i, one in enumerate(document.mask) if one and not document.mask[i - 1]]
        prompts = [
            reference.apply_chat_template(messages[:k], add_generation_prompt=True)["input_ids"] for k in answers
        ]
        assert [document.ids[:start] for start in starts] == prompts


def test_what_a_template_does_not_write_where_it_asks_for_it_is_refused(tiny, tmp_path):
    """DeepSeek's R1 asks for reasoning, which it takes out of what was answered."""
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    with pytest.raises(RefusedChatError, match="writes message 2 after other text than it asks for that answer with"):
        encode_answers(load_tokenizer(make("deepseek", tmp_path / "deepseek", tiny)), chat)
    with pytest.raises(RefusedChatError, match="writes message 3 after other text"):
        encode_answers(
            load_tokenizer(make("mistral", tmp_path / "mistral", tiny)), [{"role": "system", "content": "be"}, *chat]
        )
    folder = make("chatml", tmp_path / "chatml", tiny)
    endless = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}"
    )
    ended = [*chat[:1], {"role": "assistant", "content": "an answer."}]
    for template, said in (
        (endless + "<|im_start|>assistant:{% endif %}", "ends message 2, an answer, with no special token"),
        (
            CHATML.replace(
                "{{ message.content }}", "{{ message.content ~ ('.' if not message.content.endswith('.') else '') }}"
            ),
            "rewrites answers by what they end with",
        ),
    ):
        (tmp_path / "other.jinja").write_text(template)
        with pytest.raises(RefusedChatError, match=said):
            encode_answers(load_tokenizer(folder, chat_template=str(tmp_path / "other.jinja")), ended)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek", "gemma"}))
def test_special_tokens_that_an_answer_spells_out_stay_text_and_end_nothing(name, tiny, tmp_path):
    tokenizer = load_tokenizer(make(name, tmp_path / name, tiny))
    own = {token: i for token, i in tokenizer.special_ids.items() if token != "<unk>"}
    token = next(token for token in own if token not in (FAMILIES[name].bos,))
    chat = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": f"one {token} two"},
        {"role": "user", "content": "another"},
        {"role": "assistant", "content": "three"},
    ]
    (found,) = encode_answers(tokenizer, chat)
    harmless = [{**one, "content": one["content"].replace(token, "x")} for one in chat]
    (plain,) = encode_answers(tokenizer, harmless)
    special = [(i, one) for i, one in zip(found.ids, found.mask, strict=True) if i in own.values()]
    assert special == [(i, one) for i, one in zip(plain.ids, plain.mask, strict=True) if i in own.values()]
    said = AutoTokenizer.from_pretrained(tmp_path / name).decode(
        [i for i, one in zip(found.ids, found.mask, strict=True) if one]
    )
    assert "".join(f"one{token}two".split()) in "".join(said.split())


def test_only_answers_to_somebody_count(tiny, tmp_path):
    tokenizer = load_tokenizer(make("chatml", tmp_path / "chatml", tiny))
    greeting, question = {"role": "assistant", "content": "hello"}, {"role": "user", "content": "what?"}
    assert encode_answers(tokenizer, [greeting, question]) == []
    assert encode_answers(tokenizer, [question, {"role": "assistant", "content": " "}]) == []
    (found,) = encode_answers(tokenizer, [greeting, question, {**greeting, "content": "yes"}, question])
    reference = AutoTokenizer.from_pretrained(tmp_path / "chatml")
    assert found.ids == reference.apply_chat_template([greeting, question, {**greeting, "content": "yes"}])["input_ids"]
    assert reference.decode([i for i, one in zip(found.ids, found.mask, strict=True) if one]) == "yes<|im_end|>"
