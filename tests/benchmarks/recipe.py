"""Recipes for a drafter at equal compute: the paper's against those that begin as a projection of the target.

    python tests/benchmarks/recipe.py --target MODEL --data DIR --out DIR --seconds 150 --seeds 3

MODEL is a real chat model (SmolLM2-135M-Instruct as GGUF, say), DIR/instructions.{train,eval}.jsonl.gz hold records
{task, prompt, response}. Every recipe is a difference of `Recipe` and gets so many seconds of one thread for its
training, on the same answers and the same cached hidden states of the target, whose making no recipe is charged for.
Started again, it goes on with what is missing: answers, states, and cells (a recipe, a seed).

Block efficiency is worked out, not sampled: the held-out answers are the target's own, and on such a path a draft is
accepted with probability min(1, p(x) / q(x)), greedily where it is the drafter's best token. From these chances the
expected number of calls of the target follows for any gamma. 95 % intervals: prompts and seeds drawn again 2,000 times,
the same for both recipes of a ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from alignment import TASKS
from recipe_material import LENGTH, SERVED, Material, make
from recipe_measure import GAMMAS, calls, chances
from torch import Tensor
from transformers import LlamaConfig

from dist_train.config import LossSection
from dist_train.losses import Head
from dist_train.models.chains import Parallel, lay_out
from dist_train.models.drafter import TrainableDrafter, new_drafter
from dist_train.models.projection import Geometry, measure, project_embedding, project_head, reach
from dist_train.train.batch import DeviceBatch
from dist_train.train.beginning import Regression
from dist_train.train.objective import Objective

ROWS = 4


@dataclass(frozen=True)
class Recipe:
    """Shares of the time in order: cross-entropy on text, regression on hidden states, the objective on answers."""

    pretrain: float = 0.0
    regression: float = 0.5
    projected: bool = True
    objective: str = "kld"
    rate: float = 1.5e-3
    width: int = 128
    layers: int = 1
    tied: bool = False
    text: float = 0.1  # of the rows, but in pretraining; the paper's 9:1
    ends: float = 0.1  # the learning rate, of its peak
    muon: bool = False  # for the layers' matrices, at ten times the rate
    parallel: int = 0  # tokens drafted in one pass; 0: one a pass
    keep: float = 0.7
    uniform: bool = False  # the projection is of logits, not of distributions
    weighting: float = 0.5  # of the regression's dimensions, by this power of what an error of each costs


PAPER = Recipe(pretrain=0.5, regression=0.0, projected=False, objective="tvdpp", rate=1e-3)
OURS = Recipe()
RECIPES = {
    "paper": PAPER,
    "paper, 256 wide": replace(PAPER, width=256),
    "paper, 256 wide, 2 layers": replace(PAPER, width=256, layers=2),
    "paper, 2 layers": replace(PAPER, layers=2),
    "paper, rate 3e-4": replace(PAPER, rate=3e-4),
    "paper, rate 3e-3": replace(PAPER, rate=3e-3),
    "paper, tied": replace(PAPER, tied=True),
    "paper, to zero": replace(PAPER, ends=0.0),
    "ours": OURS,
    "ours, no regression": replace(OURS, regression=0.0),
    "ours, no projection": replace(OURS, regression=0.0, projected=False),
    "ours, uniform projection": replace(OURS, uniform=True),
    "ours, alike": replace(OURS, weighting=0.0),
    "ours, tied": replace(OURS, tied=True),
    "ours, to zero": replace(OURS, ends=0.0),
    "ours, muon": replace(OURS, muon=True),
    "ours, more text": replace(OURS, text=0.3),
    "ours, tvdpp": replace(OURS, objective="tvdpp"),
    "ours, lk": replace(OURS, objective="lk"),
    "ours, regression 0.3": replace(OURS, regression=0.3),
    "ours, regression 0.7": replace(OURS, regression=0.7),
    "ours, rate 3e-3": replace(OURS, rate=3e-3),
    "ours, 192 wide": replace(OURS, width=192),
    "ours, 256 wide": replace(OURS, width=256),
    "ours, 384 wide": replace(OURS, width=384),
    "ours, 2 layers": replace(OURS, layers=2),
    "ours, 4 layers": replace(OURS, layers=4),
    "ours, one pass": replace(OURS, parallel=5),
    "ours, 2 layers, one pass": replace(OURS, layers=2, parallel=5),
    "ours, one pass, keep 0.5": replace(OURS, parallel=5, keep=0.5),
}


# -- training ---------------------------------------------------------------------------------------------------


def train(recipe: Recipe, material: Material, seed: int, seconds: float) -> tuple[Any, dict[str, float]]:
    """A drafter, and what its training took: steps and tokens of each phase, FLOPs."""
    target = material.config
    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 64,
        max_position_embeddings=target.max_position_embeddings,
        rope_parameters=target.rope_parameters,
        tie_word_embeddings=recipe.tied,
    )
    parallel = Parallel(recipe.parallel, material.mask_id) if recipe.parallel else None
    if parallel:
        parallel.configure(config)
    model: Any = new_drafter(config, seed)
    compile_losses(recipe, model, material)
    began = time.perf_counter()  # projecting is part of the recipe
    regression = None
    if recipe.projected:
        geometry = measure(material.head, [material.states[:64][material.mask[:64]].float()])
        if recipe.uniform:  # every token of the vocabulary counts alike
            centred = material.head.weight.double() - material.head.weight.mean(0, dtype=torch.float64)
            alike = torch.full_like(geometry.chances, 1 / len(centred))
            geometry = Geometry(geometry.moment, centred.T @ centred, alike)
        projection = project_head(material.head, geometry, recipe.width)
        with torch.no_grad():
            model.lm_head.weight.copy_(projection.head)
            if not recipe.tied:
                embedding = project_embedding(material.embedding, geometry.chances, recipe.width, 0.02)
                model.model.embed_tokens.weight.copy_(embedding)
        regression = Regression(projection.states, projection.weights(recipe.weighting), 1, ROWS * LENGTH)
    drafter = TrainableDrafter(model)
    holder: Any = SimpleNamespace(head=material.head)
    phases = {
        "pretrain": (recipe.pretrain, Objective({"ce": 1.0}, LossSection(), None, compile=True)),
        "regression": (recipe.regression, Objective({"kld": 1.0}, LossSection(), holder, regression=regression)),
        "distil": (
            1 - recipe.pretrain - recipe.regression,
            Objective({recipe.objective: 1.0}, LossSection(), holder, compile=True),
        ),
    }
    optimizers = make_optimizers(recipe, model)
    rng = np.random.default_rng(seed)
    figures: dict[str, float] = {}
    ended = time.perf_counter() - began
    for name, (share, objective) in phases.items():
        first, steps = ended, 0
        last = seconds if name == "distil" else ended + share * seconds
        while share and ended < last:
            # Each phase of the paper's has a schedule of its own; regression and what follows share one.
            whole = (first, last) if recipe.pretrain else (0.0, seconds)
            progress = (ended - whole[0]) / (whole[1] - whole[0])
            decay = recipe.ends + (1 - recipe.ends) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * min(1.0, progress / 0.05 + 0.02) * decay
            batch, states = next_batch(material, rng, text=1.0 if name == "pretrain" else recipe.text)
            wanted: Tensor | None = None if name == "pretrain" else states
            if parallel and name != "regression":
                ids, positions, mask = (each.numpy() for each in (batch.input_ids, batch.positions, batch.mask))
                chains = lay_out(ids, positions, mask, parallel, recipe.keep, (seed, steps))
                batch, wanted = batch._replace(chains=chains).unrolled(wanted)
            loss_function = (
                objective.regression_loss(states)
                if name == "regression"
                else objective.loss(batch, wanted, max(batch.unmasked, 1))
            )
            loss, _ = drafter(batch.input_ids, batch.positions, loss_function, None, batch.seen)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            steps += 1
            figures[f"{name}_trained"] = figures.get(f"{name}_trained", 0.0) + batch.unmasked
            figures["positions"] = figures.get("positions", 0.0) + batch.input_ids.numel()
            ended = time.perf_counter() - began
        figures[f"{name}_steps"], figures[f"{name}_loss"] = steps, float(loss.detach()) if steps else math.nan
    figures["flops"] = flops(figures, config, target.hidden_size)
    return model.eval(), figures


def make_optimizers(recipe: Recipe, model: Any) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the layers."""
    layers = [w for name, w in model.named_parameters() if w.ndim == 2 and ".layers." in name] if recipe.muon else []
    known = {id(weight) for weight in layers}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in others if w.ndim > 1], "weight_decay": 0.1, "initial_lr": recipe.rate},
        {"params": [w for w in others if w.ndim < 2], "weight_decay": 0.0, "initial_lr": recipe.rate},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    if layers:
        made.append(torch.optim.Muon([{"params": layers, "initial_lr": 10 * recipe.rate}], weight_decay=0.1))
    return made


