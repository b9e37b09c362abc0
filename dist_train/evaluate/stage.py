"""`dist-train evaluate`: drafters against a target on prompt sets, with intervals."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from data_shards.errors import DataError
from data_shards.files import read_json, write_json
from dist_train.config import Engine, EvaluateConfig, save_config
from dist_train.errors import UserError
from dist_train.evaluate.measures import token_rates
from dist_train.evaluate.memory import memory_report
from dist_train.evaluate.results import Cell, Found, gather, write_results
from dist_train.evaluate.serve import check_serve, serve
from dist_train.evaluate.tasks import Prompts, load_prompts, refuse_long_prompts
from dist_train.models.chains import parallel_of
from dist_train.models.drafter import find_model, load_drafter, read_drafter_config
from dist_train.models.load import DTYPES, check_target, config_digest, read_target_config, target_identity
from dist_train.models.pairing import check_drafter
from dist_train.models.sizes import bytes_read, num_parameters
from dist_train.models.target import load_decoder, weights_digest
from dist_train.models.target_tokenizer import end_ids, load_target_tokenizer
from dist_train.reports.results import read_served
from dist_train.reports.tables import served_markdown
from dist_train.runtime.process_group import Runtime, started
from dist_train.runtime.progress import Progress, phase
from dist_train.serving.engines import find_engine
from dist_train.tokenizer import Tokenizer
from dist_train.work.units import Units, refuse_other_plan, unit_seed

__all__ = ["check", "memory_report", "run"]

UNITS = "units"
BATCHES_A_UNIT = 8
"""A unit is what a killed evaluation repeats, and what a batch is kept full from: only at its end it runs dry."""


def check(config: EvaluateConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    tokenizer = load_target_tokenizer(config.target, config.tokenizer, config.chat_template)
    check_target(config.target)
    target = read_target_config(config.target)
    models = {config.target.path: target}
    for name, path in config.drafters.items():
        models[f"drafter {name}"] = drafter = check_drafter(path, f"drafter {name}", target.vocab_size, tokenizer)
        parallel = parallel_of(drafter)
        if parallel is not None and max(config.gammas) > parallel.tokens:
            raise UserError(
                f"drafter {name}: drafts at most {parallel.tokens} tokens in its one pass; lower gammas to that"
            )
    tasks = load_prompts(config, tokenizer)
    for source, model in models.items():
        refuse_long_prompts(tasks, source, model, max(config.gammas))
    for folder, drafting in _groups(config).items():
        refuse_other_plan(folder, _plan(config, tasks, drafting))
    if any(drafting in get_args(Engine) for drafting in config.drafting):
        check_serve(tasks)
    if config.serve is not None:
        find_engine(config.serve, config.target, tokenizer, [])


def run(config: EvaluateConfig) -> None:
    """Evaluate every drafter under every condition; on every rank."""
    check(config)
    with started() as runtime:
        config = runtime.first(config)  # precision is what rank 0's device is fast at
        tokenizer = load_target_tokenizer(config.target, config.tokenizer, config.chat_template)
        tasks = load_prompts(config, tokenizer)
        models = _Models(config, runtime, tokenizer)
        with phase("loading the models"):
            digests = runtime.everywhere(models.digests)
        found: dict[Cell, dict[str, list[Any]]] = {}
        for folder, drafting in _groups(config).items():
            found.update(_decode(config, tasks, folder, drafting, models, digests, runtime))
        if runtime.is_first:
            with phase("resampling prompts"):
                parameters = models.of_each(num_parameters)
                identity = _identity(config, digests["target"])
                results = gather(config, tasks, found, parameters, identity, models.one_pass())
            with phase("measuring token rates"):
                results["token_rate"] = _token_rate(config, models, tasks)
            if config.prediction.seconds:
                with phase("timing single calls"):
                    results["prediction"] = _prediction(config, models, tasks, found)
            results["served"] = read_served(config.out)
            save_config(config, config.out / "config.yaml")
            print(f"{write_results(config.out, results, found)}\nevaluate: {config.out}/results.html", flush=True)
            if config.serve is not None:
                engine = find_engine(config.serve, config.target, tokenizer, models.end_ids)
                limit = models.positions()
                models.forget()  # the server wants the memory
                served = serve(config, tasks, found, engine, limit, models.gap)
                results["served"] = [*(one for one in results["served"] if one["engine"] != served["engine"]), served]
                write_results(config.out, results, found)
                print(f"{served_markdown([served])}\nevaluate: {config.out}/results.html", flush=True)


def _groups(config: EvaluateConfig) -> dict[Path, list[str]]:
    """Folder of units to the ways of drafting in it: our own, and each server's, which can be added later."""
    own: list[str] = [drafting for drafting in config.drafting if drafting not in get_args(Engine)]
    servers: list[str] = [drafting for drafting in config.drafting if drafting in get_args(Engine)]
    return ({config.out / UNITS: own} if own else {}) | {
        config.out / f"{UNITS}-{engine}": [engine] for engine in servers
    }


