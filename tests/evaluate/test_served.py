"""`dist-train evaluate --server` against a small server that counts as vLLM does. A real vLLM was not at hand."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_shards.files import read_json
from dist_train.evaluate.served import parse_counters

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


def test_counters_are_summed_over_engines():
    assert parse_counters(METRICS) == (10.0, 30.0, 15.0, (9.0, 5.0, 1.0))
    assert parse_counters(METRICS.replace("_total", "")) == parse_counters(METRICS)
    assert parse_counters(METRICS.replace("_total", "") + METRICS) == parse_counters(METRICS)
    assert parse_counters("vllm:spec_decode_num_drafts 2 1700000000\n") == (2.0, 0.0, 0.0, ())
    assert parse_counters("vllm:generation_tokens_total 9.0\n") is None


@contextmanager
def serving(drafts=True, status=200, shrink=False, said=None, short=0):
    """A server whose every answer takes one draft of three tokens for each prompt token; of the k-th draft of all its
    time k modulo 4 tokens are accepted, by engines in turn.

    `said`: what is answered instead, by path; `{}` in it is another number each time. `short`: tokens that each engine
    left out of its last draft.
    """
    lock, requests, accepted = threading.Lock(), [], []
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/metrics":
                self._say(metrics() if drafts else "vllm:generation_tokens_total 3.0\n")
            else:
                self._say(json.dumps({"data": [{"id": "the-target"}]}))

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(request)
                before = len(accepted)
                accepted.extend(number % (GAMMA + 1) for number in range(before, before + len(request["prompt"])))
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests, accepted
    finally:
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
        others = [*words(tiny, tmp_path / "out2", f"beside={offline}"), "tasks.0.limit=3", "--server", url]
        assert "other prompts" in refused(*others)


def test_what_is_no_drafting_server_is_refused(tiny, refused, tmp_path):
    out = words(tiny, tmp_path / "out")
    assert "has 256 positions" in refused(*out, "max_new_tokens=250", "--server", "nowhere")
    with serving(drafts=False) as (url, requests, _):
        assert "without speculative decoding" in refused(*out, "--server", url)
        assert not requests
    assert "does not answer" in refused(*out, "--server", url)  # it is gone now
    assert "does not answer" in refused(*out, "--server", "nowhere")
    with serving(status=500) as (url, _, _):
        assert "answers 500: no room" in refused(*out, "--server", url)
    with serving(shrink=True) as (url, _, _):
        assert "went back" in refused(*out, "--server", url)


METRIC = "vllm:spec_decode_num_drafts_total"


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"/v1/models": '{"data": []}'}, "/v1/models: no model is listed"),
        ({"/v1/models": "[]"}, "/v1/models: no model is listed"),
        ({"/v1/models": "<html>"}, "/v1/models: answers no JSON: '<html>'"),
        ({"/v1/completions": "[]"}, "/v1/completions: an answer without usage.completion_tokens"),
        ({"/v1/completions": '{"usage": null}'}, "/v1/completions: an answer without usage.completion_tokens"),
        ({"/v1/completions": "<html>"}, "/v1/completions: answers no JSON"),
        ({"/metrics": f"{METRIC} abc"}, "/metrics: a counter vllm:spec_decode_num_* cannot be read"),
        ({"/metrics": f"{METRIC} NaN"}, "NaN is no count"),
        ({"/metrics": f"{METRIC} {{}}"}, "its counters do not stand still for 1 s"),
    ],
)
def test_a_server_that_says_something_else_is_refused(tiny, refused, tmp_path, monkeypatch, said, complaint):
    monkeypatch.setattr("dist_train.evaluate.served._SECONDS_TO_REST", 1)
    with serving(said=said) as (url, _, _):
        assert complaint in refused(*words(tiny, tmp_path / "out"), "--server", url)


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
