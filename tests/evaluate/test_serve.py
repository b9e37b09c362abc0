"""`dist-train evaluate --serve`: its faults and its table, with a small program in llama-server's place.

Real servers are asked in tests/serving.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.files import read_json
from dist_train.decoding.served import generate_as_served
from dist_train.decoding.speculative import speculative_generate
from dist_train.evaluate.serve import Costs, best_gammas

# Answers 8 tokens to every prompt: with a drafter, 3 drafts of 2 tokens of which 4 are accepted in all, another last
# token for the first prompt that it is asked of each length, and so on, as the file `how` beside it says.
SERVER = """#!{python}
import http.server, json, os, pathlib, signal, sys, time
how, pid = (pathlib.Path({folder!r}) / name for name in ("how", "pid"))
how = how.read_text()
pid.write_text(str(os.getpid()))
port = int(sys.argv[sys.argv.index("--port") + 1])
if how == "dies":
    print("llama_model_load: error loading model: tensor missing", flush=True)
    sys.exit(1)
if how == "port":
    print("couldn't bind HTTP server socket, hostname: 127.0.0.1, error: address already in use", flush=True)
    sys.exit(1)
if how == "memory":
    os.kill(os.getpid(), signal.SIGKILL)
drafter = "-md" in sys.argv

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self._say({{"status": "ok", "build_info": "b1-stand-in"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if how == "ends" and asked["n_predict"] > 8:
            print("GGML_ASSERT failed: n_tokens <= n_batch", flush=True)
            os._exit(134)
        if how == "hangs":
            pid.with_name("asked").touch()
            time.sleep(600)
        tokens = [7] * 7 + [9 if drafter and how == "differs" else 8]
        if asked["n_predict"] == 1:
            return self._say({{"tokens": [7], "timings": {{"predicted_ms": 1.0}}}})
        time.sleep(3 * 0.1 if drafter else 7 * 0.05)  # calls
        timings = {{"predicted_ms": 1.0}}
        if drafter and how != "never drafts":
            timings |= {{"draft_n": 6, "draft_n_accepted": 4}}
        self._say({{"tokens": tokens, "timings": timings}})
    def _say(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path):
    """A folder as llama.cpp's sources are, built; `stand_in("dies")` says how its server behaves."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    server = folder / "build" / "bin" / "llama-server"
    server.write_text(SERVER.format(python=sys.executable, folder=str(tmp_path)))
    server.chmod(0o755)
    converter = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'GGUF')\n"
    (folder / "convert_hf_to_gguf.py").write_text(converter)

    def behave(how):
        (tmp_path / "how").write_text(how)
        return folder

    return behave


@pytest.fixture
def words(tiny, tmp_path):
    """The words of a small evaluation that serves what `stand_in` gave."""

    def say(folder, *more):
        return [
            "evaluate",
            f"target.path={tiny.target}",
            "target.precision=fp32",
            f"drafters={{base: {tiny.drafter}}}",
            f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 6}}]",
            f"out={tmp_path / 'out'}",
            "temperatures=[0]",
            "gammas=[2]",
            "max_new_tokens=12",
            "token_rate.prompts=0",
            f"serve.program={folder}",
            "serve.concurrency=[1, 3]",
            *more,
            "--serve",
            "llama.cpp",
        ]

    return say


def test_the_table_is_what_the_server_said(stand_in, words, command, tmp_path):
    code, said, complaint = command(*words(stand_in("differs")))
    assert code == 0, complaint
    results = read_json(tmp_path / "out" / "results.json")
    (served,) = results["served"]
    assert (served["engine"], served["version"], served["weights"]) == ("llama.cpp", "b1-stand-in", "fp32")
    assert [(row["gamma"], row["temperature"], row["concurrency"]) for row in served["rows"]] == [(2, 0, 1), (2, 0, 3)]
    for row in served["rows"]:
        # 7 tokens after the first, 4 of them drafts: 3 calls.
        assert row["block_efficiency"] == {"value": 7 / 3, "low": 7 / 3, "high": 7 / 3}
        assert (row["prompts"], row["tokens"], row["equal_to_plain"]) == (6, 48, 0)
        assert [(one["prompt"], one["token"]) for one in row["differing"]] == [(i, 7) for i in range(6)]
        assert all(one["gap"] > 0 for one in row["differing"])
        assert row["speed_up"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"])
        # It sleeps for 0.1 s a call with drafts, 0.05 s a plain step, and answers little later.
        assert row["call"] == pytest.approx(2, rel=0.2)
        assert row["predicted_speed_up"] == pytest.approx(row["offline"]["value"] / 2, rel=0.25)
    # The random drafter is right less often than the server says: told in a line, with what to look at.
    (note,) = served["notes"]
    assert note.startswith("chat, base, T 0: gamma 2, 1 at a time 2.33 tokens a call served, 1.")
    assert "; gamma 2, 3 at a time 2.33 tokens" in note
    page = (tmp_path / "out" / "results.html").read_text()
    for text in ("Served by llama.cpp b1-stand-in", "outside every interval: look at", "0 of 6, gap up to"):
        assert text in said and text in page
    (alike,) = [row for row in results["rows"] if row["drafting"] == "llama.cpp"]
    assert alike["block_efficiency"] == served["rows"][0]["offline"]
    # Evaluated again without a server nothing is decoded anew, and what was served stays.
    without = [word for word in words("nowhere")[:-2] if not word.startswith("serve.")]
    assert command(*without)[0] == 0
    assert read_json(tmp_path / "out" / "results.json")["served"] == [served]


def test_predicted_seconds_and_the_best_gamma():
    """A first token after 0.3 s, then 20 tokens in 8 calls of 0.25 s."""
    assert Costs(0.3, 0.25).seconds(21, 2.5) == pytest.approx(0.3 + 8 * 0.25)
    rows = [
        {"task": "chat", "drafter": "one", "temperature": 0.7, "concurrency": at, "gamma": gamma}
        | {"speed_up": served, "predicted_speed_up": predicted}
        for at, figures in ((1, [(1.2, 1.1), (1.5, 1.6), (1.4, 1.5)]), (4, [(1.25, 1.3), (1.0, 1.2), (0.9, 1.4)]))
        for gamma, (served, predicted) in enumerate(figures, 1)
    ]
    assert best_gammas(rows) == [
        "chat, one, T 0.7, 1 at a time: gamma 2 predicted to be fastest; it was",
        "chat, one, T 0.7, 4 at a time: gamma 3 predicted to be fastest; 1 was, 3 is 28% slower",
    ]
    assert best_gammas(rows[:1]) == []


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("dies", "llama.cpp ended with exit code 1 before it answered; it said: llama_model_load: error loading model"),
        ("port", "ended with exit code 1 before it answered; it said: couldn't bind HTTP server socket, hostname: "),
        ("memory", "ended with SIGKILL, as the kernel ends what finds no more memory, before it answered"),
        ("ends", "/completion: does not answer: "),
        ("never drafts", "llama.cpp: answered task chat without drafting once"),
    ],
)
def test_a_server_that_fails_is_one_line_and_what_was_decoded_stays(stand_in, words, command, tmp_path, how, complaint):
    code, _, said = command(*words(stand_in(how)))
    assert code == 2 and said.count("\n") == 1 and complaint in said
    if how == "ends":
        assert "the server said: GGML_ASSERT failed" in said
    assert read_json(tmp_path / "out" / "results.json")["served"] == []
    assert not [*(tmp_path / "out").glob(".served-*")]


def test_what_is_not_there_is_told_before_anything_is_decoded(stand_in, words, refused, monkeypatch, tmp_path):
    assert "/nowhere: not there" in refused(*words("/nowhere"))
    folder = stand_in("serves")
    (folder / "convert_hf_to_gguf.py").unlink()
    assert "no convert_hf_to_gguf.py in it" in refused(*words(folder))
    (folder / "build" / "bin" / "llama-server").unlink()
    assert "not there; build it: cmake --build" in refused(*words(folder))
    monkeypatch.setenv("PATH", "")
    for variable in ("DIST_TRAIN_LLAMA_CPP", "DIST_TRAIN_VLLM_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    unnamed = [word for word in words("") if not word.startswith("serve.program")]
    assert "serve.program: no llama-server on PATH" in refused(*unnamed)
    assert "serve.program: no vllm on PATH" in refused(*unnamed[:-1], "vllm")
    assert "max_new_tokens 1: a server drafts from the second token" in refused(*words(folder, "max_new_tokens=1"))
    assert "--serve and --server: one at a time" in refused(*words(folder), "--server", "http://127.0.0.1:9")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_server(stand_in, words, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train", *map(str, words(stand_in("hangs")))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "asked").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        server = int((tmp_path / "pid").read_text())
        process.send_signal(signal.SIGINT)
        complaint = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert (process.returncode, complaint) == (130, "dist-train evaluate: stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert Path(tmp_path / "out" / "results.json").exists()


@pytest.fixture(scope="module")
def models(tiny):
    """Target and drafter, both of random weights."""
    from transformers import AutoModelForCausalLM

    return tuple(AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.target, tiny.drafter))


def test_drafts_as_vllm_makes_them_are_accepted_as_often_as_the_distributions_say(models):
    """Drafts under the temperature alone, verified under the nucleus too: sum min(p, q), in float64 by hand."""
    import torch

    target, drafter = models
    prompt, temperature, top_p, repeats = [1, 20, 30], 1.5, 0.7, 6000

    def nucleus(probabilities):
        ordered, order = probabilities.sort(-1, descending=True)
        kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0)
        return torch.zeros_like(probabilities).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))

    with torch.no_grad():
        first = nucleus((target(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1))
        begun = torch.cat([torch.tensor([prompt]).expand(len(first), -1), torch.arange(len(first))[:, None]], 1)
        q, p = ((model(begun).logits[:, -1].double() / temperature).softmax(-1) for model in (target, drafter))
    expected = float(first @ torch.minimum(p, nucleus(q)).sum(-1))
    error = (expected * (1 - expected) / repeats) ** 0.5
    assert abs(expected - float(first @ torch.minimum(nucleus(p), nucleus(q)).sum(-1))) > 7 * error  # it would tell
    how = {"max_new_tokens": 2, "eos_ids": [], "seed": 3, "batch_size": 500}
    found = generate_as_served("vllm", drafter, target, [prompt] * repeats, 1, temperature, top_p, **how)
    accepted = sum(block - 1 for (block,) in found.blocks) / repeats
    assert abs(accepted - expected) < 3.5 * error


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_greedy_answers_are_the_targets_and_blocks_begin_after_the_first_token(models, engine):
    target, _ = models
    prompts = [[1, 20, 30], [1, 7], [1, 90, 91, 92, 93]]
    plain = speculative_generate(None, target, prompts, 0, 0.0, max_new_tokens=12).tokens
    ends = [plain[1][0], plain[2][4]]  # the second answer ends with its first token, the third within a block
    texts = [next((text[: i + 1] for i, token in enumerate(text) if token in ends), text) for text in plain]
    assert len(texts[1]) == 1 and len(texts[2]) <= 5
    # The target drafts for itself: every draft is right.
    how = {"max_new_tokens": 12, "eos_ids": ends, "seed": 0, "batch_size": 2}
    found = generate_as_served(engine, target, target, prompts, 3, 0.0, 1.0, **how)
    assert found.tokens == texts
    for text, blocks in zip(texts, found.blocks, strict=True):
        rest = len(text) - 1
        whole = [4] * -(-rest // 4)
        if engine == "llama.cpp" and rest % 4:
            whole[-1] = rest % 4
        assert blocks == whole
