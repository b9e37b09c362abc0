"""Training beside and from models whose files say more, or less, than transformers writes again."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from runs import distillation, run_by, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SETTINGS = {
    "contradicting": {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    "without_sampling": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "temperature": 0.9,
        "max_length": 4096,
    },
    "padding_of_minus_1": {"pad_token_id": -1, "eos_token_id": [2, 3]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_drafter_of_odd_generation_settings_is_saved(tiny, command, tmp_path, name):
    drafter, run = shutil.copytree(tiny.drafter, tmp_path / "drafter"), tmp_path / "run"
    path = drafter / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SETTINGS[name]}))
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    code, _, complaint = command(*distillation(tiny, run, f"drafter.init_from={drafter}", steps=2))
    assert code == 0, complaint
    model = run / "checkpoints" / "step-00000002" / "model"
    assert AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id in (2, [2, 3])
    assert weights(run).keys() == load_file(tiny.drafter / "model.safetensors").keys()
    code, _, complaint = command("export", f"drafter={run}", f"target.path={tiny.target}", f"out={tmp_path / 'out'}")
    assert code == 0, complaint


def test_parameters_are_counted_whole_under_zero3(tiny, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(tiny.drafter).num_parameters()
    done = run_by(2, *distillation(tiny, tmp_path / "run", "train.deepspeed=zero3", steps=1))
    (told,) = re.findall(r"drafter of ([\d.]+)M parameters", done.stdout)
    assert float(told) == round(expected / 1e6, 2) > 0
