"""Answers from OpenAI-compatible servers: a real one, and one that fails in every way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from traceback import walk_stack

import pytest
import sentencepiece
import torch
from generations import FAULTS, files, generation, rows
from transformers import AutoModelForCausalLM

from dist_train.errors import UserError
from dist_train.generate.answers import read_origin
from dist_train.runtime.world import free_port
from dist_train.serving.http import Client


def asking(tiny, out, url, *more):
    engine = ["engine.kind=openai", f"engine.url={url}", "engine.model=tiny", "engine.concurrency=16"]
    return generation(tiny, out, *engine, *more)


def test_each_request_is_answered_once_by_a_server_that_fails(tiny, here, fake_server, tmp_path):
    server = fake_server(faults=0.3)
    options = ["seeds.limit=20", "samples=2", "top_p=[0.9, 1.0]", "temperatures=[0, 0.5, 1.0]"]
    code, _, complaint = here(*asking(tiny, tmp_path / "out", server.url, *options))
    assert code == 0, complaint
    assert set(server.failed) == {None, *FAULTS}
    found = rows(tmp_path / "out")
    conditions = [(0.0, None, 0)] + [(t, p, s) for t in (0.5, 1.0) for p in (0.9, 1.0) for s in (0, 1)]
    kinds = [(r["temperature"], r["top_p"] and round(r["top_p"], 3), r["sample"], r["seed"]) for r in found]
    assert kinds == [(*condition, seed) for condition in conditions for seed in range(20)]
    assert len({row["request_seed"] for row in found}) == len(found)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    for row in found:
        ids, reason = server.answer(row["prompt_ids"], row["request_seed"], row["temperature"], 24)
        assert (row["response_ids"], row["finish_reason"], row["reencoded"]) == (ids, reason, False)
        assert row["response"] == reference.decode(ids)
        assert row["prompt_ids"] == reference.encode(f"[INST] {row['prompt'].strip()} [/INST]", add_bos=True)
    asked = {(tuple(row["prompt_ids"]), row["request_seed"]) for row in found}
    assert set(server.answered) == asked
    assert 4 <= server.most_under_way <= 16
    before = files(tmp_path / "out")
    here(*asking(tiny, tmp_path / "out", server.url, *options))
    assert files(tmp_path / "out") == before


def test_a_server_that_tells_no_ids(tiny, here, fake_server, tmp_path):
    server = fake_server(style="bare")
    code, told, complaint = here(*asking(tiny, tmp_path / "out", server.url, "seeds.limit=8"))
    assert code == 0, complaint
    assert "takes no top_k" in told and "100% encoded again" in told
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    for row in rows(tmp_path / "out"):
        ids, reason = server.answer(row["prompt_ids"], row["request_seed"], row["temperature"], 24)
        ended = [2] if reason == "stop" else []
        assert row["reencoded"] and row["finish_reason"] == reason
        assert row["response_ids"] == reference.encode(reference.decode(ids)) + ended


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({}, ["engine.model=gpt"], "refused for model 'gpt' with 404: The model `gpt` does not exist.; it has tiny"),
        ({"shift": 400}, [], "is not in the target's vocabulary of 320"),
        ({"text": "quite another text"}, ["batch_size=8"], "the server has another tokenizer"),
        *(
            ({"choice": choice}, [], f"not an answer of OpenAI's protocol: {{'choices': [{{'index': 0, 'text': {said}")
            for choice, said in (
                ({"text": None}, "None"),
                ({"text": 5}, "5"),
                ({"text": "a\ud800"}, r"'a\ud800'"),
                ({"text": "a", "token_ids": ["5", "6"]}, "'a'"),
                ({"text": "a", "token_ids": [5.5]}, "'a'"),
                ({"text": "a", "token_ids": 7}, "'a'"),
            )
        ),
        ({"choice": {"token_ids": [-5, 6]}}, [], "token id -5 is not in the target's vocabulary of 320"),
        ({"choice": {"text": "", "token_ids": [5] * 25}}, [], "asked for at most 24 tokens, the server answered 25"),
        ({"choice": {"token_ids": None, "text": "the model " * 200}}, [], "asked for at most 24 tokens, the server"),
        ({"faults": 1.0}, ["engine.patience=1"], "gave up after"),
        (None, ["engine.patience=1"], "http://127.0.0.1:9/v1: gave up after"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_in_one_line(tiny, here, fake_server, tmp_path, server, options, message):
    url = "http://127.0.0.1:9/v1" if server is None else fake_server(**server).url
    code, _, complaint = here(*asking(tiny, tmp_path / "out", url, *options))
    assert code == 2
    assert message in complaint and complaint.count("\n") == 1, complaint
    assert not files(tmp_path / "out")


def test_a_server_that_is_gone_is_told_at_once_and_one_that_is_busy_now_and_then_is_not(fake_server, capsys, tiny):
    with pytest.raises(UserError, match="gave up after"):
        Client("http://127.0.0.1:19/v1", None, timeout=5, patience=0.5).ask("GET", "/models")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("http://127.0.0.1:19/v1: [Errno 111]") and line.endswith("asked again, for 0 s more")
    server = fake_server(stuck="the", stuck_by=503)
    client = Client(server.url, None, timeout=5, patience=0.5)
    client.ask("GET", "/models")
    body = {"model": "tiny", "prompt": server.tokenizer.encode("the model"), "max_tokens": 5}
    with pytest.raises(UserError, match="503 try later"):
        client.ask("POST", "/completions", body)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stuck_by", [503, "silence"])
def test_whichever_request_finds_what_is_wrong_the_others_end_with_it(tiny, here, fake_server, tmp_path, stuck_by):
    """The first is tried again and again, or waited for, and would be for ten minutes."""
    first = json.loads(tiny.chat_lines.read_text().splitlines()[0])["prompt"]
    server = fake_server(text="quite another text", stuck=first, stuck_by=stuck_by)
    began = time.monotonic()
    code, _, complaint = here(*asking(tiny, tmp_path / "out", server.url))
    assert code == 2 and "the server has another tokenizer" in complaint
    assert server.failed[stuck_by]
    while Client.ask.__code__ in {at.f_code for top in sys._current_frames().values() for at, _ in walk_stack(top)}:
        time.sleep(0.1)
    assert time.monotonic() - began < 120
    assert not list((tmp_path / "out").glob("_claim-*"))


def test_a_folder_in_which_nothing_could_be_begun_takes_the_corrected_command(tiny, here, fake_server, tmp_path):
    server, broken = fake_server(), tmp_path / "broken"
    shutil.copytree(tiny.target, broken)
    os.truncate(broken / "model.safetensors", 2000)
    asked, loaded = (tmp_path / name for name in ("asked", "loaded"))
    for command, wrong, why, right in (
        (asking(tiny, asked, server.url), "engine.model=tinyy", "refused for model 'tinyy'", "engine.model=tiny"),
        (
            generation(tiny, loaded),
            f"target.path={broken}",
            f"{broken}/model.safetensors: ",
            f"target.path={tiny.target}",
        ),
    ):
        code, _, complaint = here(*command, "seeds.limit=4", wrong)
        assert code == 2 and why in complaint
        code, _, complaint = here(*command, "seeds.limit=4", right)
        assert code == 0, complaint
    assert len(files(asked)) == len(files(loaded)) == 2


def test_mistakes_in_the_configuration(tiny, refused, other_tokenizer, tmp_path):
    for options, message in (
        (["engine.kind=openai"], "kind openai needs url"),
        (["engine.kind=openai", "engine.url=http://node7:80a/v1"], "url http://node7:80a/v1: Port could not be"),
        (["temperatures=[0, .inf]"], "temperatures.1"),
        (["seeds.dataset={path: x}"], "seeds: inputs is required, or dataset, and not both"),
        (["seeds.prompt_field=question"], "no prompt in 'question'"),
        (["seeds.format=dolly"], "'instruction' and 'context'"),
        ([f"tokenizer={other_tokenizer}"], f"{other_tokenizer} is not the tokenizer of {tiny.target}: pieces: "),
        (["temperatures=[-1]"], "temperatures.0"),
        (["max_new_tokens=250"], "set seeds.max_tokens=6"),
        (["max_new_tokens=256"], "set max_new_tokens below 256"),
    ):
        assert message in refused(*generation(tiny, tmp_path / "out", *options))


@pytest.fixture(scope="module")
def speaker(tiny, tmp_path_factory):
    """The tiny target, which never says bytes or special tokens: a server's text would not tell them."""
    folder = tmp_path_factory.mktemp("speaker") / "target"
    shutil.copytree(tiny.target, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "suppress_tokens": [0, 1, *range(3, 259)]}))
    return folder