def _decode(
    config: EvaluateConfig,
    tasks: Mapping[str, Prompts],
    folder: Path,
    drafting: list[str],
    models: _Models,
    digests: dict[str, str],
    runtime: Runtime,
) -> dict[Cell, dict[str, list[Any]]]:
    """Decode what is missing of the cells with these ways of drafting, and read all of them on rank 0. Collective."""
    cells = _cells(config, tasks, drafting)
    length = BATCHES_A_UNIT * config.batch_size
    works = [
        (cell, range(first, min(first + length, len(tasks[cell.task].ids))))
        for cell in sorted(cells)  # the number of a unit says what is in it, in whatever order things are named
        for first in range(0, len(tasks[cell.task].ids), length)
    ]
    units = Units(folder, _plan(config, tasks, drafting), len(works), ".json", runtime)
    units.begin(digests)

    def make(unit: int, path: Path) -> None:
        cell, chosen = works[unit]
        write_json(path, models.decode(cell, tasks[cell.task], chosen))

    done = len(works) - len(runtime.agree(units.missing))
    with Progress("evaluate", len(works), "unit", first=done, enabled=runtime.is_first, look=units.done) as bar:
        units.run(make, bar.update)
    found: dict[Cell, dict[str, list[Any]]] = {cell: defaultdict(list) for cell in cells}
    if runtime.is_first:
        for unit, (cell, _) in enumerate(works):
            for key, values in _read_unit(units.path(unit)).items():
                found[cell][key] += values
        units.conclude({})
    return found


