"""llama.cpp's server: its answers are the target's own, what it counts is what our decoder counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from served_pair import (
    END,
    GAMMA,
    NEW_TOKENS,
    POSITIONS,
    assert_same_distribution,
    assert_same_efficiency,
    assert_served_as_offline,
    counters,
    evaluate_serving,
    named,
)

from data_shards.files import read_json
from dist_train.errors import UserError
from dist_train.serving.gguf import write_gguf
from dist_train.serving.http import Client
from dist_train.serving.launch import running
from dist_train.serving.llama_cpp import SERVER, complete, find_program, llama_cpp_command
from dist_train.serving.vllm import counted_between

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

SLOTS = 4
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # a cache in fp16 is the default


@pytest.fixture(scope="module")
def gguf(pair, llama_cpp, tmp_path_factory):
    """`gguf("f16")` is the pair as GGUF files of that type."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def convert(kind):
        if kind not in made:
            made[kind] = [root / f"{name}-{kind}.gguf" for name in ("target", "drafter")]
            for folder, file in zip((pair.target, pair.drafter), made[kind], strict=True):
                write_gguf(folder, file, llama_cpp, kind)
        return made[kind]

    return convert


@pytest.fixture(scope="module")
def server(gguf, llama_cpp, tmp_path_factory):
    """`with server("f32", GAMMA) as client`: of the pair, or of the target alone where gamma is 0."""
    logs = tmp_path_factory.mktemp("logs")

    @contextmanager
    def start(kind, gamma):
        target, drafter = gguf(kind)
        command = llama_cpp_command(
            find_program(llama_cpp, SERVER),
            target,
            drafter=drafter,
            gamma=gamma,
            slots=SLOTS,
            positions=POSITIONS,
            threads=1,
            more=EXACT,
        )
        with running(command, logs / f"{kind}-{gamma}.log", patience=120) as url:
            yield Client(url, None, timeout=120, patience=0)

    return start


def answered(client, prompts, **how):
    """The answers to all prompts, each with a seed of its own, as many at a time as the server has slots."""
    with ThreadPoolExecutor(SLOTS) as pool:
        return [*pool.map(lambda i: complete(client, prompts[i], NEW_TOKENS, seed=i, **how), range(len(prompts)))]


def drafts_of_llama_cpp(decoded):
    """Drafted and accepted tokens of each draft that llama.cpp makes where our decoder made `decoded`, by prompt.

    It drafts no more tokens than may still come beside the target's own, and none where only that one may; and it
    accepts no draft that ends the text, save the last of its block.
    """
    drafts = []
    for tokens, blocks in zip(decoded.tokens, decoded.blocks, strict=True):
        drafts.append([])
        left = len(tokens)
        for block in blocks:
            room = min(GAMMA, NEW_TOKENS - 1 - (len(tokens) - left) - 1)
            accepted = min(block - 1, room)
            if tokens[-1] == END and left < room:
                accepted = min(accepted, left - 1)
            if room:
                drafts[-1].append((room, accepted))
            left -= block
    return drafts


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_greedy_answers_are_the_targets_and_counts_are_our_decoders(pair, server, kind):
    with server(kind, 0) as client:
        plain = answered(client, pair.prompts)
    with server(kind, GAMMA) as client:
        before = counters(client.url)
        drafted = answered(client, pair.prompts)
        counted = counted_between(before, counters(client.url))
    assert [answer.tokens for answer in plain] == [answer.tokens for answer in drafted]
    assert not any(answer.drafted or answer.accepted for answer in plain)
    assert all(0 < answer.seconds < 60 for answer in plain)
    assert counted.drafted == sum(answer.drafted for answer in drafted)
    assert counted.accepted == sum(answer.accepted for answer in drafted) > 0.3 * counted.drafted
    assert len(counted.by_position) == GAMMA
    if kind == "f32":  # in f16 llama.cpp rounds activations, too
        assert [answer.tokens for answer in plain] == pair.greedy
        drafts = drafts_of_llama_cpp(pair.decode(pair.greedy))
        expected = [[sum(counts) for counts in zip(*of_prompt, strict=True)] for of_prompt in drafts]
        assert [[answer.drafted, answer.accepted] for answer in drafted] == expected
        assert counted.drafts == sum(map(len, drafts))


