"""The stages from Python: one script as a notebook would have it, in one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dist_train as dt

NOTEBOOK = """
import sys
from pathlib import Path
import dist_train as dt
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)

text, tokenizer, target, chat, out = sys.argv[1:]
out = Path(out)
train = {"steps": 2, "global_batch": 4, "micro_batch": 2, "precision": "fp32"}
tiny = {"hidden_size": 16, "layers": 1, "heads": 2, "mlp_size": 32, "max_positions": 256}

dt.prepare(dt.PrepareConfig(inputs=text, tokenizer=tokenizer, out=out / "text"))
base = dt.PretrainConfig.model_validate({
    "run": {"dir": out / "base"}, "tokenizer": tokenizer, "drafter": tiny, "train": train,
    "data": {"sources": [{"path": out / "text"}], "sequence_length": 32},
})
assert dt.pretrain(base) == 0
distilled = {
    "run": {"dir": out / "kld"}, "tokenizer": tokenizer, "drafter": {"init_from": out / "base"}, "train": train,
    "target": {"path": target, "precision": "fp32"}, "objective": {"kld": 1.0},
    "data": {"sources": [{"path": chat}], "sequence_length": 32},
}
assert dt.distill(dt.DistillConfig.model_validate(distilled)) == 0
answers = {"target": {"path": target, "precision": "fp32"}, "seeds": {"inputs": str(out / "seeds.jsonl")},
           "out": out / "answers", "max_new_tokens": 4, "temperatures": [0.0]}
import dist_train.generate.stage  # as the package's own modules do: the name stays callable
assert dt.generate(dt.GenerateConfig.model_validate(answers)) == 0
export = {"drafter": out / "kld", "target": {"path": target}, "out": out / "exported", "dtype": "fp32"}
assert dt.export(dt.ExportConfig.model_validate(export)) == 0
"""


@pytest.mark.timeout(300)
def test_the_method_in_one_python_process(tiny, tmp_path):
    (tmp_path / "seeds.jsonl").write_text(json.dumps({"prompt": "Say the model"}) + "\n")
    words = [tiny.root / "text.jsonl", tiny.tokenizer, tiny.target, tiny.chats, tmp_path]
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "kld" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


def test_launch_starts_processes_of_its_own(tiny, tmp_path):
    config = dt.PrepareConfig(
        inputs=str(tiny.root / "text.jsonl"), tokenizer=str(tiny.tokenizer), out=tmp_path / "shards"
    )
    assert dt.launch(config, processes=2) == 0
    assert (tmp_path / "shards" / "index.json").read_bytes() == (tiny.corpus / "index.json").read_bytes()


def test_bad_input_is_raised_before_anything_starts(tmp_path):
    with pytest.raises(dt.DataError, match="no such input file"):
        dt.launch(dt.PrepareConfig(inputs="/nowhere", tokenizer="/no", out=tmp_path), processes=2)
    with pytest.raises(dt.UserError, match="0 processes: at least 1"):
        dt.launch(dt.PrepareConfig(inputs="/nowhere", tokenizer="/no", out=tmp_path), processes=0)
    with pytest.raises(dt.UserError, match=r"nowhere.yaml: cannot be read"):
        dt.load_config(dt.DistillConfig, "nowhere.yaml", ["train.steps=1"])
    with pytest.raises(dt.UserError, match=r"unknown key train.leraning_rate; did you mean train.learning_rate"):
        dt.load_config(dt.DistillConfig, None, ["train.leraning_rate=1"])


def test_a_stage_takes_its_own_configuration_alone(tmp_path):
    config = dt.PrepareConfig(inputs="/nowhere", tokenizer="/no", out=tmp_path)
    for stage in (dt.generate, dt.distill):
        with pytest.raises(TypeError, match=r"takes a (Generate|Distill)Config, not that of prepare"):
            stage(config)


def test_every_public_name_is_there():
    assert {name for name in dt.__all__ if not hasattr(dt, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = dt.distil
