"""Every check of the gate: passed by an exported folder, failed by one in which a single thing was changed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    from dist_train.cli import main

    out = tmp_path_factory.mktemp("gate") / "drafter"
    assert main(["export", f"drafter={tiny.drafter}", f"target.path={tiny.target}", f"out={out}"]) == 0
    return out


@pytest.fixture
def verdicts(command, tiny):
    """`verdicts(folder)`: exit code of `export --check`, and the verdict on each thing."""

    def run(folder, *more):
        code, out, _ = command("export", "--check", tiny.target, f"drafter={folder}", *more)
        *lines, conclusion = out.splitlines()
        assert conclusion.split(":")[0] == ("refused" if code else "passed")
        return code, {line[9:].partition(":")[0]: line.split()[0] for line in lines}

    return run


# What transformers reads, which stops at a value of another type.
BY_TRANSFORMERS = {"pieces", "tokenizer's special ids", "encoding", "chat template", "weights", "dtype"}


def edit(name, **changes):
    def doctor(folder):
        content = json.loads((folder / name).read_text())
        changed = {**content, **changes}
        assert changed != content
        (folder / name).write_text(json.dumps(changed))

    return doctor


def remove(name):
    return lambda folder: (folder / name).unlink()


def add(name):
    def doctor(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    return doctor


def tear(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def swap_pieces(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = "e", "a"
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def change_sentencepiece(folder):
    model = (folder / "tokenizer.model").read_bytes()
    assert model.count("\u2581drafter".encode()) == 1
    (folder / "tokenizer.model").write_bytes(model.replace("\u2581drafter".encode(), "\u2581draftex".encode()))


def drop_template(folder):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    del content["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def weights(change):
    def doctor(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return doctor


def drop_head(tensors):
    del tensors["lm_head.weight"]


def make_nan(tensors):
    tensors["model.norm.weight"][0] = torch.nan


def widen(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def test_an_exported_folder_passes(exported, verdicts):
    code, found = verdicts(exported)
    assert code == 0
    assert set(found.values()) == {"ok"}
    assert len(found) == 13


@pytest.mark.parametrize(
    ("doctor", "failed"),
    [
        (edit("config.json", architectures=["MistralForCausalLM"]), {"architecture"}),
        (edit("config.json", auto_map={"AutoModelForCausalLM": "x.Y"}), {"architecture"}),
        (edit("config.json", quantization_config={"quant_method": "fp8"}), {"architecture"}),
        (edit("config.json", vocab_size="320"), {"vocabulary size", *BY_TRANSFORMERS}),
        (edit("config.json", max_position_embeddings="256"), {"positions", *BY_TRANSFORMERS}),
        (edit("config.json", vocab_size=321), {"vocabulary size", "weights"}),
        (remove("tokenizer.model"), {"pieces"}),
        (remove("tokenizer.json"), {"pieces"}),
        (swap_pieces, {"pieces", "encoding"}),
        (change_sentencepiece, {"pieces"}),
        (tear("tokenizer.json"), {"pieces", "encoding", "tokenizer's special ids", "chat template"}),
        (edit("tokenizer_config.json", add_bos_token=False), {"tokenizer's special ids"}),
        (edit("config.json", eos_token_id=5), {"special ids"}),
        (edit("config.json", bos_token_id=None), {"special ids"}),
        (edit("config.json", pad_token_id=0), {"special ids"}),
        (drop_template, {"chat template"}),
        (edit("tokenizer_config.json", chat_template="{{ messages }}"), {"chat template"}),
        (edit("config.json", pard_token=320, parallel_tokens=4), {"drafting"}),
        (edit("config.json", pard_token=2, parallel_tokens=4), {"drafting"}),
        (edit("config.json", pard_token=5), {"drafting"}),
        (add("pytorch_model.bin"), {"safetensors only"}),
        (add("more/optimizer.PT"), {"safetensors only"}),
        (add("modeling.py"), {"safetensors only"}),
        (weights(drop_head), {"weights"}),
        (weights(make_nan), {"weights"}),
        (weights(widen), {"dtype"}),
        (edit("config.json", dtype="float32"), {"dtype"}),
        (remove("model.safetensors"), {"safetensors only", "weights", "dtype"}),
        (edit("generation_config.json", eos_token_id=[2, 7]), {"generation config"}),
        (remove("generation_config.json"), {"generation config"}),
    ],
)  # fmt: skip
def test_one_change_is_found(exported, verdicts, tmp_path, doctor, failed):
    folder = tmp_path / "doctored"
    shutil.copytree(exported, folder)
    doctor(folder)
    code, found = verdicts(folder)
    assert code == 1
    assert {name for name, verdict in found.items() if verdict == "failed"} == failed
    assert len(found) == 13


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_holds_no_object_is_named(exported, command, tiny, tmp_path, name):
    folder = tmp_path / "doctored"
    shutil.copytree(exported, folder)
    (folder / name).write_text("[1]")
    _, told, _ = command("export", "--check", tiny.target, f"drafter={folder}")
    failed = [line for line in told.splitlines() if line.startswith("failed")]
    assert failed and all(name in line and "export again" in line for line in failed)


def test_a_drafter_shorter_than_what_is_served(exported, verdicts, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(exported, folder)
    edit("config.json", max_position_embeddings=64)(folder)
    assert (lambda code, found: (code, found["positions"]))(*verdicts(folder)) == (1, "failed")
    assert (lambda code, found: (code, found["positions"]))(*verdicts(folder, "serving_length=64")) == (0, "ok")
    assert (lambda code, found: (code, found["positions"]))(*verdicts(folder, "serving_length=65")) == (1, "failed")


def test_a_drafter_of_one_pass_tells_servers_how(exported, verdicts, command, tiny, tmp_path):
    folder, out = tmp_path / "trained", tmp_path / "out"
    shutil.copytree(exported, folder)
    edit("config.json", pard_token=5, parallel_tokens=2)(folder)
    assert verdicts(folder)[0] == 0
    code, told, _ = command("export", f"drafter={folder}", f"target.path={tiny.target}", f"out={out}")
    assert code == 0 and "up to 2 tokens in one pass" not in told
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert (config["pard_token"], config["parallel_tokens"]) == (5, 2)
    assert '"num_speculative_tokens": 2' in card and '"parallel_drafting": true' in card
    assert "max_draft_len=2" in card and "mask_token_id=5" in card


def test_what_cannot_be_checked_is_one_line(refused, tiny, tmp_path):
    assert "no run, checkpoint or Hugging Face" in refused("export", "--check", tiny.target, f"drafter={tmp_path}")
    assert "no target model" in refused("export", "--check", "/nowhere", f"drafter={tiny.drafter}")
    shutil.copytree(tiny.target, tmp_path / "target")
    for doctor in (tear("generation_config.json"), lambda at: (at / "generation_config.json").write_text("[1]")):
        doctor(tmp_path / "target")
        complaint = refused("export", "--check", tmp_path / "target", f"drafter={tiny.drafter}")
        assert "generation_config.json cannot be read" in complaint and "fetch it again" in complaint
