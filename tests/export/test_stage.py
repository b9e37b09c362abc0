"""`dist-train export`: what it writes, what it tells of it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml
from runs import distillation, run_by
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_shards.files import read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(tiny, out, *more):
    return ["export", f"drafter={tiny.drafter}", f"target.path={tiny.target}", f"out={out}", *more]


def front_matter(card):
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_drafters_cast(tiny, command, tmp_path, dtype):
    assert command(*export(tiny, tmp_path / "out", f"dtype={dtype}"))[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny.drafter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == DTYPES[dtype]
        assert torch.equal(after[name], weight.to(DTYPES[dtype]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == DTYPES[dtype]
    assert type(model).__name__ == "LlamaForCausalLM"


def test_ids_and_template_are_the_targets(tiny, command, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(tiny.target, target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    for name, changes in (
        ("config.json", {"pad_token_id": 0}),
        ("tokenizer_config.json", {"chat_template": "{{ 1 }}"}),
    ):
        content = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**content, **changes}))
    out = tmp_path / "out"
    assert command("export", f"drafter={tiny.drafter}", f"target.path={target}", f"out={out}")[0] == 0
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 1 }}"
    assert command("export", "--check", target, f"drafter={out}")[0] == 0
    assert command("export", "--check", tiny.target, f"drafter={out}")[0] == 1


def templated(tiny, folder, templates):
    """The tiny target with other chat templates, or none."""
    shutil.copytree(tiny.target, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    return folder


def test_named_templates_are_written_with_their_names(tiny, command, tmp_path):
    named = [
        {"name": name, "template": f"{{{{ '{name}' }}}}{{{{ messages[0].content }}}}"} for name in ("default", "rag")
    ]
    target, out = templated(tiny, tmp_path / "target", named), tmp_path / "out"
    assert command("export", f"drafter={tiny.drafter}", f"target.path={target}", f"out={out}")[0] == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == {one["name"]: one["template"] for one in named}


def test_of_a_target_without_a_template_none_is_made_up(tiny, command, refused, tmp_path):
    target, out = templated(tiny, tmp_path / "target", None), tmp_path / "out"
    words = ["export", f"drafter={tiny.drafter}", f"target.path={target}"]
    prompts = f"prompts={{inputs: {tiny.chat_lines}, limit: 2}}"
    assert "has no chat template; name the one" in refused(*words, f"out={out}", prompts)
    assert command(*words, f"out={out}")[0] == 0
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    code, told, _ = command("export", "--check", target, f"drafter={tiny.drafter}")
    assert (code, "warning  chat template: has one, and the target none" in told) == (0, True)
    assert command(*words, f"out={tmp_path / 'named'}", prompts, "max_new_tokens=4", "chat_template=llama2")[0] == 0
    assert "[INST]" in AutoTokenizer.from_pretrained(tmp_path / "named").chat_template


def test_the_card_has_the_training_and_the_measurements(tiny, command, tmp_path):
    run, results, out = tmp_path / "run", tmp_path / "results", tmp_path / "out"
    run_by(1, *distillation(tiny, run, f"drafter.init_from={tiny.drafter}", steps=2))
    run_by(
        1,
        "evaluate",
        f"target.path={tiny.target}",
        "target.precision=fp32",
        f"drafters={{before: {tiny.drafter}, after: {run}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 4}}]",
        f"out={results}",
        "max_new_tokens=8",
        "gammas=[2]",
        "temperatures=[0]",
        "token_rate.prompts=0",
    )
    prompts = f"prompts={{inputs: {tiny.chat_lines}, max_tokens: 100, limit: 2}}"
    arguments = ["export", f"drafter={run}", f"target.path={tiny.target}", f"out={out}", "target.precision=fp32"]
    code, said, _ = command(*arguments, f"results={results}", prompts, "max_new_tokens=8")
    assert code == 0
    assert "gives the target's own greedy output on 2 prompts" in said

    front, text = front_matter((out / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert "speculative-decoding" in front["tags"]
    assert "license" not in front
    assert "base_model" not in front, "the target is a folder here, not a model of a hub"
    state = read_json(run / "checkpoints" / "step-00000002" / "manifest.json")["state"]
    for words in (
        "objective 0.3 ce + 0.7 tvdpp",
        "2 steps of 8 x 32 tokens",
        "(512 tokens in all)",
        f"head {state['target']['head'][:12]}",
        "chats, corpus",
        "Proven at this export",
    ):
        assert words in text
    (row,) = (row for row in read_json(results / "results.json")["rows"] if row["drafter"] == "after")
    assert f"{row['block_efficiency']['value']:.2f} [" in text
    assert str(tmp_path) not in text, "a card is published: no paths of this machine"
    assert str(tmp_path) not in (out / "dist_train_export.json").read_text()

    _, _, complaint = command(*export(tiny, tmp_path / "x", f"results={tmp_path}"))
    assert "results.json: cannot be read" in complaint
    other = tmp_path / "other"
    shutil.copytree(tiny.drafter, other)
    _, _, complaint = command("export", f"drafter={other}", *export(tiny, tmp_path / "x")[2:], f"results={results}")
    assert "none of which is" in complaint

    weights = run / "checkpoints" / "step-00000002" / "model" / "model-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    code, _, complaint = command(*arguments)
    assert code == 2
    assert "is damaged: model/model-00001-of-00001.safetensors has another checksum" in complaint


def test_a_hub_target_is_the_base_model():
    from dist_train.export.card import Facts, model_card

    front, text = front_matter(
        model_card(
            Facts("drafter", "meta-llama/Llama-2-7b-chat-hf", 10, "bf16", 64, 64, True, None, [], None, None, None)
        )
    )
    assert front["base_model"] == "meta-llama/Llama-2-7b-chat-hf"
    command = next(line for line in text.splitlines() if line.startswith("vllm serve"))
    assert json.loads(command.split("'")[1]) == {
        "model": "drafter",
        "method": "draft_model",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    assert "Unproven" in text


def test_only_what_export_wrote_is_replaced(tiny, command, refused, tmp_path):
    out = tmp_path / "out"
    assert command(*export(tiny, out))[0] == 0
    assert command(*export(tiny, out, "dtype=fp32"))[0] == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    (out / "notes.txt").write_text("mine")
    assert "did not write notes.txt" in refused(*export(tiny, out))
    (out / "notes.txt").unlink()
    with (out / "README.md").open("a") as card:
        card.write("mine")
    assert "README.md was changed since it was exported; move it away" in refused(*export(tiny, out))
    (out / "README.md").unlink()
    assert command(*export(tiny, out))[0] == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    assert "did not write config.json" in refused(*export(tiny, foreign))
    assert (foreign / "config.json").read_text() == "{}"
    (tmp_path / "file").touch()
    assert "is a file" in refused(*export(tiny, tmp_path / "file"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "foreign", "file"}


def test_a_full_disk_is_one_line_and_leaves_the_old_folder(tiny, command, refused, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small]).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        assert command(*export(tiny, small / "out"))[0] == 0
        before = {path.name: path.read_bytes() for path in (small / "out").iterdir()}
        assert "No space left on device" in refused(*export(tiny, small / "out", "dtype=fp32"))
        assert {path.name: path.read_bytes() for path in (small / "out").iterdir()} == before
        assert [path.name for path in small.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_failing_converter_leaves_nothing(tiny, refused, tmp_path):
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    assert "name llama.cpp's source folder" in refused(*export(tiny, tmp_path / "out", "gguf=true"))
    given = export(tiny, tmp_path / "out", "gguf=true", f"llama_cpp={converter.parent}")
    assert "no convert_hf_to_gguf.py in it" in refused(*given)
    converter.parent.mkdir()
    converter.write_text("raise SystemExit('this shape is not supported')")
    assert "cannot convert" in (complaint := refused(*given))
    assert "this shape is not supported" in complaint
    for content in ("", "GGML"):
        converter.write_text(f"import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('{content}')")
        assert "wrote no GGUF: drafter.gguf begins otherwise" in refused(*given)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_line(tiny, refused, tmp_path):
    from dist_train.tokenizer import train_tokenizer

    train_tokenizer(["other words, of another language, altogether"] * 50, tmp_path / "tokenizer", 290)
    headless = tmp_path / "headless"
    shutil.copytree(tiny.drafter, headless)
    from safetensors.torch import save_file

    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    out = f"out={tmp_path / 'out'}"
    cases = [
        (["export", f"drafter={tiny.drafter}", out], "target.path is required"),
        (["export", f"drafter={tiny.drafter}", f"target.path={tiny.target}"], "out is required"),
        (export(tiny, tmp_path / "out", f"tokenizer={tmp_path / 'tokenizer'}"), "is not the tokenizer of"),
        (export(tiny, tmp_path / "out", "serving_length=1000"), "positions: 256, fewer than serving_length 1000"),
        (
            export(tiny, tmp_path / "out", f"prompts={{inputs: {tiny.chat_lines}, max_tokens: 1}}"),
            "no prompts in it with",
        ),
        (["export", f"drafter={headless}", f"target.path={tiny.target}", out], "lm_head.weight is missing"),
    ]
    for arguments, message in cases:
        assert message in refused(*arguments)
    assert not (tmp_path / "out").exists()
