"""Start a server on this machine, wait until it answers, and end it with everything that it started."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from dist_train.errors import UserError
from dist_train.runtime.launch import die_with_parent
from dist_train.runtime.world import free_port

_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 15.0
_GRACE_SECONDS = 10.0
_END_OF_LOG = 1 << 16
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What a line of a log begins with before it says anything: "(EngineCore pid=7) ERROR 11-26 01:27:09 [core.py:94] ".
_PREAMBLE = re.compile(r"^(\([\w-]+ pid=\d+\) ?)?((INFO|WARNING|ERROR)\s+[\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_RAISED = re.compile(r"[\w.]*(Error|Exception): .")
_NAMES_AN_ERROR = re.compile(r"(?i)\w*(error|exception)\b|\bfailed\b|\bunable\b|\bcannot\b")


class ServerCommand(NamedTuple):
    """How a server is started. It has to take `--host` and `--port`, and to answer GET /health with 200 once it serves.

    `environment` is what it sees beside, or in place of, this process's own.
    """

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = {}


@contextmanager
def running(server: ServerCommand, log: Path, patience: float = 900.0) -> Iterator[str]:
    """The address of `server`, on a free port of the loopback, for as long as the `with` block lasts.

    All that it prints goes to `log`, which stays. The server and what it starts are a process group of their own, which
    is ended with the block; when this process dies, however it dies, the server is told to end (the kernel watches the
    thread that called this). Raises UserError where it ends, or does not answer within `patience` seconds.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    # A server in a virtual environment of its own must not find the modules of this one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [*server.words, "--host", "127.0.0.1", "--port", str(port)],
                env={**environment, **server.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise UserError(f"{server.name}: {server.words[0]} cannot be started: {error}") from error
    try:
        _wait_until_healthy(server.name, process, port, log, patience)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def last_words(log: Path) -> str:
    """The first exception in the end of a log, of which later ones come, with the lines set in below it. Else the last
    three lines that name an error, or the last three. As one line of 600 characters.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _END_OF_LOG))
        text = _COLOURS.sub("", file.read().decode(errors="replace"))
    # The same words are often logged by one process and raised by another.
    said = [line for line in dict.fromkeys(_PREAMBLE.sub("", line).rstrip() for line in text.splitlines()) if line]
    raised = next((i for i, line in enumerate(said) if _RAISED.match(line)), None)
    if raised is not None:
        below = takewhile(lambda line: line.startswith(" "), said[raised + 1 :])
        return " | ".join([said[raised], *map(str.strip, below)])[:600]
    errors = [line.strip() for line in said if _NAMES_AN_ERROR.search(line)]
    return " | ".join((errors or [line.strip() for line in said])[-3:])[-600:] or "nothing"


def _wait_until_healthy(name: str, process: subprocess.Popen[bytes], port: int, log: Path, patience: float) -> None:
    began = told = time.monotonic()
    while not _is_healthy(port):
        now = time.monotonic()
        if (code := _exit_code(process)) is not None:
            raise UserError(
                f"{name} ended with {_named(code)} before it answered; it said: {last_words(log)}; all of it: {log}"
            )
        if now - began > patience:
            raise UserError(
                f"{name} does not answer after {patience:.0f} s; it said: {last_words(log)}; all of it: {log}"
            )
        if now - told > _SECONDS_BETWEEN_LINES:
            told = now
            print(f"{name}: starting, {now - began:.0f} s; its log: {log}", flush=True)
        time.sleep(_POLL_SECONDS)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)  # past any proxy of the environment
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # it does not listen yet
    finally:
        connection.close()


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, negative if a signal ended it, None while it runs.

    It stays a zombie until `Popen.wait`, so that its number, which is the group's, is nobody else's yet.
    """
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, and kill what is left of it once its first process is gone, or after a while."""
    deadline = time.monotonic() + _GRACE_SECONDS
    _signal_group(process, signal.SIGTERM)
    while _exit_code(process) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, number)


def _named(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, as the kernel ends what finds no more memory,"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
