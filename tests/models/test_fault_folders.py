"""Whole folders as users have them, made by the script among the shared fault inputs: each serves, or says why not.

`test_folders.py` makes one fault each in the tiny target, without the script, and knows more of the lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from model_folders import STAGES, commands

# Exit codes of the stages, and words of the one line of each that refuses the folder. 1: `export --check` finds that
# the drafter beside it (`PARTNERS`) would not be served with this target, another template or end, say.
FOLDERS = {
    "adapter": ((0, 2, 2, 2), "an adapter of"),
    "alternate": ((0, 0, 0, 1), ""),
    "badgen": ((0, 0, 0, 0), ""),
    "badgen_eosonly": ((0, 0, 0, 1), ""),
    "bin": ((0, 2, 2, 0), "pytorch_model.bin"),
    "c_drop_int": ((0, 0, 0, 0), ""),
    "c_eos_list": ((0, 0, 0, 1), ""),
    "c_eps_int": ((0, 2, 2, 2), "'rms_norm_eps' expected float"),
    "c_layers_str": ((0, 2, 2, 2), "'num_hidden_layers' expected int"),
    "c_pad_minus": ((0, 0, 0, 0), ""),
    "c_pos_float": ((0, 2, 2, 2), "'max_position_embeddings' expected int"),
    "c_theta_int": ((0, 0, 0, 0), ""),
    "c_tie_str": ((0, 2, 2, 2), "'tie_word_embeddings' expected bool"),
    "c_vocab_str": ((0, 2, 2, 2), "'vocab_size' expected int"),
    "drafter": ((0, 0, 0, 0), ""),
    "eot": ((0, 0, 0, 1), ""),
    "generation_tag": ((0, 0, 0, 0), ""),
    "jinja_sp": ((0, 0, 0, 1), ""),
    "lfs": ((0, 2, 2, 0), "model.safetensors: a pointer of git-lfs"),
    "lfs_tok": ((2, 2, 2, 2), "tokenizer.model: not a sentencepiece model"),
    "named_hf": ((0, 0, 0, 1), ""),
    "named_sp": ((0, 0, 0, 1), ""),
    "no_template_hf": ((2, 2, 2, 0), "chat_template=FILE"),
    "no_template_sp": ((2, 2, 2, 0), "chat_template=FILE"),
    "pad32000": ((0, 0, 0, 0), ""),
    "pad32000_hf": ((0, 0, 0, 1), ""),
    "padded": ((0, 0, 0, 0), ""),
    "parts": ((0, 0, 0, 1), ""),
    "plain": ((0, 0, 0, 0), ""),
    "q_awq": ((0, 2, 2, 0), "pip install gptqmodel"),
    "q_bnb": ((0, 2, 2, 0), "pip install bitsandbytes"),
    "q_ct": ((0, 2, 2, 0), "pip install compressed-tensors"),
    "q_fp8": ((0, 0, 0, 0), ""),
    "q_gptq": ((0, 2, 2, 0), "pip install optimum gptqmodel"),
    "q_mxfp4": ((0, 0, 0, 0), ""),
    "q_unknown": ((0, 2, 2, 0), "quantised, nosuch"),
    "strftime": ((0, 0, 0, 1), ""),
    "think": ((0, 0, 0, 1), ""),
    "tied": ((0, 0, 0, 0), ""),
    "tok": ((0, 2, 2, 2), "no target model"),
    "undefined_msgs": ((0, 0, 0, 1), ""),
}
# By the vocabulary a drafter for the folder, which of other sizes is its own.
PARTNERS = {320: "drafter", "320": "drafter", 322: "generation_tag", None: "drafter"}
SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "max_length": 4096,
}


@pytest.fixture(scope="module")
def built(shared, tmp_path_factory):
    """All of them, and the conversations that they are tried on."""
    root = tmp_path_factory.mktemp("built")
    script = [sys.executable, shared / "faults" / "build_models.py", root]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(script, check=True, capture_output=True, env=environment, timeout=300)
    copy = root / "badgen_eosonly"
    copy.mkdir()
    for file in (root / "badgen").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps(SETTINGS))
    return root


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    record = {"prompt": "the kettle {} hums when rain begins", "response": "nobody minds"}
    path.write_text("".join(json.dumps(record).replace("{}", str(n)) + "\n" for n in range(8)))
    return path


def test_every_folder_is_in_the_table(built):
    assert {folder.name for folder in built.iterdir()} == FOLDERS.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_each_serves_or_says_why_not(built, chats, command, tmp_path, name):
    folder, (codes, words) = built / name, FOLDERS[name]
    config = folder / "config.json"
    size = json.loads(config.read_text()).get("vocab_size") if config.exists() else None
    words_of = commands(folder, built / PARTNERS.get(size, name), chats, tmp_path)
    for stage, expected in zip(STAGES, codes, strict=True):
        code, said, complaint = command(*words_of[stage])
        assert code == expected, (stage, said, complaint)
        assert "Traceback" not in complaint
        if code == 2:
            begin = f"dist-train {words_of[stage][0]}: {folder}"
            assert complaint.startswith(begin) and words in complaint and complaint.count("\n") == 1, complaint
