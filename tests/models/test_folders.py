"""Model folders as users have them, each through the stages that read one: it serves, or is told in one line."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from model_folders import STAGES, commands
from transformers import AutoModelForCausalLM, AutoTokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"


def change(folder, file, **values):
    """Put values into a JSON file of a folder, or make it."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def config(**values):
    return partial(change, file="config.json", **values)


def quantised(**quantization):
    return config(quantization_config=quantization)


def adapter(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    change(folder, "adapter_config.json", base_model_name_or_path="own/base", peft_type="LORA")
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


def pickled(folder):
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def lfs(folder, file):
    (folder / file).write_bytes(LFS)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)


def pad_of_huggingface(folder):
    """An added <pad> that the weights do not have, in a tokenizer without a sentencepiece model."""
    (folder / "tokenizer.model").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 320
    tokenizer.save_pretrained(folder)


def length_is_a_mapping(folder):
    (folder / "tokenizer.model").unlink()
    change(folder, "tokenizer_config.json", model_max_length={"value": 5})


def loaded(*line):
    """Only what needs the weights is refused."""
    return {"generate": line, "evaluate": line}


def read(*line):
    """What needs the configuration is refused."""
    return {**loaded(*line), "check": line}


def typed(key, value):
    return read("config.json", f"Field '{key}' expected", repr(value))


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SAMPLING = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
# Name: how the tiny target is changed, and words of the one line for each stage that refuses it.
FOLDERS = {
    "plain": (lambda folder: None, {}),
    "awq": (quantised(quant_method="awq", bits=4, group_size=128), loaded("awq", "pip install gptqmodel")),
    "gptq": (quantised(quant_method="gptq", bits=4, group_size=128), loaded("gptq", "pip install optimum gptqmodel")),
    "bitsandbytes": (quantised(**BITS), loaded("bitsandbytes", "pip install bitsandbytes")),
    "compressed": (
        quantised(quant_method="compressed-tensors", format="float-quantized", config_groups={}),
        loaded("pip install compressed-tensors"),
    ),
    "torchao": (quantised(quant_method="torchao", quant_type="int8_weight_only"), loaded("torchao", "pip install")),
    "fp8": (quantised(**FP8), {}),  # transformers itself reads these two, if need be as bf16
    "mxfp4": (quantised(quant_method="mxfp4"), {}),
    "no_such_method": (quantised(quant_method="nosuch"), loaded("quantised, nosuch", "cannot load it")),
    "no_method": (quantised(bits=4), loaded("quantised", "quant_method")),
    "vocabulary_is_text": (config(vocab_size="320"), typed("vocab_size", "320")),
    "layers_are_text": (config(num_hidden_layers="2"), typed("num_hidden_layers", "2")),
    "positions_are_real": (config(max_position_embeddings=512.0), typed("max_position_embeddings", 512.0)),
    "epsilon_is_whole": (config(rms_norm_eps=1), typed("rms_norm_eps", 1)),
    "tie_is_text": (config(tie_word_embeddings="false"), typed("tie_word_embeddings", "false")),
    "no_heads": (config(num_attention_heads=0), read("config.json", "zero")),
    "endless": (config(num_hidden_layers=10**30), loaded("num_hidden_layers", "more than any model has")),
    "dropout_is_whole": (config(attention_dropout=0), {}),
    "theta_is_whole": (config(rope_theta=10000), {}),
    "several_ends": (config(eos_token_id=[2, 3]), {"check": 1}),  # the drafter's folder has one
    "padding_of_minus_1": (config(pad_token_id=-1), {}),
    "padding_beyond_the_weights": (partial(change, file="added_tokens.json", **{"<pad>": 320}), {}),
    "padding_beyond_the_weights_hf": (pad_of_huggingface, {}),
    "settings_that_contradict": (
        partial(change, file="generation_config.json", do_sample=False, temperature=0.9, top_p=0.6),
        {},
    ),
    "settings_without_sampling": (partial(change, file="generation_config.json", **SAMPLING), {}),
    "end_is_text": (partial(change, file="generation_config.json", eos_token_id="2"), read("eos_token_id is '2'")),
    "pickled": (pickled, loaded("pytorch_model.bin", "can run code", "save_pretrained")),
    "no_weights": (no_weights, loaded("without weights")),
    "lfs": (partial(lfs, file="model.safetensors"), loaded("model.safetensors", "git-lfs")),
    "lfs_tokenizer": (
        partial(lfs, file="tokenizer.model"),
        dict.fromkeys(STAGES, ("tokenizer.model", "fetch it again")),
    ),
    "cut_weights": (cut_weights, loaded("model.safetensors", "fetch it again")),
    "torn_index": (partial(index, content="{"), loaded("model.safetensors.index.json: torn")),
    "index_leads_out": (
        partial(index, content='{"weight_map": {"lm_head.weight": "../target/model.safetensors"}}'),
        loaded("model.safetensors.index.json", "'../target/model.safetensors'"),
    ),
    "adapter": (adapter, read("an adapter of own/base", "merge")),
    "index_names_nothing": (
        partial(index, content='{"weight_map": {"lm_head.weight": "a\\u0000"}}'),
        loaded("model.safetensors.index.json", "'a\\x00'"),
    ),
    "length_is_a_mapping": (
        length_is_a_mapping,
        dict.fromkeys(STAGES, ("tokenizer_config.json: model_max_length is {'value': 5}, no number",)),
    ),
    "no_such_rope": (config(rope_parameters={"rope_type": "{% for", "rope_theta": 1e4}), loaded("'{% for'")),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_serves_or_is_told_in_one_line(tiny, command, tmp_path, name):
    alter, refusals = FOLDERS[name]
    folder = shutil.copytree(tiny.target, tmp_path / name)
    alter(folder)
    for stage, words in commands(folder, tiny.drafter, tiny.chat_lines, tmp_path).items():
        code, said, complaint = command(*words)
        expected = refusals.get(stage, 0)
        if isinstance(expected, int):
            assert code == expected, (stage, said, complaint)
        else:
            assert (code, complaint.count("\n")) == (2, 1), (stage, complaint)
            for word in (str(folder), *expected):
                assert word in complaint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_tokenizer_is_not_the_tokenizer(tiny, refused, tmp_path, name):
    complaint = refused("prepare", f"inputs={tiny.chat_lines}", f"tokenizer={tiny.tokenizer / name}", f"out={tmp_path}")
    assert f"set tokenizer to its folder, {tiny.tokenizer}" in complaint


def test_a_drafter_that_is_not_there_is_told_by_its_name(tiny, refused, tmp_path):
    words = commands(tiny.target, "0x1F", tiny.chat_lines, tmp_path)["evaluate"]
    assert "drafter a: 0x1F: no run, checkpoint or Hugging Face model here" in refused(*words)
