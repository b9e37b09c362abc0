"""Chat templates of our own, each in the manner of a family of models, with the special tokens that it needs."""

from __future__ import annotations

import json
import random
import shutil
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A template, or several by name, and what its tokenizer has."""

    template: str | dict[str, str]
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    """special tokens besides"""
    added: tuple[str, ...] = ()
    """tokens that are added but not special, as <think> is"""
    kind: str = "bytes"
    """bytes: byte-level BPE; metaspace: BPE with a space before the first word of all; sentencepiece: such a model"""
    rstrip: bool = False
    """whether special tokens take the white space after them along"""


CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is defined and tools is not none %}{{- tools | tojson(indent=4) }}{% endif %}
{%- for message in turns %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help whoever asks.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN3 = """{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.looking = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after the system message, user and assistant take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST]' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{% endif %}
    {%- else %}{{- ' ' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string %}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable %}{% for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}
    {%- endif %}
    {{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

PHI4 = """{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}\
{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

PHI3 = """{% for message in messages %}\
{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a small and helpful assistant<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SMOLLM3 = """{%- set mode = '/think' %}{% set custom = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set turns = messages[1:] %}
    {%- if '/no_think' in messages[0].content %}{% set mode = '/no_think' %}{% endif %}
    {%- set custom = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\nReasoning Mode: ' ~ mode ~ '\\n\\n' ~ custom }}
{{- '<|im_end|>\\n' }}
{%- for message in turns %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {% generation %}
        {%- if mode == '/think' %}
            {{- '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + '<think>\\n\\n</think>\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}
    {%- set day = strftime_now('%B %d, %Y') %}
    {%- set system = 'Knowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + day + '.\\nYou help.' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if documents %}{% for document in documents %}{{- document['text'] }}{% endfor %}{% endif %}
{%- for message in turns %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
{%- endfor %}
"""

COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}\
{% if system != false %}\
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}\
{% for message in turns %}{% set content = message['content'] %}\
{% if message['role'] == 'user' %}\
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(system='') %}\
{% for message in messages %}{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}\
{% endfor %}{{ bos_token }}{{ ns.system }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}\
{% for message in turns %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% set content = system + message['content'] if loop.first else message['content'] %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_THINK = ("<think>", "</think>")
_COMMAND_R = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "USER", "CHATBOT", "SYSTEM"))

FAMILIES = {
    "llama2": Family(LLAMA2, "<s>", "</s>", kind="sentencepiece"),
    "llama3": Family(
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(200))),
    ),
    "qwen2.5": Family(QWEN25, None, "<|im_end|>", _IM, ("<tool_response>", "</tool_response>")),
    "qwen3": Family(QWEN3, None, "<|im_end|>", _IM, _THINK),
    "mistral": Family(MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"), kind="metaspace"),
    "gemma": Family(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi4": Family(PHI4, "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
    "phi3": Family(PHI3, "<s>", "<|endoftext|>", ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"), rstrip=True),
    "smollm2": Family(SMOLLM2, "<|im_start|>", "<|im_end|>", _IM),
    "smollm3": Family(SMOLLM3, None, "<|im_end|>", _IM, _THINK),
    "granite": Family(GRANITE, "<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>")),
    "hermes": Family({"default": CHATML, "tool_use": CHATML + "{{ tools | tojson }}"}, None, "<|im_end|>", _IM),
    "command-r": Family(
        {"default": COMMAND_R, "tool_use": "{{ tools }}", "rag": "{{ documents }}"},
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        _COMMAND_R,
    ),
    "deepseek": Family(
        DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), _THINK
    ),
    "chatml": Family(CHATML, None, "<|im_end|>", _IM, kind="metaspace"),
}


TEXTS = (
    "the kettle hums on a shelf when rain begins, and nobody minds",
    "日本語のテキスト",
    "naïve café 🙂",
    "1 + 2 = 3\n",
)


def bytewise():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def spaced(folder):
    """As Mistral's and others: one space goes before all, none after a special token."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = content["post_processor"] = None
    content["added_tokens"] = content["added_tokens"][:1]  # <unk>
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def make(name, folder, tiny):
    """The folder of a family's tokenizer."""
    family = FAMILIES[name]
    if family.kind == "sentencepiece":
        shutil.copytree(tiny.tokenizer, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": family.template}))
        return folder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise() if family.kind == "bytes" else spaced(tiny.tokenizer),
        bos_token=family.bos,
        eos_token=family.eos,
        extra_special_tokens=[
            tokenizers.AddedToken(token, special=True, normalized=False, rstrip=family.rstrip)
            for token in family.special
        ],
        clean_up_tokenization_spaces=False,
        chat_template=family.template,
    )
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in family.added])
    tokenizer.save_pretrained(folder)
    return folder


def conversations(count, spelled=()):
    """System messages, several turns, Unicode, reasoning, white space; with `spelled`, such tokens, whole and torn."""
    drawn = random.Random(count)
    torn = [token[at:] if at % 2 else token[:at] for token in spelled for at in (1, 3, len(token) - 1)]
    words = [*TEXTS, "  ", "\n", " trailing ", "/no_think", "<think>", "</think>\n", ">", "<", "system", "x" * 60]
    words += [
        "\ue000",
        "\U000f0000\U000f0001",
        "<tool_response>",
        "{{ messages }}",
        "[INST",
        *(torn + list(spelled)) * 2,
    ]

    def text():
        return " ".join(drawn.choices(words, k=drawn.randrange(1, 7)))

    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": text()}] * (drawn.random() < 0.4)
        for _ in range(drawn.randrange(3)):
            reasoning = f"<think>\n{text()}\n</think>\n\n" if drawn.random() < 0.5 else ""
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": reasoning + text()}]
        found.append([*messages, {"role": "user", "content": text()}])
    return found
