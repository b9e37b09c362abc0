"""`dist-train evaluate --server` against a small server that counts as vLLM does. A real vLLM was not at hand."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_shards.files import read_json
from dist_train.errors import UserError
from dist_train.serving.vllm import counted_between, parse_counters

GAMMA = 3
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 4.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 6.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 12.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 18.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 7.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 3.0
vllm:generation_tokens_total{engine="0",model_name="m"} 99.0
"""


def counted(text, before=""):
    return counted_between(parse_counters(before), parse_counters(text))


def test_counters_are_summed_over_engines():
    assert counted(METRICS) == (10.0, 30.0, 15.0, (9.0, 5.0, 1.0))
    assert counted(METRICS.replace("_total", "")) == counted(METRICS)
    assert counted(METRICS.replace("_total", "") + METRICS) == counted(METRICS)
    assert counted(METRICS, before=METRICS) == (0.0, 0.0, 0.0, (0.0, 0.0, 0.0))
    turned = METRICS.replace('engine="1",model_name="m"', 'model_name="m",engine="1"')
    assert not any(counted(turned, before=METRICS)[:3])
    assert counted(METRICS.replace('"m"', r'"m{\\\" my_position=\"7\"}"')) == counted(METRICS)
    assert [*parse_counters("vllm:spec_decode_num_drafts 2 1700000000\n").values()] == [2.0]
    assert not parse_counters("vllm:generation_tokens_total 9.0\n")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        # Each engine's drafts, drafted tokens, accepted ones, and these by position.
        ([(4, 12, 4, 4), (6, 18, 5, 5)], [(99, 297, 40, 40), (1, 3, 0, 0)], "went back"),
        ([(4, 12, 4, 4), (6, 18, 5, 5)], [(99, 297, 40, 40)], "went back"),
        ([(4, 12, 7)], [(9, 27, 6)], "went back"),
        ([(4, 12, 7, 4, 3)], [(9, 27, 12, 9)], "went back"),
        ([(4, 12, 7)], [(8, 24, 20)], "does not hold together: 13 tokens accepted of 12 in 4 drafts"),
        ([(4, 12, 7, 4)], [(8, 24, 12, 9)], "does not hold together"),
        ([(4, 12, 7)], [(8, 15, 8)], "does not hold together"),
    ],
)
def test_counters_that_cannot_be_are_refused(before, after, complaint):
    def told(engines):
        lines = []
        for engine, (*counts, drafts, drafted, accepted) in enumerate((*e[3:], *e[:3]) for e in engines):
            of_all = (("drafts", drafts), ("draft_tokens", drafted), ("accepted_tokens", accepted))
            lines += [f'vllm:spec_decode_num_{name}_total{{engine="{engine}"}} {count}\n' for name, count in of_all]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines += [f'{name}{{engine="{engine}",position="{k}"}} {count}\n' for k, count in enumerate(counts)]
        return "".join(lines)

    with pytest.raises(UserError, match=complaint):
        counted(told(after), told(before))


