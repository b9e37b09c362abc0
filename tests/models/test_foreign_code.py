"""Code that comes with a model: run where `target.trust_remote_code` says so, and else neither run nor asked about."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from runs import distillation, losses
from transformers import AutoConfig, dynamic_module_utils

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that foreign code makes when it runs; to any question the answer is yes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "ran"


@pytest.fixture
def own(tiny, tmp_path, marker):
    """The tiny target as a family of its own, whose code lies beside its weights."""
    folder = shutil.copytree(tiny.target, tmp_path / "own")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": OWN}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own_tokenizer(own, tiny, tmp_path):
    """A folder whose tokenizer asks for code of its own; transformers alone would ask its user."""
    folder = shutil.copytree(own, tmp_path / "own_tokenizer")
    (folder / "tokenizer.model").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def stages(tiny, target, drafter, out):
    """A command of each kind that reads a model, by its name."""
    return {
        "distill": [*distillation(tiny, out / "run", steps=2), f"target.path={target}"],
        "init_from": [*distillation(tiny, out / "warm", steps=2), f"drafter.init_from={drafter}"],
        "generate": [
            "generate",
            f"target.path={target}",
            "target.precision=fp32",
            f"seeds.inputs={tiny.chat_lines}",
            "seeds.limit=2",
            f"out={out / 'answers'}",
            "max_new_tokens=4",
        ],
        "evaluate": [
            "evaluate",
            f"target.path={target}",
            "target.precision=fp32",
            f"drafters={{a: {drafter}}}",
            f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 2}}]",
            f"out={out / 'results'}",
            "max_new_tokens=4",
            "gammas=[2]",
            "token_rate.prompts=0",
        ],
        "export": ["export", f"drafter={drafter}", f"target.path={target}", f"out={out / 'exported'}"],
    }


def test_transformers_alone_would_run_it(own, marker):
    AutoConfig.from_pretrained(own)
    assert marker.exists(), "else the tests below show nothing"


@pytest.mark.parametrize("stage", ["distill", "generate", "evaluate", "export"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_targets_code_is_refused_and_nobody_is_asked(tiny, refused, own, marker, tmp_path, stage, dry):
    words = stages(tiny, own, tiny.drafter, tmp_path)[stage]
    complaint = refused(*words, *["--dry-run"] * dry)
    assert str(own) in complaint
    assert "set target.trust_remote_code=true" in complaint
    assert not marker.exists()


@pytest.mark.parametrize("stage", ["init_from", "evaluate"])
def test_a_drafters_code_never_runs(tiny, refused, own, marker, tmp_path, stage):
    assert str(own) in refused(*stages(tiny, tiny.target, own, tmp_path)[stage])
    assert not marker.exists()


def test_the_gate_runs_no_code(tiny, command, refused, own, own_tokenizer, marker):
    code, said, _ = command("export", "--check", tiny.target, f"drafter={own_tokenizer}")
    assert code == 1
    assert "failed   architecture" in said
    assert "set target.trust_remote_code=true" in refused("export", "--check", own, f"drafter={tiny.drafter}")
    assert not marker.exists()


def test_a_tokenizers_code_never_runs(tiny, refused, own_tokenizer, marker, tmp_path):
    for words in (
        ["tokenizer", "check", tiny.tokenizer, own_tokenizer],
        ["prepare", f"inputs={tiny.chat_lines}", f"tokenizer={own_tokenizer}", f"out={tmp_path / 'x'}", "format=chat"],
    ):
        assert str(own_tokenizer) in refused(*words)
    assert not marker.exists()


def test_trusted_code_serves_in_every_stage(tiny, command, own, marker, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody is there to be asked
    trusted = "target.trust_remote_code=true"
    for stage, words in stages(tiny, own, tiny.drafter, tmp_path).items():
        if stage in ("distill", "generate", "evaluate"):
            code, said, complaint = command(*words, trusted, "--dry-run")
            assert code == 0, (stage, complaint)
            assert "# memory" in said
            assert "not estimated" not in said
        if stage != "init_from":
            code, _, complaint = command(*words, trusted)
            assert code == 0, (stage, complaint)
    code, said, complaint = command(
        "plan", *stages(tiny, own, tiny.drafter, tmp_path)["distill"][1:], trusted, "--gpus", 1, "--gpu", "h100"
    )
    assert code == 0, complaint
    assert marker.exists()
    # The family is Llama under another name: trained against it, the drafter is what it is against the Llama.
    assert command(*stages(tiny, tiny.target, tiny.drafter, tmp_path / "llama")["distill"])[0] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "llama" / "run")
