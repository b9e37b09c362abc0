"""Asking a server that may be busy, restarting or gone: JSON over HTTP, with back-off.

Requests are tasks of one event loop in a thread of its own. So each has a deadline for the whole answer, however it
trickles, and `give_up` ends all that are under way at once: both are cancellation, which a blocking client has not.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import random
import ssl
import threading
import time
from collections.abc import Coroutine
from typing import Any

import httpx2

from dist_train.errors import UserError
from dist_train.runtime.progress import SECONDS_BETWEEN_LINES, tell_at_intervals

LONGEST_ANSWER = 16 << 20
"""Bytes of one answer: more than a hundred a token for the longest contexts."""
_DEEPEST_ANSWER = 50
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0
_STRANGE_TRIES = 4  # of a server that has never answered as an API does; a proxy before one may, while it restarts
_LONGEST_CONNECT = 30.0  # to connect needs no model to think
_BUSY = (408, 409, 425, 429)


class RefusedError(Exception):
    """The server does not take this request, and will not later: its status and its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status}: {words}")
        self.status, self.words = status, words


class StrangeAnswerError(UserError):
    """An answer that no such server gives, and that asking again will not change: endless, or a JSON bomb."""


class Client:
    """One server, asked by many threads.

    `timeout`: seconds until a request without its whole answer counts as failed. `patience`: seconds for which a
    failing one is tried again. Nothing of the environment is used: no proxy, no .netrc.
    """

    def __init__(self, url: str, key: str | None, timeout: float, patience: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout, self._patience = timeout, patience
        self._certificates = ssl.create_default_context() if self.url.startswith("https:") else False
        self._kept = self._connections()
        self._lock, self._under_way = threading.Lock(), set[concurrent.futures.Future[Any]]()
        self._given_up, self._why = threading.Event(), ""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="http", daemon=True).start()
        self._answered = -math.inf  # when the last one came

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers.

        Busy (429), failing (5xx), unreachable, silent, or broken off: asked again, after a delay that doubles, with
        chance in it, or that the server names. Raises RefusedError for another status, UserError when patience is
        over, `give_up` was called, or the answer is too long or too deep.
        """
        began, tries = time.monotonic(), 0
        while not self._given_up.is_set():
            tries += 1
            wanted = 0.0
            try:
                status, words, wanted = self._wait(self._send(self._kept, method, path, body))
                if status == 200:
                    answer = self._object(words)
                    self._answered = time.monotonic()
                    return answer
                if 300 <= status < 400:
                    raise StrangeAnswerError(f"{self.url}{path}: sends elsewhere ({status}); set that address")
                if status < 500 and status not in _BUSY:
                    raise RefusedError(status, _said(words))
                problem = f"{status} {_said(words)}"
            except (OSError, ValueError) as error:
                problem = str(error) or type(error).__name__
                if isinstance(error, ValueError) and tries == _STRANGE_TRIES and self._answered == -math.inf:
                    raise StrangeAnswerError(f"{self.url}: {problem}") from error
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

        Raises RefusedError for a status other than 200; OSError where no answer comes, as after `give_up`; UserError
        where it is too long.
        """
        status, words, _ = self._wait(self._send_alone(method, path, body))
        if status != 200:
            raise RefusedError(status, _said(words))
        return words

    def ask_for_object(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers, asked once. Raises UserError, naming the address, where it does not.

        For what is measured: asked again, a server would count both.
        """
        try:
            return self._object(self.ask_once(method, path, body))
        except RefusedError as error:
            raise UserError(f"{self.url}{path}: answers {error}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.url}{path}: does not answer: {error or type(error).__name__}") from error

    def give_up(self, why: str) -> str:
        """Let nobody ask any more, nor wait for an answer: every thread that does is told the first reason.

        Returns that reason.
        """
        with self._lock:
            self._why = self._why or why
            self._given_up.set()
            for request in self._under_way:
                request.cancel()
            return self._why

    def _tell(self, problem: str, spent: float) -> None:
        """Say that a server which gives no answers is asked again; of one that is busy now and then, nothing."""
        if time.monotonic() - self._answered > SECONDS_BETWEEN_LINES:
            left = max(0.0, self._patience - spent)
            tell_at_intervals(self.url, f"{self.url}: {problem}; asked again, for {left:.0f} s more")

    def _wait(self, sending: Coroutine[Any, Any, tuple[int, bytes, float]]) -> tuple[int, bytes, float]:
        """The outcome of a request that `give_up` ends. Raises OSError where there is none, or it was called before."""
        with self._lock:
            if self._given_up.is_set():
                sending.close()
                raise ConnectionAbortedError(self._why)
            within = asyncio.wait_for(sending, self._timeout)
            request = asyncio.run_coroutine_threadsafe(within, self._loop)
            self._under_way.add(request)
        try:
            return request.result()
        except concurrent.futures.CancelledError:
            raise ConnectionAbortedError(self._why) from None
        except asyncio.TimeoutError:
            raise ConnectionError(f"no whole answer within {self._timeout:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConnectionError(_reason(error)) from error
        finally:
            request.cancel()  # where Ctrl-C ends the wait for it
            with self._lock:
                self._under_way.discard(request)

    async def _send_alone(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes, float]:
        async with self._connections() as new:
            return await self._send(new, method, path, body)

    async def _send(
        self, connections: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, bytes, float]:
        """Status, body and the delay that the server asks for, in seconds."""
        payload = None if body is None else json.dumps(body).encode()
        async with connections.stream(method, f"{self.url}{path}", content=payload) as response:
            words = bytearray()
            async for chunk in response.aiter_raw():  # as sent: what was compressed may be endless when it is not
                words += chunk
                if len(words) > LONGEST_ANSWER:
                    raise StrangeAnswerError(f"{self.url}{path}: answers more than {LONGEST_ANSWER >> 20} MiB")
        after = response.headers.get("Retry-After", "")
        return response.status_code, bytes(words), min(float(after), 10 * _LONGEST_DELAY) if after.isdecimal() else 0.0

    def _connections(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers=self._headers,
            timeout=httpx2.Timeout(self._timeout, connect=min(self._timeout, _LONGEST_CONNECT)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            verify=self._certificates,
            trust_env=False,
        )

    def _object(self, words: bytes) -> dict[str, Any]:
        try:
            answer = parse_json(words)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"answers no JSON object but {words[:60]!r}; is it the API's address?")
        return answer


def parse_json(words: bytes | str) -> Any:
    """What a server says. Raises ValueError where it is no JSON, StrangeAnswerError where it is nested too deep."""
    try:
        content = json.loads(words)
    except RecursionError:
        content = None
        too_deep = True
    else:
        too_deep = _is_deeper(content, _DEEPEST_ANSWER)
    if too_deep:
        raise StrangeAnswerError(f"the server answers JSON nested more than {_DEEPEST_ANSWER} deep: {words[:80]!r}")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    layer = [content]
    for _ in range(levels):
        layer = [
            below
            for node in layer
            if isinstance(node, dict | list)
            for below in (node.values() if isinstance(node, dict) else node)
        ]
        if not layer:
            return False
    return True


def _reason(error: Exception) -> str:
    """The system's own words, "Connection refused" say, where there are any below the library's."""
    deepest: BaseException = error
    while deepest.__cause__ or deepest.__context__:
        deepest = deepest.__cause__ or deepest.__context__  # type: ignore[assignment]
    found = deepest if isinstance(deepest, OSError) and str(deepest) else error
    return str(found) or type(found).__name__


def _said(words: bytes) -> str:
    """The message in what a server says of an error, in one line."""
    text = words.decode(errors="replace")
    try:
        content = parse_json(text)
        for key in ("error", "message", "detail"):
            content = content[key] if isinstance(content, dict) and key in content else content
        text = content if isinstance(content, str) else json.dumps(content)
    except (ValueError, StrangeAnswerError):
        pass  # said as it is
    return " ".join(text.split())[:300] or "without a word"