@contextmanager
def serving(drafts=True, status=200, shrink=False, said=None, short=0, hangs_but=None):
    """A server whose every answer takes one draft of three tokens for each prompt token; of the k-th draft of all its
    time k modulo 4 tokens are accepted, by engines in turn.

    `said`: what is answered instead, by path; `{}` in it is another number each time. `short`: tokens that each engine
    left out of its last draft. `hangs_but`: the one request that is answered.
    """
    lock, requests, accepted = threading.Lock(), [], []
    numbers, over = itertools.count(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/metrics":
                self._say(metrics() if drafts else "vllm:generation_tokens_total 3.0\n")
            elif self.path == "/v1/models":
                self._say(json.dumps({"data": [{"id": "the-target"}]}))
            else:
                self._say("not found", 404)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(request)
                number = len(requests)
                before = len(accepted)
                accepted.extend(number % (GAMMA + 1) for number in range(before, before + len(request["prompt"])))
            if hangs_but not in (None, number):
                over.wait()
            self._say(json.dumps({"usage": {"completion_tokens": 5}}) if status == 200 else "no room", status)

        def _say(self, text, code=200):
            text = (said or {}).get(self.path, text).replace("{}", str(next(numbers)))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    def metrics():
        lines = []
        with lock:
            known = [0] * 1000 + accepted if not (shrink and requests) else []
        for engine in (0, 1):
            mine, labels = known[engine::2], f'engine="{engine}",model_name="the-target"'
            drafted = float(GAMMA * len(mine) - (short if requests else 0))
            lines.append(f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(len(mine))}")
            lines.append(f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {drafted}")
            lines.append(f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float(sum(mine))}")
            for place in range(GAMMA):
                count = float(sum(number > place for number in mine))
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                lines.append(f'{name}{{{labels},position="{place}"}} {count}')
        return "\n".join(lines) + "\n"

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # who asked is gone

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests, accepted
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def words(tiny, out, *more):
    return [
        "evaluate",
        f"target.path={tiny.target}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 10}}]",
        f"out={out}",
        "temperatures=[0]",
        "max_new_tokens=12",
        *more,
    ]


def test_the_table_is_what_the_server_counted_meanwhile(tiny, command, tmp_path):
    with serving() as (url, requests, accepted):
        code, said, complaint = command(*words(tiny, tmp_path / "out", "top_p=0.9"), "--server", url + "/v1/")
    assert code == 0, complaint
    (row,) = read_json(tmp_path / "out" / "served.json")["rows"]
    assert row["target_calls"] == len(accepted) == sum(len(request["prompt"]) for request in requests)
    assert row["block_efficiency"] == pytest.approx(1 + sum(accepted) / len(accepted))
    assert row["gamma"] == GAMMA
    shares = [sum(number > place for number in accepted) / len(accepted) for place in range(GAMMA)]
    assert row["accepted_shares"] == pytest.approx(shares)
    assert len(requests) == 10 and {request["model"] for request in requests} == {"the-target"}
    assert {(request["temperature"], request["max_tokens"]) for request in requests} == {(0.0, 12)}
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # of the model's generation configuration
    assert all(request.items() >= off.items() for request in requests)
    assert all(isinstance(token, int) for request in requests for token in request["prompt"])
    assert f"{row['block_efficiency']:.2f}" in said


def test_offline_figures_stand_beside_served_ones_of_the_same_prompts(tiny, command, tmp_path, refused):
    offline = tmp_path / "offline"
    setup = words(tiny, offline, "target.precision=fp32", "gammas=[3]", "token_rate.prompts=0")
    assert command(*setup, f"drafters={{base: {tiny.drafter}}}")[0] == 0
    (row,) = read_json(offline / "results.json")["rows"]
    with serving(short=1) as (url, _, _):
        before = {path: path.read_bytes() for path in offline.iterdir() if path.is_file()}
        code, said, complaint = command(*words(tiny, offline, f"beside={offline}"), "--server", url)
        assert {path: path.read_bytes() for path in before} == before and (offline / "served.json").exists()
        assert code == 0, complaint
        lines = [line for line in said.splitlines() if line.startswith("| chat")]
        assert len(lines) == 2 and "served" in lines[0]
        assert "offline, base" in lines[1] and f"{row['block_efficiency']['value']:.2f} [" in lines[1]
        there = "gamma 3, temperature 0, max_new_tokens 12"
        for more, asked, found in (
            ("top_p=0.5", "", ""),  # which greedy answers have no use for
            ("max_new_tokens=9", "gamma 3, temperature 0, max_new_tokens 9", there),
            ("temperatures=[0.5]", "gamma 3, temperature 0.5, max_new_tokens 12, top_p 0.9", f"{there}, top_p 0.9"),
        ):
            code, said, _ = command(*words(tiny, tmp_path / "out1", f"beside={offline}"), more, "--server", url)
            assert code == 0 and said.startswith((tmp_path / "out1" / "served.md").read_text())
            below = [line for line in said.splitlines() if line.startswith("- ")]
            assert below == ([f"- chat: no offline figures with {asked}; there are some with {found}"] if asked else [])
            assert ("offline, base" in said) == (not asked)
        others = [*words(tiny, tmp_path / "out2", f"beside={offline}"), "tasks.0.limit=3", "--server", url]
        assert "other prompts" in refused(*others)


def test_what_is_no_drafting_server_is_refused(tiny, refused, tmp_path):
    out = words(tiny, tmp_path / "out")
    assert "has 256 positions" in refused(*out, "max_new_tokens=250", "--server", "nowhere")
    with serving(drafts=False) as (url, requests, _):
        assert "without speculative decoding" in refused(*out, "--server", url)
        address = f"{url}/v1/completions"
        assert f"{address}/metrics: answers 404: not found; check --server" in refused(*out, "--server", address)
        assert not requests
    assert "does not answer" in refused(*out, "--server", url)  # it is gone now
    for address in ("nowhere", "ftp://127.0.0.1", "http://[::1"):
        assert "does not answer" in refused(*out, "--server", address)
    with serving(status=500) as (url, _, _):
        assert "answers 500: no room" in refused(*out, "--server", url)
    with serving(shrink=True) as (url, _, _):
        assert "went back" in refused(*out, "--server", url)


METRIC = "vllm:spec_decode_num_drafts_total"
OTHERS = "vllm:spec_decode_num_draft_tokens_total 9\nvllm:spec_decode_num_accepted_tokens_total 4\n"


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"/v1/models": '{"data": []}'}, "/v1/models: no model is listed"),
        ({"/v1/models": "[]"}, "/v1/models: no model is listed"),
        ({"/v1/models": "<html>"}, "/v1/models: answers no JSON: '<html>'"),
        ({"/v1/completions": "[]"}, "/v1/completions: an answer without usage.completion_tokens"),
        ({"/v1/completions": '{"usage": null}'}, "/v1/completions: an answer without usage.completion_tokens"),
        ({"/v1/completions": '{"usage": {"completion_tokens": true}}'}, "without usage.completion_tokens"),
        ({"/v1/completions": '{"usage": {"completion_tokens": "5"}}'}, "without usage.completion_tokens"),
        ({"/v1/completions": "<html>"}, "/v1/completions: answers no JSON"),
        ({"/metrics": f"{METRIC} abc"}, "/metrics: a counter vllm:spec_decode_num_* cannot be read"),
        ({"/metrics": f"{METRIC} NaN"}, "NaN is no count"),
        ({"/metrics": f"{METRIC} -3"}, "-3 is no count"),
        ({"/metrics": f"{METRIC} 3"}, "/metrics: no counter vllm:spec_decode_num_draft_tokens; it serves without"),
        ({"/metrics": f"{OTHERS}{METRIC} {{}}"}, "its counters do not stand still for 1 s"),
    ],
)
def test_a_server_that_says_something_else_is_refused(tiny, refused, tmp_path, monkeypatch, said, complaint):
    monkeypatch.setattr("dist_train.evaluate.served._SECONDS_TO_REST", 1)
    with serving(said=said) as (url, _, _):
        assert complaint in refused(*words(tiny, tmp_path / "out"), "--server", url)