def compile_losses(recipe: Recipe, model: Any, material: Material) -> None:
    """Those that the recipe takes, before its time begins: a run of hours would not notice."""
    holder: Any = SimpleNamespace(head=material.head)
    hidden, mask = torch.zeros(1, 8, recipe.width), torch.ones(1, 8, dtype=torch.bool)
    labels = torch.zeros(1, 8, dtype=torch.long)
    batch: Any = DeviceBatch(labels, labels, mask, labels, None, 8)  # type: ignore[arg-type]
    states = torch.zeros(1, 8, material.head.weight.shape[1])
    loss_function = Objective({recipe.objective: 1.0}, LossSection(), holder, compile=True).loss(batch, states, 8)
    loss_function(hidden, Head(model.lm_head.weight))
    if recipe.pretrain:
        Objective({"ce": 1.0}, LossSection(), None, compile=True).loss(batch, None, 8)(
            hidden, Head(model.lm_head.weight)
        )


def flops(figures: dict[str, float], shape: Any, wide: int) -> float:
    """Of the training: passes of the drafter's layers, and products with the two heads at trained positions."""
    d, v = shape.hidden_size, shape.vocab_size
    layers = shape.num_hidden_layers * (4 * d * d + 3 * d * shape.intermediate_size)
    scored = figures.get("distil_trained", 0)
    ours = 6 * d * v * (figures.get("pretrain_trained", 0) + scored)
    theirs = 2 * wide * v * scored
    return (
        6 * layers * figures["positions"] + ours + theirs + 2 * wide * d * figures["regression_steps"] * ROWS * LENGTH
    )