def _read_unit(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DataError as error:
        raise UserError(f"{path}: torn or changed; remove it and start again, which decodes it alone anew") from error


def _cells(config: EvaluateConfig, tasks: Mapping[str, Prompts], drafting: list[str]) -> list[Cell]:
    """All conditions. At temperature 0 our own ways to draft are one, called greedy."""
    greedy = list(dict.fromkeys(one if one in get_args(Engine) else "greedy" for one in drafting))
    return [
        Cell(task, drafter, gamma, temperature, one)
        for task, prompts in tasks.items()
        for drafter in config.drafters
        for gamma in config.gammas
        for temperature in prompts.sampling.temperatures
        for one in (drafting if temperature > 0 else greedy)
    ]


class _Models:
    """Target and drafters, loaded when first used."""

    def __init__(self, config: EvaluateConfig, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self.config, self.device, self._tokenizer = config, runtime.device, tokenizer
        self._loaded: dict[str, Any] = {}

    @property
    def target(self) -> Any:
        """The target."""
        if "" not in self._loaded:
            self._loaded[""] = load_decoder(self.config.target, self.device)
        return self._loaded[""]

    def drafter(self, name: str) -> Any:
        """A drafter, in the target's precision."""
        if name not in self._loaded:
            model: Any = load_drafter(self.config.drafters[name], DTYPES[self.config.target.precision])
            self._loaded[name] = model.to(self.device).eval()
        return self._loaded[name]

    def of_each(self, size: Callable[[Any], int]) -> dict[str, int]:
        """The size of each drafter, and of the target under the name ''."""
        return {"": size(self.target), **{name: size(self.drafter(name)) for name in self.config.drafters}}

    def one_pass(self) -> list[str]:
        """The drafters that draft a block in one pass."""
        return [name for name in self.config.drafters if parallel_of(self.drafter(name).config)]

    def digests(self) -> dict[str, str]:
        """Of all weights: others may have taken their place."""
        drafters = {f"drafter {name}": weights_digest(self.drafter(name)) for name in self.config.drafters}
        return {"target": weights_digest(self.target), **drafters}

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer."""
        return end_ids(self._tokenizer, self.target.generation_config)

    def positions(self) -> int:
        """Of the model that has the fewest."""
        models = [self.target, *map(self.drafter, self.config.drafters)]
        return min(getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize) for model in models)

    @torch.no_grad()
    def gap(self, text: Sequence[int], one: int, other: int) -> float:
        """How much likelier the target finds one of two tokens after a text, in nats."""
        ids = torch.tensor([text], device=self.device)
        logits = self.target(input_ids=ids, use_cache=False).logits[0, -1].float()
        return abs(float(logits[one] - logits[other]))

    def forget(self) -> None:
        """Give back the memory of all models; they are loaded again where they are used again."""
        self._loaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def decode(self, cell: Cell, prompts: Prompts, chosen: range) -> dict[str, list[Any]]:
        """For each of the chosen prompts the tokens of each block and of the text, the confidences in each block.

        Decoded as a server does, the text as well.
        """
        from dist_train.decoding.served import generate_as_served
        from dist_train.decoding.speculative import speculative_generate

        given = (self.drafter(cell.drafter), self.target, [prompts.ids[i] for i in chosen])
        how: dict[str, Any] = {
            "gamma": cell.gamma,
            "temperature": cell.temperature,
            "top_p": prompts.sampling.top_p,
            "max_new_tokens": prompts.sampling.max_new_tokens,
            "eos_ids": self.end_ids,
            "seed": unit_seed(self.config.seed, cell, chosen),
            "batch_size": self.config.batch_size,
        }
        as_served = cell.drafting in get_args(Engine)
        if as_served:
            found = generate_as_served(cell.drafting, *given, **how)
        else:
            greedily = cell.drafting == "greedy"
            found = speculative_generate(*given, **how, draft_greedily=greedily, record_confidences=True)
        confidences = [[[round(each, 4) for each in row] for row in rows] for rows in found.confidences]
        lengths = [len(tokens) for tokens in found.tokens]
        decoded: dict[str, list[Any]] = {"blocks": found.blocks, "lengths": lengths, "confidences": confidences}
        return {**decoded, "tokens": found.tokens} if as_served else decoded

    def seconds_per_token(self, drafter: str | None, gamma: int, prompts: list[list[int]], limit: int) -> float:
        """Wall-clock seconds per token of a greedy pass."""
        from dist_train.decoding.speculative import speculative_generate

        model, target = None if drafter is None else self.drafter(drafter), self.target
        began = time.perf_counter()
        found = speculative_generate(
            model,
            target,
            prompts,
            gamma,
            0.0,
            max_new_tokens=limit,
            eos_ids=self.end_ids,
            batch_size=self.config.token_rate.batch_size,
        )
        return (time.perf_counter() - began) / sum(map(len, found.tokens))


def _identity(config: EvaluateConfig, weights: str) -> dict[str, Any]:
    """What tells targets apart."""
    return {
        "path": config.target.path,
        "revision": config.target.revision,
        "precision": config.target.precision,
        "weights": weights,
    }


def _plan(config: EvaluateConfig, tasks: Mapping[str, Prompts], drafting: list[str]) -> dict[str, Any]:
    """What the counts depend on, save the weights."""
    drafters = {name: (find_model(path), read_drafter_config(path)) for name, path in config.drafters.items()}
    return {
        "target": {**config.target.model_dump(mode="json"), **target_identity(config.target)},
        **{
            f"drafter {name}": {"path": str(folder.resolve()), "config": config_digest(shape)}
            for name, (folder, shape) in drafters.items()
        },
        **{f"task {name}": [prompts.identity, *map(str, prompts.sampling)] for name, prompts in tasks.items()},
        "drafting": drafting,
        **config.model_dump(mode="json", include={"gammas", "batch_size", "seed"}),
    }


def _token_rate(config: EvaluateConfig, models: _Models, tasks: Mapping[str, Prompts]) -> list[dict[str, Any]]:
    """Tokens per second of plain and of speculative decoding of the same prompts in batches of the same size.

    On rank 0 alone, greedy, the first prompts of the first task. In each round all have their turn, so that what slows
    the machine for a while slows all of them.
    """
    task = next(iter(tasks.values()))
    some = task.ids[: config.token_rate.prompts]
    if not some:
        return []
    cases: list[tuple[str | None, int]] = [(None, 0)]
    cases += [(name, gamma) for name in config.drafters for gamma in config.gammas]
    limit = task.sampling.max_new_tokens
    for name, gamma in cases:  # the first call of a model pays for what later ones find ready
        models.seconds_per_token(name, gamma, some[:1], min(limit, 4))
    rounds = [
        [models.seconds_per_token(*case, some, limit) for case in cases] for _ in range(config.token_rate.repeats)
    ]
    return [
        {"drafter": name, "gamma": gamma, "batch_size": config.token_rate.batch_size, **rate}
        for (name, gamma), rate in zip(cases, token_rates(rounds), strict=True)
    ]


def _prediction(config: EvaluateConfig, models: _Models, tasks: Mapping[str, Prompts], found: Found) -> dict[str, Any]:
    """From calls on rank 0 alone, greedy, with texts of the first task's mean length half written."""
    from dist_train.decoding.timing import time_calls
    from dist_train.evaluate.prediction import predict

    task = next(iter(tasks.values()))
    length = round(statistics.mean(map(len, task.ids)) + task.sampling.max_new_tokens / 2)
    drafters = [models.drafter(name) for name in config.drafters]
    asked = config.prediction
    times = time_calls(drafters, models.target, max(config.gammas), asked.batch_sizes, length, asked.seconds)
    read, parameters = models.of_each(bytes_read), models.of_each(num_parameters)
    return predict(found, times, length, read, parameters, models.one_pass())