def test_nobody_waits_for_answers_when_one_is_refused(tiny, refused, tmp_path):
    with serving(status=400, hangs_but=5) as (url, requests, _):
        began = time.monotonic()
        complaint = refused(*words(tiny, tmp_path / "out", "concurrency=5"), "--server", url)
        assert f"{url}/v1/completions: answers 400: no room" in complaint
        assert time.monotonic() - began < 60
        assert len(requests) == 5  # the other prompts are not sent any more


def test_nobody_waits_for_answers_after_ctrl_c(tiny, tmp_path):
    with serving(hangs_but=0) as (url, requests, _):
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_train", *words(tiny, tmp_path / "out"), "--server", url],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 120
            while len(requests) < 10:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            complaint = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert (process.returncode, complaint) == (130, "dist-train evaluate: stopped\n")


def test_a_password_in_the_address_is_neither_kept_nor_shown(tiny, refused, tmp_path):
    complaint = refused(*words(tiny, tmp_path / "out"), "--server", "http://me:secret@127.0.0.1:9")
    assert "***@127.0.0.1:9" in complaint and "secret" not in complaint
    assert not (tmp_path / "out").exists()


def test_what_cannot_go_well_is_refused_before_the_server_is_asked(tiny, refused, tmp_path):
    (tmp_path / "file").touch()
    with serving() as (url, requests, _):
        for out in (tmp_path / "file", "/proc/nowhere", "/proc"):
            assert f"{out}: cannot be written" in refused(*words(tiny, out), "--server", url)
        assert not requests
    for address in ("http://127.0.0.1:port", "http://127.0.0.1:99999"):
        assert "does not answer" in refused(*words(tiny, tmp_path / "out"), "--server", address)
    assert "--server: needs the address" in refused(*words(tiny, tmp_path / "out"), "--server", "")
    assert "--compare and --server: one at a time" in refused("evaluate", "--server", "", "--compare", "a", "b")
