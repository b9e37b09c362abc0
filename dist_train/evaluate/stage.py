"""`dist-train evaluate`: drafters against a target on prompt sets, with intervals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import read_json, write_atomically, write_json
from dist_train.config import EvaluateConfig, save_config
from dist_train.drafter import find_model, load_drafter
from dist_train.errors import UserError
from dist_train.evaluate.measures import (
    accepted_histogram,
    bootstrap,
    bootstrap_difference,
    memory_bound_speed_up,
    position_acceptance,
)
from dist_train.evaluate.tables import results_markdown
from dist_train.progress import Progress
from dist_train.prompts import encode_seeds, read_seeds
from dist_train.runtime import Runtime, started
from dist_train.target import DTYPES, load_causal_lm, read_target_config
from dist_train.tokenizer import load_tokenizer
from dist_train.units import Units, unit_seed

RESULTS = "results.json"


class Cell(NamedTuple):
    """One condition of the evaluation."""

    task: str
    drafter: str
    gamma: int
    temperature: float


class Work(NamedTuple):
    """One unit: a batch of a task's prompts under one condition."""

    cell: Cell
    prompts: range


def check(config: EvaluateConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    from transformers import AutoConfig

    load_tokenizer(config.tokenizer or config.target.path)
    target_size = read_target_config(config.target).vocab_size
    for name, path in config.drafters.items():
        found = AutoConfig.from_pretrained(find_model(path)).vocab_size
        if found != target_size:
            raise UserError(f"drafter {name}: a vocabulary of {found}, the target's has {target_size}")
    for task in config.tasks:
        read_seeds(task)


def run(config: EvaluateConfig) -> None:
    """Evaluate every drafter under every condition; on every rank."""
    check(config)
    with started() as runtime:
        tokenizer = load_tokenizer(config.tokenizer or config.target.path)
        prompts = {task.name: encode_seeds(read_seeds(task), tokenizer) for task in config.tasks}
        cells = [
            Cell(task, drafter, gamma, temperature)
            for task in prompts
            for drafter in config.drafters
            for gamma in config.gammas
            for temperature in config.temperatures
        ]
        works = [
            Work(cell, range(first, min(first + config.batch_size, len(prompts[cell.task]))))
            for cell in cells
            for first in range(0, len(prompts[cell.task]), config.batch_size)
        ]
        units = Units(config.out / "units", _plan(config, prompts), len(works), ".json", runtime)
        models = _Models(config, runtime, [tokenizer.eos_id])

        def make(unit: int, path: Path) -> None:
            work = works[unit]
            batch = [prompts[work.cell.task][i] for i in work.prompts]
            write_json(path, {"blocks": models.blocks(work.cell, batch)})

        share = len(range(runtime.rank, len(works), runtime.world_size))
        with Progress("evaluate", share, "batch", enabled=runtime.is_first) as bar:
            units.run(make, bar.update)
        if runtime.is_first:
            blocks: dict[Cell, list[list[int]]] = {cell: [] for cell in cells}
            for unit, work in enumerate(works):
                blocks[work.cell] += read_json(units.path(unit))["blocks"]
            results = _results(config, blocks, models)
            results["token_rate"] = _token_rate(config, models, prompts)
            write_json(config.out / RESULTS, results)
            markdown = results_markdown(results)
            write_atomically(config.out / "results.md", [markdown.encode()])
            save_config(config, config.out / "config.yaml")
            print(f"{markdown}\nevaluate: {config.out / RESULTS}", flush=True)
        runtime.barrier()


class _Models:
    """Target and drafters, loaded when first used."""

    def __init__(self, config: EvaluateConfig, runtime: Runtime, eos_ids: list[int]) -> None:
        self.config, self.device, self.eos_ids = config, runtime.device, eos_ids
        self._loaded: dict[str, Any] = {}

    @property
    def target(self) -> Any:
        """The target."""
        if "" not in self._loaded:
            self._loaded[""] = load_causal_lm(self.config.target).to(self.device)
        return self._loaded[""]

    def drafter(self, name: str) -> Any:
        """A drafter, in the target's precision."""
        if name not in self._loaded:
            model: Any = load_drafter(self.config.drafters[name], DTYPES[self.config.target.precision])
            self._loaded[name] = model.to(self.device).eval()
        return self._loaded[name]

    def blocks(self, cell: Cell, prompts: list[list[int]]) -> list[list[int]]:
        """Tokens of each block, for each prompt."""
        from dist_train.evaluate.speculative import speculative_generate

        return speculative_generate(
            self.drafter(cell.drafter),
            self.target,
            prompts,
            cell.gamma,
            cell.temperature,
            self.config.top_p,
            max_new_tokens=self.config.max_new_tokens,
            eos_ids=self.eos_ids,
            seed=unit_seed(self.config.seed, cell, prompts),
        ).blocks

    def seconds_per_token(self, drafter: str | None, gamma: int, prompts: list[list[int]]) -> float:
        """Wall-clock seconds per token, greedy, at the configured batch size: the median of some passes."""
        from dist_train.evaluate.speculative import speculative_generate

        rate, passes = self.config.token_rate, []
        model = None if drafter is None else self.drafter(drafter)
        for _ in range(rate.repeats):
            tokens, began = 0, time.perf_counter()
            for first in range(0, len(prompts), rate.batch_size):
                out = speculative_generate(
                    model,
                    self.target,
                    prompts[first : first + rate.batch_size],
                    gamma,
                    0.0,
                    max_new_tokens=self.config.max_new_tokens,
                    eos_ids=self.eos_ids,
                )
                tokens += sum(map(len, out.tokens))
            passes.append((time.perf_counter() - began) / tokens)
        return sorted(passes)[len(passes) // 2]


def _plan(config: EvaluateConfig, prompts: dict[str, list[list[int]]]) -> dict[str, Any]:
    """What the counts depend on."""
    return {
        "target": config.target.model_dump(mode="json"),
        "drafters": {name: str(find_model(path)) for name, path in config.drafters.items()},
        "prompts": unit_seed(0, prompts),
        **config.model_dump(
            mode="json", include={"gammas", "temperatures", "top_p", "max_new_tokens", "batch_size", "seed"}
        ),
    }


def _results(config: EvaluateConfig, blocks: dict[Cell, list[list[int]]], models: _Models) -> dict[str, Any]:
    base = next(iter(config.drafters))
    target_parameters = models.target.num_parameters()
    parameters = {name: models.drafter(name).num_parameters() for name in config.drafters}
    rows = []
    for cell, counts in blocks.items():
        efficiency = bootstrap(counts)
        histogram = accepted_histogram(counts, cell.gamma)
        ratio = parameters[cell.drafter] / target_parameters
        rows.append(
            {
                **cell._asdict(),
                "prompts": len(counts),
                "tokens": sum(map(sum, counts)),
                "target_calls": sum(map(len, counts)),
                "block_efficiency": efficiency._asdict(),
                "difference": bootstrap_difference(counts, blocks[cell._replace(drafter=base)])._asdict(),
                "mbsu": memory_bound_speed_up(efficiency.value, ratio, cell.gamma),
                "accepted_histogram": histogram,
                "position_acceptance": position_acceptance(histogram),
            }
        )
    return {
        "target": {"path": config.target.path, "parameters": target_parameters},
        "drafters": {
            name: {"path": str(config.drafters[name]), "parameters": count, "ratio": count / target_parameters}
            for name, count in parameters.items()
        },
        "base": base,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "rows": rows,
    }


def _token_rate(config: EvaluateConfig, models: _Models, prompts: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Tokens per second of plain and of speculative decoding, on rank 0 alone, the first prompts of the first task."""
    some = next(iter(prompts.values()))[: config.token_rate.prompts]
    if not some:
        return []
    plain = models.seconds_per_token(None, 0, some)
    rows: list[dict[str, Any]] = [{"drafter": None, "gamma": 0, "tokens_per_s": 1 / plain, "speed_up": 1.0}]
    for name in config.drafters:
        for gamma in config.gammas:
            seconds = models.seconds_per_token(name, gamma, some)
            rows.append({"drafter": name, "gamma": gamma, "tokens_per_s": 1 / seconds, "speed_up": plain / seconds})
    return rows
