"""Starting and ending a server: every case against a small one that can be told how to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dist_train.errors import UserError
from dist_train.serving import launch
from dist_train.serving.launch import ServerCommand, running

# Starts a child as vLLM does, that ignores SIGTERM and writes its number; then does as its first argument says.
SERVER = """
import http.server, pathlib, subprocess, sys, time
how, child = sys.argv[1], pathlib.Path(sys.argv[2])
wait = "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
wait += "pathlib.Path(sys.argv[1] + '.part').write_text(str(os.getpid())); "
wait += "os.rename(sys.argv[1] + '.part', sys.argv[1]); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", wait, str(child)])
while not child.exists():
    time.sleep(0.02)
port = int(sys.argv[sys.argv.index("--port") + 1])
print("loading", flush=True)
if how == "dies":
    print("(EngineCore pid=7) ERROR 11-26 01:27:09 [core.py:94] OSError: \\x1b[31mno model\\x1b[0m here", flush=True)
    print("a hint that says nothing", flush=True)
    sys.exit(3)
if how == "sleeps":
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    loading = 3
    def do_GET(self):
        Handler.loading -= 1
        self.send_response(503 if Handler.loading > 0 else 200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    """`server("dies")` is the command, `server.child()` the process number of what the server has started."""
    script, child = tmp_path / "server.py", tmp_path / "child"
    script.write_text(SERVER)

    def command(how):
        return ServerCommand("the server", (sys.executable, str(script), how, str(child)))

    command.child = lambda: int(child.read_text())
    return command


def assert_ends(process):
    """It is gone within 20 seconds; a zombie that nobody waits for counts as gone."""
    status, deadline = Path(f"/proc/{process}/stat"), time.monotonic() + 20
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_serves_until_the_block_is_left_and_leaves_nothing_but_its_log(server, tmp_path):
    log = tmp_path / "logs" / "server.log"
    with running(server("serves"), log, patience=60) as url:
        assert urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health").status == 200
    assert_ends(server.child())
    assert log.read_text().startswith("loading")


def test_an_error_in_the_block_ends_it_too(server, tmp_path):
    with pytest.raises(KeyboardInterrupt), running(server("serves"), tmp_path / "log", patience=60):
        raise KeyboardInterrupt
    assert_ends(server.child())


def test_a_server_that_dies_is_told_in_one_line_with_its_reason(server, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(UserError) as raised, running(server("dies"), log, patience=60):
        pass
    said = f"the server ended with exit code 3 before it answered; it said: OSError: no model here; all of it: {log}"
    assert str(raised.value) == said
    assert_ends(server.child())


def test_a_server_that_never_answers_is_given_up_and_told_of_meanwhile(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_SECONDS_BETWEEN_LINES", 1.0)
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 1.0)
    given_up = pytest.raises(UserError, match="does not answer after 3 s; it said: loading;")
    with given_up, running(server("sleeps"), tmp_path / "log", patience=3):
        pass
    assert_ends(server.child())
    assert 1 <= capsys.readouterr().out.count("the server: starting, ") <= 3


def test_a_program_that_is_not_there_is_named(tmp_path):
    refused = pytest.raises(UserError, match=r"the server: /no/such/program cannot be started: .*No such file")
    with refused, running(ServerCommand("the server", ("/no/such/program",)), tmp_path / "log"):
        pass


def test_a_killed_parent_takes_the_server_along(server, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from dist_train.serving.launch import *\n"
        "with running(ServerCommand('s', tuple(sys.argv[2:])), Path(sys.argv[1])):\n"
        "    print('up', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "log", *server("serves").words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        served = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
        parent.kill()
    assert_ends(served)
    os.kill(server.child(), signal.SIGKILL)  # not the server's own, which would end what it has started


def test_the_cause_is_told_and_not_what_came_of_it(tmp_path):
    """As vLLM logs it: by one process, then by those that waited for it."""
    log = tmp_path / "log"
    log.write_text(
        "(VllmWorker-0 pid=7) ERROR 11-26 18:39:26 [executor.py:953] Traceback (most recent call last):\n"
        "(VllmWorker-0 pid=7) ERROR 11-26 18:39:26 [executor.py:953]     raise ValueError(\n"
        "(VllmWorker-0 pid=7) ERROR 11-26 18:39:26 [executor.py:953] ValueError: 14.65 of 18.59 GiB are free\n"
        "(EngineCore pid=5) ERROR 11-26 18:39:28 [core.py:1510] Exception: WorkerProc initialization failed.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert launch.last_words(log) == "ValueError: 14.65 of 18.59 GiB are free"