def test_sampled_answers_have_the_targets_distribution(pair, server):
    """llama.cpp's drafts are the drafter's likeliest tokens, also where the target samples."""
    repeats, temperature = 20, 0.7
    many = replace(pair, prompts=pair.prompts * repeats)
    with server("f32", GAMMA) as client:
        before = counters(client.url)
        answers = answered(client, many.prompts, temperature=temperature)
        counted = counted_between(before, counters(client.url))
        short = answered(client, pair.prompts[:1] * 1500, temperature=temperature)
    assert_same_distribution(pair, [answer.tokens for answer in short], temperature)
    drafts = drafts_of_llama_cpp(many.decode([answer.tokens for answer in answers], temperature))
    ours = [[1 + accepted for _, accepted in of_prompt] for of_prompt in drafts]
    assert_same_efficiency(counted.drafts, counted.accepted, ours)


def test_evaluate_reads_its_counters(pair, server, tiny, command, tmp_path):
    with server("f32", GAMMA) as client:
        code, _, complaint = command(
            "evaluate",
            f"target.path={pair.target}",
            f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 10}}]",
            f"out={tmp_path / 'out'}",
            "temperatures=[0]",
            f"max_new_tokens={NEW_TOKENS}",
            "--server",
            client.url,
        )
    assert code == 0, complaint
    (row,) = read_json(tmp_path / "out" / "served.json")["rows"]
    assert 1.2 < row["block_efficiency"] < GAMMA + 1 and len(row["accepted_shares"]) == GAMMA


def test_what_it_refuses_is_told(pair, server):
    with server("f32", 0) as client, pytest.raises(UserError, match=r"/completion: answers 400: .*context size"):
        complete(client, [1] * (POSITIONS + 1), 4)


def test_a_file_that_is_no_model_is_told_by_its_last_words(llama_cpp, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF, but nothing else")
    command = llama_cpp_command(find_program(llama_cpp, SERVER), tmp_path / "no.gguf")
    told = pytest.raises(UserError, match=r"llama.cpp ended with exit code 1 before it answered; it said: .*no\.gguf")
    with told, running(command, tmp_path / "log", patience=60):
        pass


TEXTS = [
    "Hello world",
    " two  spaces and a tab\t.",
    "distribute it.\n\n4. You may",
    "3.14159 1,000,000 12345678",
    "½ ² Ⅷ ①②③ ١٢٣",
    "don't we're I'LL",
    "中文测试 日本語 한국어 Привет 😀👨‍👩‍👧",
    "def f(x):\n        return x ** 2\n\n\n",
    "<|im_start|>user\nno end<|im_end|>\n",
    "   \n  7  \n",
    "",
]


def test_a_chat_models_file_becomes_a_folder_that_reads_texts_as_llama_cpp_does(llama_cpp, tmp_path):
    from transformers import AutoTokenizer

    from dist_train.models.gguf import unpacked_gguf
    from dist_train.tokenizer import load_tokenizer

    file = named("DIST_TRAIN_SMOLLM2")
    folder = unpacked_gguf(file, tmp_path / "cache")
    own, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    command = llama_cpp_command(find_program(llama_cpp, SERVER), file, positions=64)
    with running(command, tmp_path / "log", patience=120) as url:
        client = Client(url, None, timeout=60, patience=0)
        for special, encode in ((False, own.encode), (True, lambda text: theirs(text).input_ids)):
            for text in TEXTS:
                asked = {"content": text, "add_special": False, "parse_special": special}
                assert encode(text) == client.ask("POST", "/tokenize", asked)["tokens"], text
        chat = [{"role": "user", "content": "What is a draft model?"}]
        prompt = client.ask("POST", "/apply-template", {"messages": chat})["prompt"]
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
    assert (own.bos_id, own.eos_id, own.adds_bos) == (1, 2, False)


def test_evaluate_serves_the_pair_and_finds_what_it_finds_offline(pair, llama_cpp, tiny, command, tmp_path):
    out = tmp_path / "out"
    words = evaluate_serving(pair, tiny, out, f"serve.program={llama_cpp}", "serve.arguments=[-t, '1']")
    code, said, complaint = command(*words, "--serve", "llama.cpp")
    assert code == 0, complaint
    assert_served_as_offline(read_json(out / "results.json"), "llama.cpp")
    assert "Served by llama.cpp" in said and "40 of 40" in said
    assert "Served by llama.cpp" in (out / "results.html").read_text()
    assert {path.name for path in (out / "served").iterdir()} == {"llama.cpp-near-3.log", "llama.cpp-none-0.log"}
    assert not [*out.glob(".served-*")]
