"""What tests of generation share: a small generation, its files, and a server that can fail in every way."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq


def generation(tiny, out, *more):
    return [
        "generate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"seeds.inputs={tiny.chat_lines}",
        "seeds.limit=60",
        "temperatures=[0, 1.0]",
        "max_new_tokens=24",
        "batch_size=4",
        "engine.rows=3",
        f"out={out}",
        *more,
    ]


def files(folder):
    """Name and bytes of every unit."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("unit-*.parquet"))}


def rows(folder):
    """All answers, in the order of the units."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("unit-*.parquet"))).to_pylist()


class FakeServer(ThreadingHTTPServer):
    """An OpenAI-compatible server whose answer to a request is a function of its prompt, seed and temperature.

    `faults`: share of requests that fail, in every way that a server and a network have. `style`: vllm returns token
    ids; bare takes only OpenAI's own fields, and tells texts. `choice`: what it says instead of its answer. `stuck`:
    a prompt that holds this text is never answered with more than a token, but with the fault `stuck_by`.
    """

    daemon_threads = True

    def __init__(
        self,
        tokenizer,
        faults=0.0,
        style="vllm",
        model="tiny",
        shift=0,
        text=None,
        choice=None,
        stuck=None,
        stuck_by=503,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.faults, self.style, self.model, self.shift = tokenizer, faults, style, model, shift
        self.text, self.choice, self.stuck, self.stuck_by = text, choice or {}, stuck, stuck_by
        self.drawn, self.lock = random.Random(5), threading.Lock()
        self.answered, self.failed = Counter(), Counter()
        self.under_way = self.most_under_way = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, ids, seed, temperature, count):
        """Response ids and why they end."""
        drawn = random.Random(repr((list(ids), seed, temperature)))
        length = drawn.randrange(3, max(count, 3) + 1)
        found = [drawn.randrange(10, 320) for _ in range(length)]
        return ([*found[:-1], 2], "stop") if length < count else (found, "length")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        length = int(self.headers["Content-Length"])
        said = self.rfile.read(length)
        if len(said) < length:
            return self.drop()  # it was hung up
        body = json.loads(said)
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.under_way, server.most_under_way)
            fault = server.drawn.choice(FAULTS) if server.drawn.random() < server.faults else None
            if server.stuck and body["max_tokens"] > 1 and server.stuck in server.tokenizer.decode(body["prompt"]):
                fault = server.stuck_by
            server.failed[fault] += 1
        try:
            self.serve(body, fault)
        finally:
            with server.lock:
                server.under_way -= 1

    def serve(self, body, fault):
        if fault == "silence":
            return self.connection.recv(1)  # until the other side hangs up
        if fault == "drop before":
            return self.drop()
        if fault in (429, 500, 503):
            return self.reply(fault, {"error": {"message": "try later"}}, {"Retry-After": "0"})
        server = self.server
        if body["model"] != server.model:
            return self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        known = {"model", "max_tokens", "temperature", "top_p", "seed", "prompt", "messages"}
        if server.style == "bare" and (set(body) - known or "messages" not in body):
            return self.reply(400, {"error": {"message": f"unknown fields {sorted(set(body) - known)}"}})
        ids = body["prompt"] if "prompt" in body else server.tokenizer.encode_prompt(body["messages"])
        found, reason = server.answer(ids, body["seed"], body["temperature"], body["max_tokens"])
        with server.lock:
            server.answered[tuple(ids), body["seed"]] += 1
        text = server.tokenizer.decode(found) if server.text is None else server.text
        if server.style == "bare":
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        else:
            told = {"token_ids": [i + server.shift for i in found], "prompt_token_ids": ids}
            choice = {"text": text, "finish_reason": reason, **told}
        time.sleep(0.005)
        answer = {"choices": [{"index": 0, **choice, **server.choice}]}
        if fault == "drop after":
            return self.drop()
        return self.reply(200, answer, cut=fault == "cut", garbled=fault == "garbled")

    def do_GET(self):
        self.reply(200, {"data": [{"id": self.server.model}]})

    def reply(self, status, content, headers=(), cut=False, garbled=False):
        data = b"<html>proxy</html>" if garbled else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.drop()

    def drop(self):
        self.close_connection = True

    def log_message(self, *arguments):
        pass


FAULTS = (429, 500, 503, "drop before", "drop after", "cut", "garbled")
