"""The target in every sharding against the plain model, for the families that people serve."""

from __future__ import annotations

import json
import shutil

import pytest
from runs import distillation, on_ranks
from transformers import AutoTokenizer

from dist_train.config import TargetSection, TrainConfig
from dist_train.doctor.inputs import input_findings
from dist_train.errors import UserError
from dist_train.models.target_tokenizer import load_target_tokenizer
from dist_train.train import stage

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": {**GROUPED, "tie_word_embeddings": True},
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 8},  # a soft cap
    "Gemma3": {**GROUPED, "head_dim": 8, "sliding_window": 8},
    "Phi": {},  # a bias
    "Phi3": GROUPED,
}

COMPARE = """
import sys
from pathlib import Path
import torch
from dist_train.config import TargetSection
from dist_train.losses import linear_divergence
from dist_train.runtime.process_group import started
from dist_train.models.target import Target

folder, sharding = Path(sys.argv[1]), sys.argv[2]
with started() as runtime:
    from transformers import AutoModelForCausalLM

    for path in sorted(folder.iterdir()):
        torch.manual_seed(runtime.rank)
        ids = torch.randint(320, (2, 24))
        positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)  # two documents
        target = Target(TargetSection(path=str(path), precision="fp32", sharding=sharding), runtime)
        states = target(ids, positions)

        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        logits = torch.cat([whole(ids[:, :10]).logits, whole(ids[:, 10:]).logits], 1)
        torch.manual_seed(9)
        drafter = torch.randn(2, 24, 16), torch.randn(320, 16)
        for name in ("kld", "tvd"):
            found = linear_divergence(name, *drafter, states, target.head).loss
            log_p, log_q = (x.double().log_softmax(-1) for x in (drafter[0] @ drafter[1].T, logits))
            if name == "kld":
                expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
            else:
                expected = (log_q.exp() - log_p.exp()).abs().sum(-1).mean() / 2
            assert abs(found / expected - 1) < 1e-5, (path.name, name, float(found), float(expected))
        held = [getattr(p, "ds_tensor", p) for p in target._decoder.parameters()]
        mine = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in held)
        share = mine / sum(p.numel() for p in whole.get_decoder().parameters())
        print(path.name, round(share, 3))

    from dist_train.models.drafter import load_drafter
    from dist_train.errors import UserError

    torn = Path(sys.argv[3])
    section = TargetSection(path=str(torn), precision="fp32", sharding=sharding)
    for load in (lambda: Target(section, runtime), lambda: load_drafter(torn)):
        try:
            load()
        except UserError as error:
            assert "model.layers.1.mlp.up_proj.weight" in str(error), error
        else:
            raise AssertionError("a weight that is missing was made up")
    runtime.barrier()  # the others may still need what rank 0 holds to find each other
"""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("families")
    for name, more in FAMILIES.items():
        config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
        torch.manual_seed(1)
        made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**SIZES, **more))
        made.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def torn(families, tmp_path_factory):
    """A folder of weights, one of which is not there; tied ones are there once, and not missing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("torn") / "Qwen2"
    shutil.copytree(families / "Qwen2", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("sharding", "ranks"), [("replicate", 1), ("zero3", 2), ("tp", 2), ("tp", 4)])
def test_every_family_gives_the_losses_of_the_whole_model(families, torn, sharding, ranks):
    """And a target or drafter that lacks a weight is refused, which transformers would fill with random numbers."""
    done = on_ranks(COMPARE, ranks, families, sharding, torn)
    shares = {line.split()[0]: float(line.split()[1]) for line in done[0].stdout.splitlines() if len(line.split()) == 2}
    assert set(shares) == set(FAMILIES)
    if sharding != "replicate":  # the rest are norms and biases, which tensor parallelism leaves whole
        assert all(share < 0.55 for share in shares.values()), shares


LOAD = """
import os, sys, threading, time
from pathlib import Path
from dist_train.config import TargetSection
from dist_train.runtime.process_group import started
from dist_train.models.target import Target
import deepspeed, transformers.integrations.deepspeed, transformers.models.llama

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

