"""The HTTP client against servers that trickle, flood, bomb and listen for keys."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from dist_train.config.address import carries_openly
from dist_train.errors import UserError
from dist_train.serving.http import Client, RefusedError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def listening(*pieces, pause=0.0, repeat=0):
    """A server that says the pieces, then the last one `repeat` times more, to everybody; (URL, what it was asked)."""
    asked, over = [], threading.Event()

    def serve(connection):
        with connection:
            asked.append(connection.recv(65_536))
            try:
                for piece in [*pieces, *([pieces[-1]] * repeat if pieces else [])]:
                    connection.sendall(piece)
                    if pause and over.wait(pause):
                        return
                if not pieces:
                    over.wait()
            except OSError:
                return  # who asked is gone

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while not over.is_set():
                try:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)


def whole(content, status=b"200 OK"):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(content), content)


@pytest.mark.parametrize("head", [HEAD + b"Content-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_trickles_ends_at_the_deadline(head):
    """A byte each 50 ms: no read ever waits long. In the body, and in the head."""
    with listening(head, b"x", pause=0.05, repeat=10_000) as (url, _):
        began = time.monotonic()
        with pytest.raises(OSError, match="no whole answer within 1 s"):
            Client(url, None, 1.0, 0).ask_once("GET", "/metrics")
        with pytest.raises(UserError, match="gave up after 1 tries in 1 s: no whole answer within 1 s"):
            Client(url, None, 1.0, 0).ask("POST", "/completions", {})
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("length", [b"", b"Content-Length: 9000000000\r\n"])
def test_an_endless_answer_is_not_read_to_its_end(length):
    with listening(HEAD + length + b"\r\n", b" " * (1 << 20), repeat=100_000) as (url, asked):
        with pytest.raises(UserError, match="answers more than 16 MiB"):
            Client(url, None, 60, 60).ask("GET", "/models")
        with pytest.raises(UserError, match="answers more than 16 MiB"):
            Client(url, None, 60, 0).ask_once("GET", "/metrics")
        assert len(asked) == 2  # and not asked again


@pytest.mark.parametrize("depth", [60, 900, 100_000])
@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request"])
def test_a_json_bomb_is_one_line(depth, status):
    bomb = b'{"error":' * depth + b"1" + b"}" * depth
    with listening(whole(bomb, status)) as (url, asked):
        kind, told = (UserError, "nested more than 50 deep") if status == b"200 OK" else (RefusedError, "400: ")
        with pytest.raises(kind, match=told) as raised:
            Client(url, None, 60, 60).ask("GET", "/models")
        assert len(asked) == 1 and len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_compressed_answers_are_not_asked_for_nor_unpacked():
    with listening(whole(b'{"a": 1}')) as (url, asked):
        assert Client(url, None, 60, 60).ask("GET", "/models") == {"a": 1}
    assert b"accept-encoding: identity" in asked[0].lower()


def test_giving_up_ends_at_once_what_waits_for_silence():
    with listening() as (url, asked):
        client, told = Client(url, None, 600, 600), []

        def ask(once):
            try:
                (client.ask_once if once else client.ask)("POST", "/completions", {})
            except (OSError, UserError) as error:
                told.append(str(error))

        threads = [threading.Thread(target=ask, args=(once,)) for once in (True, False) * 4]
        for thread in threads:
            thread.start()
        while len(asked) < 8:
            time.sleep(0.01)
        assert client.give_up("the first reason") == client.give_up("another") == "the first reason"
        for thread in threads:
            thread.join(5)
        assert told == ["the first reason"] * 8
        with pytest.raises(UserError, match="the first reason"):
            client.ask("GET", "/models")
        assert len(asked) == 8


def test_the_environment_has_no_say(monkeypatch, tmp_path):
    """A cluster's proxy does not know its nodes, and .netrc is for others."""
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with listening(whole(b"{}")) as (url, asked):
        assert Client(url, None, 60, 0).ask("GET", "/models") == {}
    assert b"authorization" not in asked[0].lower()


@pytest.mark.parametrize(
    ("url", "openly"),
    [
        ("http://127.0.0.1:8000/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://[::1]:8000/v1", False),
        ("https://node7:8000/v1", False),
        ("http://node7:8000/v1", True),
        ("http://10.0.0.7/v1", True),
        ("http://localhost.evil.org/v1", True),
        ("http://0.0.0.0:8000/v1", True),
    ],
)
def test_what_can_be_read_on_the_way(url, openly):
    assert carries_openly(url) == openly


def test_a_server_that_wants_a_longer_wait_than_there_is_patience_is_not_waited_for():
    busy = b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with listening(busy) as (url, asked), pytest.raises(UserError, match="429 without a word"):
        Client(url, None, 60, 5).ask("GET", "/models")
    assert len(asked) == 1
