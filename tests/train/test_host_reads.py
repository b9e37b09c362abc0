"""The host does not wait for the device within a step, and once a step for the figures of the step before."""

from __future__ import annotations

import json

import pytest
from runs import distillation, patched

COUNT = """
import json
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from dist_train.train.outcome import Outcome

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}

class Reads(TorchDispatchMode):
    # What waits for a device: values read, and results whose size depends on values.
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function._schema.name == "aten::index" else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if function._schema.name in READS or by_mask:
            counts[-1]["within"] += 1
        return function(*args, **(kwargs or {}))

class Copies(TorchFunctionMode):
    # Tensors of the host's numbers: a copy to the device, which waits for it.
    def __torch_function__(self, function, types, args=(), kwargs=None):
        counts[-1]["within"] += function is torch.tensor and (kwargs or {}).get("device") is not None
        return function(*args, **(kwargs or {}))

counts = []
step, read = loop.Training._optimizer_step, Outcome.read

def counted_step(self, *arguments):
    counts.append({"step": self.step, "within": 0, "outcomes": 0})
    with Reads(), Copies():
        return step(self, *arguments)

def counted_read(self):
    counts[-1]["outcomes"] += 1
    return read(self)

loop.Training._optimizer_step, Outcome.read = counted_step, counted_read
import atexit, sys
commit = loop.Checkpoints.commit
def told(self):
    open(FILE, "w").write(json.dumps(counts))
    return commit(self)
loop.Checkpoints.commit = told
"""


@pytest.mark.parametrize(
    ("stage", "precision", "of_deepspeed"),
    [
        ("zero1", "bf16", 0),
        ("zero2", "bf16", 0),
        ("zero0", "fp32", 0),
        ("zero1", "fp32", 1),  # DeepSpeed looks at the norm
        ("zero3", "bf16", 3),  # and copies two numbers
    ],
)
def test_a_step_is_read_once_and_late(tiny, tmp_path, stage, precision, of_deepspeed):
    """Two micro-batches a rank; the first step may measure what later ones remember, the last one is read at once."""
    counts = tmp_path / "counts.json"
    options = (f"train.deepspeed={stage}", f"train.precision={precision}", "train.global_batch=4")
    code = COUNT.replace("FILE", repr(str(counts)))
    patched(code, 1, *distillation(tiny, tmp_path / "run", "loss.tvdpp_normalize=batch", *options, steps=6))
    steps = json.loads(counts.read_text())
    assert len(steps) == 6
    assert [step["within"] for step in steps[2:]] == [of_deepspeed] * 4  # ZeRO 3 records its order in the first ones
    assert [step["outcomes"] for step in steps] == [0, 1, 1, 1, 1, 2]
