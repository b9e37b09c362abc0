"""Which precision a device is fast at, and where that is decided."""

from __future__ import annotations

import pytest
import torch
import yaml

from dist_train.config import DistillConfig, EvaluateConfig, dump_config, resolve_precision
from dist_train.runtime import device, world

X86 = "model name\t: Some Xeon\nflags\t\t: fpu sse2 avx512f avx512_vnni {} clwb\n"


@pytest.mark.parametrize(
    ("flag", "fast"),
    [("avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), ("", "fp32"), ("no_avx512_bf16x", "fp32")],
)
def test_a_processor_is_fast_at_bf16_where_its_flags_say_so(monkeypatch, tmp_path, flag, fast):
    (tmp_path / "cpuinfo").write_text(X86.format(flag))
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.fast_precision() == fast


@pytest.mark.parametrize(("is_native", "fast"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_that_emulates_bf16_is_not_fast_at_it(monkeypatch, is_native, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or is_native
    )
    assert device.fast_precision() == fast


@pytest.fixture
def slow_at_bf16(monkeypatch):
    monkeypatch.setattr("dist_train.config.precision.fast_precision", lambda: "fp32")
    monkeypatch.delenv("RANK", raising=False)
    world.tell_once.cache_clear()


def distillation(**target):
    return DistillConfig.model_validate(
        {
            "run": {"dir": "run"},
            "tokenizer": "t",
            "target": {"path": "t", **target},
            "data": {"sources": [{"path": "s"}]},
            "train": {"steps": 1},
        }
    )


def test_auto_is_the_default_and_is_recorded_resolved(slow_at_bf16, capsys):
    config = distillation()
    assert (config.train.precision, config.target.precision) == ("auto", "auto")
    recorded = yaml.safe_load(dump_config(resolve_precision(config)))
    assert (recorded["train"]["precision"], recorded["target"]["precision"]) == ("fp32", "fp32")
    assert resolve_precision(config, "bf16").train.precision == "bf16"  # planned for other devices
    assert config.train.precision == "auto"
    evaluation = {"target": {"path": "t"}, "drafters": {"a": "d"}, "tasks": [{"preset": "dolly"}], "out": "o"}
    assert resolve_precision(EvaluateConfig.model_validate(evaluation)).target.precision == "fp32"
    assert capsys.readouterr().err == ""


def test_a_slow_precision_that_is_set_by_hand_is_taken_and_told(slow_at_bf16, capsys):
    assert resolve_precision(distillation(precision="bf16")).target.precision == "bf16"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: target.precision=bf16: this device emulates bf16")
    assert resolve_precision(distillation(precision="fp32")).target.precision == "fp32"
    assert capsys.readouterr().err == ""
