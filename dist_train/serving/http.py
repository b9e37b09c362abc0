"""Asking a server that may be busy, restarting or gone: JSON over HTTP, with back-off."""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from dist_train.errors import UserError
from dist_train.runtime.progress import SECONDS_BETWEEN_LINES, tell_at_intervals

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0
_LONGEST_CONNECT = 30.0  # to connect needs no model to think
_BUSY = (408, 409, 425, 429)


class RefusedError(Exception):
    """The server does not take this request, and will not later: its status and its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status}: {words}")
        self.status, self.words = status, words


class Client:
    """One server, asked by many threads, each over a connection of its own.

    `timeout`: seconds until a silent request counts as failed. `patience`: seconds for which a failing one is tried
    again.
    """

    def __init__(self, url: str, key: str | None, timeout: float, patience: float) -> None:
        self.url = url.rstrip("/")
        self._parts = urlsplit(self.url)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout, self._patience = timeout, patience
        self._local = threading.local()
        self._lock, self._under_way = threading.Lock(), set[socket.socket]()
        self._given_up, self._why = threading.Event(), ""
        self._answered = -math.inf  # when the last one came

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers.

        Busy (429), failing (5xx), unreachable, silent, or broken off: asked again, after a delay that doubles, with
        chance in it, or that the server names. Raises RefusedError for another status, UserError when patience is
        over or `give_up` was called.
        """
        began, tries = time.monotonic(), 0
        while not self._given_up.is_set():
            tries += 1
            wanted = 0.0
            try:
                status, words, wanted = self._once(method, path, body)
                if status == 200:
                    answer = _parse(words)
                    self._answered = time.monotonic()
                    return answer
                if status < 500 and status not in _BUSY:
                    raise RefusedError(status, _said(words))
                problem = f"{status} {_said(words)}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._hang_up()
                problem = str(error) or type(error).__name__
            delay = max(wanted, min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(tries - 1, 20)) * random.uniform(0.5, 1.0))
            spent = time.monotonic() - began
            if spent + delay > self._patience:
                self.give_up(
                    f"{self.url}: gave up after {tries} tries in {spent:.0f} s: {problem}; is the server up? "
                    "started again, generate goes on with what is missing"
                )
            else:
                self._tell(problem, spent)
                self._given_up.wait(delay)
        raise UserError(self._why)

    def ask_once(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """What the server answers, asked over a new connection and never again, whatever becomes of the request.

        Raises RefusedError for a status other than 200; OSError, HTTPException, ValueError or OverflowError where no
        answer comes, as after `give_up`.
        """
        try:
            status, words, _ = self._once(method, path, body)
        finally:
            self._hang_up()
        if status != 200:
            raise RefusedError(status, _said(words))
        return words

    def give_up(self, why: str) -> str:
        """Let nobody ask any more, nor wait for an answer: every thread that does is told the first reason.

        Returns that reason.
        """
        with self._lock:
            self._why = self._why or why
            self._given_up.set()
            for sock in self._under_way:
                with suppress(OSError):  # the server was quicker
                    # Not SSLSocket's own: its first step is to forget the encryption, which the other thread yet uses.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            return self._why

    def _tell(self, problem: str, spent: float) -> None:
        """Say that a server which gives no answers is asked again; of one that is busy now and then, nothing."""
        if time.monotonic() - self._answered > SECONDS_BETWEEN_LINES:
            left = max(0.0, self._patience - spent)
            tell_at_intervals(self.url, f"{self.url}: {problem}; asked again, for {left:.0f} s more")

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes, float]:
        """Status, body and the delay that the server asks for, in seconds."""
        connection = self._connection()
        payload = None if body is None else json.dumps(body).encode()
        with self._breakable(connection):
            connection.request(method, f"{self._parts.path}{path}", payload, self._headers)
            response = connection.getresponse()
            words = response.read()
        after = response.headers.get("Retry-After", "")
        return response.status, words, min(float(after), 10 * _LONGEST_DELAY) if after.isdecimal() else 0.0

    @contextmanager
    def _breakable(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Have `give_up` end what is sent and read in the `with` block. Raises OSError when it was called before."""
        if connection.sock is None:
            connection.connect()
        sock: Any = connection.sock
        sock.settimeout(self._timeout)
        with self._lock:
            if self._given_up.is_set():
                raise ConnectionAbortedError(self._why)
            self._under_way.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.discard(sock)

    def _connection(self) -> http.client.HTTPConnection:
        if getattr(self._local, "connection", None) is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            self._local.connection = kind(self._parts.netloc, timeout=min(self._timeout, _LONGEST_CONNECT))
        return self._local.connection

    def _hang_up(self) -> None:
        """After a failure nothing is known of the connection; the next try makes a new one."""
        self._connection().close()
        self._local.connection = None


def _parse(words: bytes) -> dict[str, Any]:
    answer = json.loads(words)
    if not isinstance(answer, dict):
        raise ValueError(f"the answer is not a JSON object: {words[:80]!r}")
    return answer


def _said(words: bytes) -> str:
    """The message in what a server says of an error, in one line."""
    text = words.decode(errors="replace")
    try:
        content = json.loads(text)
        for key in ("error", "message", "detail"):
            content = content[key] if isinstance(content, dict) and key in content else content
        text = content if isinstance(content, str) else json.dumps(content)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "without a word"