@pytest.fixture(scope="module")
def served(speaker, tmp_path_factory):
    """URL of `transformers serve` with the tiny target."""
    pytest.importorskip("fastapi", reason="pip install 'dist-train[serve]'")
    pytest.importorskip("openai", reason="pip install 'dist-train[serve]'")
    transformers = Path(sys.executable).parent / "transformers"
    port = free_port()
    log = (tmp_path_factory.mktemp("served") / "log").open("w+")
    command = [shutil.which(transformers), "serve", speaker, "--port", port, "--host", "127.0.0.1"]
    options = ["--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([str(word) for word in [*command, *options]], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                    json.load(answer)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_transformers_serve_gives_the_targets_own_answers(tiny, here, speaker, served, tmp_path):
    options = [f"engine.model={speaker}", f"target.path={speaker}", "seeds.limit=12", "temperatures=[0, 1.0]"]
    code, _, complaint = here(*asking(tiny, tmp_path / "out", served, *options))
    assert code == 0, complaint
    model = AutoModelForCausalLM.from_pretrained(speaker)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer / "tokenizer.model"))
    found = rows(tmp_path / "out")
    assert [row["seed"] for row in found] == [*range(12), *range(12)]
    for row in found[:12]:
        greedy = model.generate(
            torch.tensor([row["prompt_ids"]]), max_new_tokens=24, do_sample=False, pad_token_id=2, eos_token_id=2
        )[0, len(row["prompt_ids"]) :].tolist()
        assert row["response"].strip() == reference.decode(greedy).strip()
        assert row["finish_reason"] == ("stop" if greedy[-1] == 2 else "length")
        assert row["reencoded"]
    assert len({row["response"] for row in found[12:]}) == 12
    assert read_origin(tmp_path / "out" / "unit-000000.parquet")["engine"] == "openai"


