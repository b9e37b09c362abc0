"""The device of tests marked gpu, and the same work on a CPU beside it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The GPU; a CPU where `DIST_TRAIN_TEST_DEVICE=cpu` has these tests tried without one (tests/conftest.py)."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def on_cpu(cli):
    """`on_cpu("distill", ...)` is a command of a process that sees no GPU."""

    def run(*arguments):
        return cli(*arguments, env={"CUDA_VISIBLE_DEVICES": ""})

    return run
