"""The memory estimate against what PyTorch allocates on the GPU, for the drafter of 115M parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
SMALL = ("--drafter", "small", "--length", "64", "--target-layers", "2", "--target-width", "128")
NAMES = [
    "zero1, micro-batch 8",
    "zero3, micro-batch 8, everything compiled",
    "zero0, fp32, micro-batch 4",
    "zero1, checkpointing, micro-batch 16",
    "zero1, kld, micro-batch 4",
    "zero2, ce and tvdpp compiled, micro-batch 8",
]


@pytest.fixture(scope="module")
def found(device):
    """GiB estimated and measured, by configuration."""
    command = [sys.executable, str(SCRIPT), "--json", *(() if device.type == "cuda" else SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_what_is_allocated(device, found, name):
    """Within a tenth; on a CPU, of a process that is mostly libraries, within a half."""
    estimated, measured = found[name]
    assert estimated == pytest.approx(measured, rel=0.1 if torch.cuda.is_available() else 0.5)


def test_all_six_are_measured(device, found):
    assert list(found) == NAMES
