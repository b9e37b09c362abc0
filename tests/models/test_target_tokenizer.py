"""The tokenizer through which a target is asked: its chat template is the target's."""

from __future__ import annotations

import json
import shutil

import pytest

from dist_train.config import TargetSection
from dist_train.models.target_tokenizer import load_target_tokenizer

OWN = "{% for m in messages %}### {{ m.content }}{% endfor %}"


@pytest.fixture
def target(tiny, tmp_path):
    """The tiny target with a template of its own, and Llama 2's tokenizer.model alone."""
    folder = shutil.copytree(tiny.target, tmp_path / "target")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": OWN}))
    shutil.copy(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    return TargetSection(path=str(folder))


def test_a_bare_model_file_takes_the_targets_template(target, tmp_path):
    found = load_target_tokenizer(target, str(tmp_path / "tokenizer.model"))
    assert found.chat_template == OWN
    assert found.encode_prompt([{"role": "user", "content": "a"}]) == found.encode("### a")


def test_another_template_beside_the_tokenizer_gives_way_and_is_told(target, tiny, capfd):
    assert load_target_tokenizer(target, str(tiny.tokenizer)).chat_template == OWN
    assert "its chat template is not that of" in capfd.readouterr().err


def test_what_is_named_goes_before_both(target, tiny):
    assert "[INST]" in load_target_tokenizer(target, str(tiny.tokenizer), "llama2").chat_template
    assert "[INST]" in load_target_tokenizer(target, None, "llama2").chat_template
