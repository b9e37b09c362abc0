"""Files that went wrong, of every kind that is read: done, or refused in one line that names the thing."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from fuzz.kinds import SEEDS, Mutant, World, make
from fuzz.sandbox import Ended, Sandbox
from generations import generation
from runs import arguments, run_by
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_train.api.stages import STAGES
from dist_train.config import dump_config
from dist_train.slurm import journal
from dist_train.slurm.journal import Job
from dist_train.slurm.standing import Standing

CAMPAIGN = 2000
SLICE = 60
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as running:
        yield running


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Made once, by the commands themselves."""
    root = tmp_path_factory.mktemp("fuzz")
    seeds = root / "seeds.jsonl"
    seeds.write_text("".join(f'{{"prompt": "{seed["prompt"]}"}}\n' for seed in SEEDS["prompt"]))
    target = [f"target.path={tiny.target}", "target.precision=fp32"]
    hf_target = root / "hf_target"
    save_for_huggingface(tiny, hf_target)
    evaluate = [
        *target, f"drafters={{base: {tiny.drafter}, other: {tiny.drafter}}}", f"tasks=[{{name: a, inputs: {seeds}}}]",
        "max_new_tokens=8", "gammas=[2]", "temperatures=[0]", "token_rate.prompts=0",
    ]  # fmt: skip
    training = [*arguments(tiny, root / "run", *tiny.data("corpus"), steps=2), "checkpoint.every=1"]
    run_by(1, "pretrain", *training)
    run_by(1, *generation(tiny, root / "answers", "seeds.limit=12", "max_new_tokens=8"))
    run_by(1, "evaluate", *evaluate, f"out={root / 'a'}")
    shutil.copytree(root / "a", root / "b")
    keep_journal(root / "run")
    words = {
        "prepare": [f"inputs={seeds}", "text_field=prompt", f"tokenizer={tiny.tokenizer}", f"out={root / 'out'}"],
        "pretrain": [word for word in training if not word.startswith("run.dir=")] + [f"run.dir={root / 'new'}"],
        "generate": [*target, f"seeds.inputs={seeds}", "max_new_tokens=8", f"out={root / 'out'}"],
        "distill": [*training[1:], f"run.dir={root / 'new'}", *target, *tiny.data("chats", "corpus")],
        "evaluate": [*evaluate, f"out={root / 'out'}"],
        "export": [f"drafter={tiny.drafter}", *target, f"prompts.inputs={seeds}", f"out={root / 'out'}"],
    }
    configs = {name: yaml.safe_load(dump_config(STAGES[name].read(given))) for name, given in words.items()}
    stages = {name: {"config": configs[name], "slurm": {"nodes": 1}} for name in ("prepare", "distill", "evaluate")}
    stages["distill"]["after"] = []
    configs["pipeline"] = {"slurm": {"nodes": 2, "gpus_per_node": 1, "time": "1:00:00"}, "stages": stages}
    return World(
        tiny.tokenizer, tiny.target, hf_target, tiny.drafter, root / "run", tiny.corpus, tiny.chats, root / "answers",
        (root / "a", root / "b"), seeds, configs,
    )  # fmt: skip


def save_for_huggingface(tiny, folder):
    """The target as most are today: no sentencepiece model, a template in a file, weights in parts."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.target)
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert {"chat_template.jinja", "model.safetensors.index.json"} <= {path.name for path in folder.iterdir()}


def keep_journal(run):
    """A job of two starts, and one that waits for it."""
    for start, done in ((1, 0), (2, 1)):
        job = Job("17", start, "n1")
        journal.begin(run, "pretrain", job, Standing(done, 2, "step", False))
        journal.end(run, "pretrain", job, Standing(done + 1, 2, "step", done == 1), 0, "signal", None)
    journal.note(run, "18", "submitted", stage="pretrain", after={"17": str(run)})


def fault_of(mutant: Mutant, ended: Ended) -> str:
    """What is wrong with how a command ended; nothing where all is well."""
    if ended.code is None:
        return "hangs"
    if "Traceback (most recent call last)" in ended.said + ended.complaint:
        return "traceback"
    if ended.code not in (0, 2, *mutant.codes):
        return f"exit code {ended.code}"
    if ended.code == 2:
        lines = [line for line in ended.complaint.split("\n") if not line.startswith("seeds: ")]
        if len(lines) != 2 or lines[1]:
            return "not one line"
        if not lines[0].isprintable():
            return "what a terminal obeys"
        if not any(name in ended.complaint for name in mutant.names):
            return "names nothing"
    return mutant.judge(ended)


def faults(world, sandbox, folder, numbers) -> list[str]:
    """One entry for each mutant at fault; its files stay in `folder`, those of the others do not."""
    found = []
    for number in numbers:
        place = folder / str(number)
        mutant = make(world, number, place)
        ended = sandbox(*mutant.words)
        if fault := fault_of(mutant, ended):
            words = " ".join(map(str, mutant.words))
            found.append(
                f"mutant {number} ({mutant.kind}): {fault}\n  {mutant.file}\n  dist-train {words[:600]}\n"
                f"  code {ended.code}; {ended.said[-300:]}\n{ended.complaint[-3000:]}"
            )
            print(found[-1], flush=True)
        else:
            shutil.rmtree(place)
    return found


def test_a_slice_of_the_campaign(world, sandbox, tmp_path):
    found = faults(world, sandbox, tmp_path, range(SLICE))
    assert not found, "\n".join(found)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_campaign(world, sandbox, tmp_path):
    """Of DIST_TRAIN_FUZZ=17,34,... those mutants alone; their files, and those of mutants at fault, stay there."""
    chosen = os.environ.get("DIST_TRAIN_FUZZ")
    found = faults(world, sandbox, tmp_path, map(int, chosen.split(",")) if chosen else range(CAMPAIGN))
    assert not found, "\n".join(["", *found, f"{len(found)} mutants at fault"])