KEY = "sk-the-secret"


def test_a_key_goes_only_where_the_configuration_sends_it(tiny, here, fake_server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server, heads = fake_server(), []
    heard = server.RequestHandlerClass.do_POST
    monkeypatch.setattr(
        server.RequestHandlerClass, "do_POST", lambda self: (heads.append(self.headers["Authorization"]), heard(self))
    )
    code, _, complaint = here(*asking(tiny, tmp_path / "none", server.url, "seeds.limit=2"))
    assert (code, set(heads)) == (0, {None}), complaint
    heads.clear()
    code, _, _ = here(
        *asking(tiny, tmp_path / "key", server.url, "seeds.limit=2", "engine.key_variable=OPENAI_API_KEY")
    )
    assert (code, set(heads)) == (0, {f"Bearer {KEY}"})
    for path in (tmp_path / "key").iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_secrets_are_neither_sent_in_the_clear_nor_shown(tiny, here, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    named = "engine.key_variable=OPENAI_API_KEY"
    for url, more, message in (
        ("http://node7:8000/v1", [named], "url http://node7:8000/v1: a key is not sent in the clear"),
        ("http://127.0.0.1:9/v1", ["engine.key_variable=NO_SUCH_KEY"], "NO_SUCH_KEY is not set here"),
        (f"http://me:{KEY}@127.0.0.1:9/v1", [], "url ***@127.0.0.1:9/v1: what stands before @ would be kept"),
        (f"http://me:{KEY}/x@127.0.0.1:9/v1", [], "what stands before @ would be kept"),
    ):
        code, told, complaint = here(*asking(tiny, tmp_path / "out", url, *more))
        assert (code, complaint.count("\n")) == (2, 1) and message in complaint
        code, dry, _ = here(*asking(tiny, tmp_path / "out", url, *more), "--dry-run")
        assert KEY not in told + complaint + dry
    assert not list(tmp_path.rglob("*.*"))