with started() as runtime:
    runtime.barrier()
    level, highest, loading = anonymous(), [0], [True]
    def watch():
        while loading:
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.003)
    threading.Thread(target=watch, daemon=True).start()
    target = Target(TargetSection(path=sys.argv[1], sharding=sys.argv[2], precision="bf16"), runtime)
    loading.clear()
    held = [getattr(p, "ds_tensor", p) for p in target._decoder.parameters()]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in held]
    head = target.head.weight.numel() * 2
    at_rest = sum(p.numel() * p.element_size() for p in held) + head
    size = sum(path.stat().st_size for path in Path(sys.argv[1]).glob("*.safetensors"))
    print(size, at_rest, head, highest[0] - level)
"""


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_no_rank_holds_a_large_target_whole(tmp_path):
    """2.4B parameters on two ranks: half of the bytes and the head at rest, and while loading never 0.65 of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32, "num_key_value_heads": 8}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "target", max_shard_size="1GB")
    finally:
        torch.set_default_dtype(before)
    for sharding in ("zero3", "tp"):
        for rank in on_ranks(LOAD, 2, tmp_path / "target", sharding):
            size, at_rest, head, rise = map(int, rank.stdout.split()[-4:])
            print(
                f"{sharding}: {size / 1e9:.2f} GB, at rest {at_rest / size:.3f}, peak while loading {rise / size:.3f}"
            )
            assert at_rest <= size / 2 + head + 1e6  # norms are whole everywhere
            assert rise <= 0.65 * size


def test_a_tokenizer_of_other_pieces_is_refused(tiny, other_tokenizer, refused, tmp_path):
    told = refused(*distillation(tiny, tmp_path / "run", f"tokenizer={other_tokenizer}"))
    assert f"{other_tokenizer} is not the tokenizer of {tiny.target}: pieces: " in told
    assert f"set tokenizer={tiny.target}" in told


def test_a_target_with_an_added_token_can_judge_the_corpora_before(tiny, tmp_path):
    target, more = shutil.copytree(tiny.target, tmp_path / "target"), AutoTokenizer.from_pretrained(tiny.target)
    more.add_tokens(["<pad-of-a-fine-tune>"], special_tokens=True)
    more.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))  # its weights know the token
    section = TargetSection(path=str(target), precision="fp32")
    found = load_target_tokenizer(section, str(tiny.tokenizer), strict=False)
    assert found.vocab_size == tiny.vocab_size
    with pytest.raises(UserError, match="vocabulary: 320 pieces, 321 pieces"):  # what is asked of it would lack them
        load_target_tokenizer(section, str(tiny.tokenizer))
    tree = {"target": {"path": str(target)}, "tokenizer": str(tiny.tokenizer), "train": {"steps": 1}}
    more = {"run": {"dir": str(tmp_path / "run")}, "data": {"sources": [{"path": "gone"}]}, "objective": {"kld": 1.0}}
    config = TrainConfig.model_validate({**tree, **more})
    looked = {finding.check: finding for finding in input_findings(stage, config, "n1")}
    assert looked["tokenizer"].verdict == "ok" and "no id is another piece" in looked["tokenizer"].text


def test_a_target_without_a_tokenizer_is_said_to_be_compared_with_nothing(tiny, tmp_path, capfd):
    target = shutil.copytree(tiny.target, tmp_path / "target", ignore=shutil.ignore_patterns("*token*"))
    for _ in range(2):
        load_target_tokenizer(TargetSection(path=str(target)), str(tiny.tokenizer), strict=False)
    told = capfd.readouterr().err
    assert told.startswith(f"{tiny.tokenizer}: taken for the target's without a look: {target}: no tokenizer can be ")
    assert told.count("\n") == 1
