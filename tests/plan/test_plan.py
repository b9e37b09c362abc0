"""`dist-train plan` against sums made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_train.config import GenerateConfig, TrainConfig
from dist_train.errors import UserError
from dist_train.plan import GPUS, Assumptions, Machine, llama_of, plan_generation, plan_training, render, stage_of

# Blocks of the 115M drafter: 4 x (4 x 1024^2 + 3 x 1024 x 2816) = 51,380,224, norms 9 x 1024 = 9,216, head
# 32,000 x 1024 = 32,768,000; the embedding, as large as the head, is looked up and not multiplied.
MATRICES = 51_380_224 + 9_216 + 32_768_000
DRAFTER = MATRICES + 32_768_000
# Llama 2 7B: 6,738,415,616 by its model card, of which the embedding is 32,000 x 4096.
TARGET = 6_738_415_616
EMBEDDING = 32_000 * 4096
EXACT = Assumptions(mfu=0.2, target_mfu=0.4, links=1.0)


def config(**more):
    train = {"steps": 1000, "global_batch": 256, "micro_batch": 4, **more.pop("train", {})}
    tree = {
        "run": {"dir": "run"},
        "tokenizer": "tokenizer.model",
        "data": {"sources": [{"path": "shards"}], "sequence_length": 2048},
        "objective": {"ce": 1.0},
        "train": train,
        **more,
    }
    return TrainConfig.model_validate(tree)


def planned(gpus=32, gpu="h100", assumed=EXACT, per_node=8, **more):
    return plan_training(config(**more), Machine(GPUS[gpu], gpus, per_node), assumed, 32_000, "pretrain")


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama-7b")
    LlamaConfig().save_pretrained(folder)  # transformers' defaults are Llama 7B's sizes
    return str(folder)


def with_target(path, **section):
    return {"objective": {"kld": 1.0}, "target": {"path": path, **section}}


def test_operations_of_drafter_and_target(llama_7b):
    """6 N + causal attention 6 L T d forward and backward, 2 N + 2 L T d forward (Kaplan et al. 2020, section 2.1)."""
    plan = planned(**with_target(llama_7b))
    assert plan["drafter, a token"] == 6 * MATRICES + 6 * 4 * 2048 * 1024
    assert plan["target, a token"] == 2 * (TARGET - EMBEDDING) + 2 * 32 * 2048 * 4096


def test_time_of_a_step_is_operations_over_what_the_gpus_reach():
    plan = planned(gpus=1, train={"global_batch": 4})
    # One GPU sends nothing: 4 x 2048 tokens at 20 % of 989 TFLOP/s.
    step = 4 * 2048 * (6 * MATRICES + 6 * 4 * 2048 * 1024) / (0.2 * 989e12)
    assert plan["step"] == pytest.approx(step, rel=1e-9)
    assert plan["wall time"] == pytest.approx(1000 * step, rel=1e-9)
    assert plan["GPU-hours"] == pytest.approx(1000 * step / 3600, rel=1e-9)
    assert plan["tokens/s"] == pytest.approx(4 * 2048 / step, rel=1e-9)


def test_gradient_checkpointing_goes_forward_once_more():
    once = planned()["drafter, a step"]
    assert planned(train={"gradient_checkpointing": True})["drafter, a step"] == pytest.approx(4 / 3 * once)


@pytest.mark.parametrize(
    ("stage", "width"),
    # On 32 ranks 256 sequences of micro-batch 4 are 2 micro-batches. ZeRO paper, section 7: an all-reduce is 2 turns,
    # stage 1 sends gradients and weights once; DeepSpeed's stage 2 reduces in each micro-batch, stage 3 gathers twice
    # and reduces once in each. Weights take 2 bytes, gradients 4 from ZeRO 1 on.
    [("zero0", 2 * 2), ("zero1", 4 + 2), ("zero2", 2 * 4 + 2), ("zero3", 2 * (4 + 2 * 2))],
)
def test_bytes_that_zero_moves(stage, width):
    plan = planned(train={"deepspeed": stage})
    assert plan["drafter, a rank and step"] == pytest.approx(width * 31 / 32 * DRAFTER, rel=1e-9)


def test_a_plan_says_when_its_sharded_target_fits_whole_and_what_that_saves(llama_7b):
    sharded = planned(gpus=8, **with_target(llama_7b, sharding="zero3"))
    whole = planned(gpus=8, **with_target(llama_7b))
    (note,) = sharded.notes
    assert f"the step would take {whole['step']:.3g} s, not {sharded['step']:.3g} s" in note
    assert not whole.notes
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    from transformers import LlamaConfig

    (Path(llama_7b) / "70b").mkdir(exist_ok=True)
    LlamaConfig(**large, num_attention_heads=64, num_key_value_heads=8).save_pretrained(Path(llama_7b) / "70b")
    assert not planned(gpus=8, **with_target(f"{llama_7b}/70b", sharding="zero3")).notes


def test_bytes_of_a_partitioned_target(llama_7b):
    """Each of 2 micro-batches gathers all bf16 weights but the head's, of which a 32nd is there already."""
    plan = planned(**with_target(llama_7b, sharding="zero3"))
    assert plan["target, a rank and step"] == pytest.approx(2 * 31 / 32 * 2 * (TARGET - EMBEDDING), rel=1e-9)
    # Through the 8 adapters of 50 GB/s of a node, which NVLink's 450 GB/s do not bound; the drafter's come on top.
    moved = plan["target, a rank and step"] + plan["drafter, a rank and step"]
    assert plan["step"] - plan["drafter, a step"] - plan["target, a step"] == pytest.approx(moved / 400e9, rel=1e-6)