def next_batch(material: Material, rng: np.random.Generator, text: float) -> tuple[DeviceBatch, Tensor]:
    """Rows at random, so many of them text in the mean, and the target's states there (of text alone: none)."""
    number = rng.binomial(ROWS, text)
    some = torch.from_numpy(rng.integers(0, len(material.ids), ROWS - number))
    texts = torch.from_numpy(rng.integers(0, len(material.text), number))
    ids = torch.cat([material.ids[some], material.text[texts]])
    answers = torch.cat([material.mask[some], torch.ones(number, LENGTH, dtype=torch.bool)])
    mask = torch.zeros_like(answers)
    mask[:, :-1] = answers[:, 1:]  # a position is trained if the next token is an answer's
    labels = torch.zeros_like(ids)
    labels[:, :-1] = ids[:, 1:]
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    states = torch.zeros(0)
    if text != 1:
        states = torch.cat([material.states[some], material.text_states[texts]]).float()
    documents: Any = None
    return DeviceBatch(ids, labels, mask, positions, documents, int(mask.sum())), states


# -- cells ---------------------------------------------------------------------------------------------------------


def cell(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one recipe once; kept as JSON, and the drafter, too."""
    path = options.out / "cells" / f"{name}-{seed}-{options.seconds:g}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    material = make(options.target, options.data, options.out / "material", options.answers, options.held_out)
    model, figures = train(RECIPES[name], material, seed, options.seconds)
    model.save_pretrained(options.out / "drafters" / f"{name}-{seed}")
    found: dict[str, list[list[float]]] = {}
    for task, temperature, accepted in chances(model, material):
        for gamma in GAMMAS:
            key = f"{task}, gamma {gamma}, T {temperature:g}"
            found[key] = [[len(one), calls(one.tolist(), gamma)] for one in accepted if len(one)]
        every = torch.cat([one[:, 0] for one in accepted])
        figures[f"acceptance, {task}, T {temperature:g}"] = float(every.mean())
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"figures": figures, "found": found}))
    print(f"{name}, seed {seed}: { ({k: round(v, 4) for k, v in figures.items()}) }", flush=True)


# -- tables -----------------------------------------------------------------------------------------------------


def table(names: list[str], options: argparse.Namespace) -> None:
    """Block efficiency of each recipe and its ratio to the first, with intervals; then what each took."""
    read = {
        (name, seed): json.loads((options.out / "cells" / f"{name}-{seed}-{options.seconds:g}.json").read_text())
        for name in names
        for seed in range(options.seeds)
    }
    rng = np.random.default_rng(0)
    for task in TASKS:
        keys = [f"{task}, gamma {gamma}, T {temperature:g}" for gamma in GAMMAS for temperature in SERVED]
        print(f"\n| {task} | {' | '.join(key.split(', ', 1)[1] for key in keys)} |\n|--|{'--|' * len(keys)}")
        drawn = {}
        for name in names:
            cells = []
            for key in keys:
                counts = np.array([read[name, seed]["found"][key] for seed in range(options.seeds)])  # [R, prompts, 2]
                if key not in drawn:
                    size = (2000, counts.shape[1])
                    drawn[key] = (rng.integers(0, options.seeds, (2000, options.seeds)), rng.integers(0, size[1], size))
                draws = [counts[s][:, p].sum((0, 1)) for s, p in zip(*drawn[key], strict=True)]
                again = np.array(draws)[:, 0] / np.array(draws)[:, 1]
                tau = counts[..., 0].sum() / counts[..., 1].sum()
                if name == names[0]:
                    drawn[key + " first"] = (tau, again)
                first, others = drawn[key + " first"]
                low, high = np.percentile(again, [2.5, 97.5])
                text = f"{tau:.3f} [{low:.3f}, {high:.3f}]"
                if name != names[0]:
                    low, high = np.percentile(again / others - 1, [2.5, 97.5])
                    text += f"; {100 * (tau / first - 1):+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
                cells.append(text)
            print(f"| {name} | {' | '.join(cells)} |")
    print("\n| recipe | steps: text, regression, objective | TFLOP |\n|--|--|--|")
    for name in names:
        found = [read[name, seed]["figures"] for seed in range(options.seeds)]
        phases = ("pretrain", "regression", "distil")
        steps = (np.mean([f.get(f"{phase}_steps", 0) for f in found]) for phase in phases)
        took = np.mean([f["flops"] for f in found]) / 1e12
        print(f"| {name} | {', '.join(f'{step:.0f}' for step in steps)} | {took:.1f} |")


def reaches(options: argparse.Namespace) -> None:
    """What a head of each width could reach, on states that it was not made for."""
    material = make(options.target, options.data, options.out / "material", options.answers, options.held_out)
    rows = len(material.ids) // 2
    geometry = measure(material.head, [material.states[:rows][material.mask[:rows]].float()])
    states = material.states[rows:][material.mask[rows:]][:4096].float()
    print("\n| width | acceptance of a perfect head | equal best tokens |\n|--|--|--|")
    for width in (64, 128, 256, 384, 576):
        accepted, equal = reach(material.head, project_head(material.head, geometry, width), states)
        print(f"| {width} | {accepted:.3f} | {equal:.3f} |")


def main() -> None:
    """Reads what to run, runs what is missing, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["paper", "ours"])
    parser.add_argument("--reach", action="store_true", help="only what a head of each width could reach")
    options = parser.parse_args()
    make(options.target, options.data, options.out / "material", options.answers, options.held_out)
    if options.reach:
        reaches(options)
        return
    cells = [(name, seed) for seed in range(options.seeds) for name in options.recipes]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        list(pool.map(partial(_cell, options=options), cells))
    table(options.recipes, options)


def _cell(named: tuple[str, int], options: argparse.Namespace) -> None:
    cell(*named, options)


if __name__ == "__main__":
    main()
