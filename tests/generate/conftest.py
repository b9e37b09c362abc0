"""Generation in this process, and a server for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from generations import FakeServer


class Alone:
    """A runtime without a process group, which a process cannot start twice."""

    rank, world_size, is_first, device = 0, 1, True, torch.device("cpu")

    def agree(self, action):
        return action()

    everywhere = agree

    def first(self, value):
        return value

    def barrier(self):
        pass


@pytest.fixture
def here(command, monkeypatch):
    """`here("generate", ...)` runs in this process, without a process group: exit code, out and err."""
    from dist_train.generate import stage

    monkeypatch.setattr(stage, "started", lambda: contextlib.nullcontext(Alone()))
    return command


@pytest.fixture
def fake_server(tiny):
    """`fake_server(faults=0.3)` starts one."""
    from dist_train.tokenizer import load_tokenizer

    started = []

    def start(**options):
        started.append(FakeServer(load_tokenizer(tiny.tokenizer), **options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