def test_bytes_of_a_tensor_parallel_target(llama_7b):
    """A layer has 2 all-reduces, a ring sends 2 (k-1)/k of [4 ranks x 4 x 2048, 4096] in bf16; 2 micro-batches."""
    plan = planned(**with_target(llama_7b, sharding="tp", tp_size=4))
    once = 2 * 3 / 4 * (4 * 4 * 2048 * 4096 * 2)
    assert plan["target, a rank and step"] == pytest.approx(2 * 32 * 2 * once, rel=1e-9)


def test_a_target_that_only_gives_its_vocabulary_costs_nothing(llama_7b):
    plan = planned(target={"path": llama_7b})
    assert "target, a step" not in plan and plan["step"] == planned()["step"]


def test_more_gpus_take_less_time_and_about_as_many_gpu_hours(llama_7b):
    plans = [planned(gpus=gpus, **with_target(llama_7b, sharding="zero3")) for gpus in (8, 16, 32, 64)]
    walls, hours = [plan["wall time"] for plan in plans], [plan["GPU-hours"] for plan in plans]
    assert walls == sorted(walls, reverse=True)
    assert hours == sorted(hours) and hours[-1] < 1.5 * hours[0]
    assert [plan["share of a step"] for plan in plans] == sorted(plan["share of a step"] for plan in plans)


def test_slower_hardware_and_longer_runs_take_longer():
    assert planned(gpu="a100")["wall time"] > planned(gpu="h100")["wall time"]
    assert planned(train={"steps": 2000})["wall time"] == pytest.approx(2 * planned()["wall time"])
    assert planned(assumed=Assumptions(mfu=0.4, links=1.0))["drafter, a step"] == planned()["drafter, a step"] / 2


def test_memory_is_the_estimate_that_training_itself_makes_and_says_whether_it_fits(llama_7b):
    plan = planned(**with_target(llama_7b))
    assert plan["target weights"] == pytest.approx(2 * TARGET / 2**30)
    assert "of 75: fits" in render(plan)
    huge = planned(drafter={"hidden_size": 16384, "layers": 40, "heads": 128, "mlp_size": 65536})
    assert "DOES NOT FIT" in render(huge) and "does not fit" in huge.notes[0]


def test_storage():
    plan = planned(train={"ema_decay": 0.99}, checkpoint={"keep": 3, "keep_every": 250})
    assert plan["shards"] == 2 * 1000 * 256 * 2048  # below 65,536 pieces an id takes 2 bytes
    assert plan["a checkpoint"] == 16 * DRAFTER  # weights, two moments, average, 4 bytes each
    assert plan["checkpoints kept"] == (3 + 1 + 4) * 16 * DRAFTER


def test_generation_is_bounded_by_the_slowest_of_three(llama_7b):
    wanted = {"target": {"path": llama_7b}, "seeds": {"inputs": "x"}, "out": "y", "temperatures": [0, 1]}
    section = GenerateConfig.model_validate({**wanted, "batch_size": 32, "max_new_tokens": 512})
    assumed = Assumptions(memory_bandwidth=0.5, target_mfu=0.4)
    plan = plan_generation(section, Machine(GPUS["h100"], 16), assumed, 1000, 200)
    cache = 32 * 512 * 2 * 32 * 4096 * 2  # sequences x tokens x keys and values x layers x width x bytes
    assert plan["reading, a token each"] == pytest.approx((2 * TARGET + cache / 2) / (0.5 * 3.35e12))
    assert plan["launching"] == pytest.approx(32 * 0.8e-3)
    assert plan["a token each"] == max(plan[name] for name in ("reading, a token each", "calculating", "launching"))
    assert plan["tokens"] == 1000 * 2 * 200
    assert plan["wall time"] == pytest.approx(1000 * 2 * 200 / (16 * 32 / plan["a token each"]))
    more = GenerateConfig.model_validate({**wanted, "top_p": [0.9, 0.95], "samples": 3})
    plan = plan_generation(more, Machine(GPUS["h100"], 16), assumed, 1000, 200)
    assert plan["tokens"] == 1000 * (1 + 2 * 3) * 200  # greedy once, whatever top_p and samples


@pytest.mark.parametrize("parameters", [1.1e9, 6.74e9, 69e9])
def test_a_llama_of_a_given_size_has_that_size(parameters):
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_of(parameters, 32_000))
    assert model.num_parameters() == pytest.approx(parameters, rel=1e-3)


def test_its_depth_is_that_of_the_models_of_that_size():
    """Llama 2 7B: 32 layers, 4096 wide."""
    shape = llama_of(6.74e9, 32_000)
    assert abs(shape.num_hidden_layers - 32) <= 1 and abs(shape.hidden_size - 4096) <= 128


def test_the_stage_is_told_by_the_sections(tmp_path):
    assert stage_of(None, ["seeds.inputs=x", "target.path=y"]) == "generate"
    assert stage_of(None, ["target.path=y"]) == "distill"
    assert stage_of(None, ["target.path=y", "objective={ce: 1}"]) == "pretrain"
    assert stage_of(None, ["inputs=x", "out=y"]) == "prepare"
    assert stage_of(None, ["drafters={a: x}", "target.path=y"]) == "evaluate"
    (tmp_path / "c.yaml").write_text("target: {path: x}\n")
    assert stage_of(tmp_path / "c.yaml", []) == "distill"


GIVEN = ["run.dir=r", "tokenizer=/nowhere", "data.sources=[{path: s}]", "train.steps=10"]
TARGETED = ["target.path=somewhere", "objective={kld: 1}"]
ON = ["--gpus", "8", "--gpu", "h100"]


def test_the_command_prints_every_assumption_with_its_formula(command):
    more = ["target.path=somewhere", "objective={kld: 1}", "--target-parameters", "7e9", "--vocab-size", "32000"]
    code, shown, _ = command("plan", *GIVEN, *more, *ON, "--mfu", "0.3")
    assert code == 0
    assert "target of 7B in the loop" in shown
    for text in ("989 TFLOP/s", "30.0%  forward and backward pass; --mfu", "40.0%", "GPU-hours", "share of a step"):
        assert text in shown
    assert max(map(len, shown.splitlines()[1:])) <= 120


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ([*ON], "/nowhere: no such tokenizer file or folder"),
        ([*ON], "--vocab-size 32000"),
        (["target.path=/nowhere", "objective={kld: 1}", *ON], "or plan without it: --target-parameters 7e9"),
        ([*ON, "--vocab-size", "9", "--target-parameters", "7e9"], "this configuration has no target"),
        (["--gpus", "12", "--gpu", "h100", "--vocab-size", "9"], "--gpus 12 does not fill nodes of 8"),
        (["--gpus", "24", "--gpu", "h100", "--vocab-size", "9"], "is not a multiple of train.micro_batch"),
        ([*ON, "--vocab-size", "9", "--mfu", "1.5"], "mfu 1.5: a share, above 0 and at most 1"),
        ([*ON, "--vocab-size", "9", "--network", "0"], "--network 0.0: above 0"),
        ([*TARGETED, *ON, "--vocab-size", "320", "--target-parameters", "inf"], "--target-parameters inf: above 0"),
        ([*TARGETED, *ON, "--vocab-size", "320", "--target-parameters", "7e30"], "too large to plan"),
        (
            [
                *TARGETED,
                *ON,
                "--vocab-size",
                "320",
                "--target-parameters",
                "7e9",
                "target.sharding=tp",
                "target.tp_size=3",
            ],
            "target.tp_size 3: 8 ranks are not groups of that many",
        ),
    ],
)
def test_a_mistake_is_one_line(refused, more, complaint):
    assert complaint in refused("plan", *GIVEN, *more)


def test_a_folder_is_no_configuration(refused, tmp_path):
    assert "cannot be read: Is a directory" in refused("plan", tmp_path, *ON)


def test_seeds_are_counted_as_generate_finds_them(tiny, command, refused, tmp_path):
    """Those of all sources, once, within their limits of tokens; with a Llama in the place of the target too."""
    some, more = tmp_path / "some.jsonl", tmp_path / "more.jsonl"
    some.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b", "token " * 60)))
    more.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("b", "c")))
    limited = [f"seeds.inputs={some}", "seeds.max_tokens=50", f"more_seeds=[{{inputs: {more}}}]", "temperatures=[0]"]
    for extra in ([], ["--target-parameters", "7e9", "--vocab-size", "320"]):
        code, told, _ = command("plan", f"target.path={tiny.target}", *limited, "out=x", *ON, *extra)
        assert code == 0
        assert " 3 answers" in told
    assert "or plan without it: --seeds" in refused("plan", "target.path=/nowhere", *limited, "out=x", *ON)


def test_a_stage_without_a_plan_is_named(refused):
    assert "prepare is not planned, pretrain, generate, distill are" in refused("plan", "inputs=x", "out=y", *ON)


def test_a_gpu_that_is_not_known_is_refused_before_anything(cli):
    done = cli("plan", "--gpu", "gtx", "--gpus", "1", expect=2)
    assert "invalid choice: 'gtx'" in done.stderr and done.stderr.count("\n") == 1


def test_shares_are_shares():
    with pytest.raises(UserError, match="target_mfu 0"):
        Assumptions(target_mfu=0)
