"""`dist-train generate`: the target's answers to seed instructions, as Parquet that `prepare` packs."""

from __future__ import annotations

import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_shards.files import read_json, write_json
from dist_train.config import GenerateConfig, save_config
from dist_train.errors import UserError
from dist_train.generate.answers import write_answers
from dist_train.generate.asks import Answer, Ask, Condition, Engine, Sampling, conditions
from dist_train.generate.memory import memory_report
from dist_train.generate.page import write_page
from dist_train.generate.statistics import Stopwatch, gather
from dist_train.models.load import check_target, read_generation_config, read_target_config, target_identity
from dist_train.models.target import load_decoder
from dist_train.models.target_tokenizer import end_ids, load_target_tokenizer
from dist_train.prompts.seeds import read_encoded_seeds, refuse_long
from dist_train.runtime.process_group import started
from dist_train.runtime.progress import Progress, phase
from dist_train.tokenizer import RefusedChatError, Tokenizer
from dist_train.work.units import COMPLETE, Units, refuse_other_plan, unit_seed

__all__ = ["STATISTICS", "Generation", "Work", "check", "memory_report", "run"]

STATISTICS = "_statistics.json"


class Work(NamedTuple):
    """One unit: some seeds under one condition. It fixes batch and random numbers, and so its answers."""

    seeds: range
    condition: Condition


def check(config: GenerateConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    generation = Generation(config)
    refuse_long(generation.prompts, config.max_new_tokens, config.target.path, generation.target, "seeds.max_tokens")
    refuse_other_plan(config.out, generation.plan)
    if config.engine.kind == "transformers":
        check_target(config.target)


def run(config: GenerateConfig) -> None:
    """Answer every seed under every condition; on every rank."""
    check(config)
    with started() as runtime:
        config = runtime.first(config)  # precision is what rank 0's device is fast at
        generation = Generation(config, runtime.device)
        units = Units(config.out, generation.plan, generation.count, ".parquet", runtime)
        began = time.monotonic()
        missing = runtime.agree(units.missing)
        if missing:
            with phase(f"waiting for the first token of {generation.origin['engine']}"):
                units.begin(runtime.everywhere(generation.ready))
            if runtime.is_first:
                (config.out / COMPLETE).unlink(missing_ok=True)
            workers = min(len(missing), generation.engine.units_at_once(config.batch_size))
            done = generation.count - len(missing)
            with Progress(
                "generate", generation.count, "batch", first=done, enabled=runtime.is_first, look=units.done
            ) as bar:
                units.run(generation.make, bar.update, workers)
        if runtime.is_first:
            with phase("counting the answers"):
                _conclude(config, generation, units, time.monotonic() - began)


class Generation:
    """All that is to be asked, cut into units, and how one of them is answered."""

    def __init__(self, config: GenerateConfig, device: torch.device | None = None) -> None:
        self._config, self._device = config, device
        self._tokenizer = tokenizer = load_target_tokenizer(config.target, config.tokenizer, config.chat_template)
        self._seeds, self.prompts, self._later = read_encoded_seeds([config.seeds, *config.more_seeds], tokenizer)
        self.by_turn = any(self._later)
        self.target = read_target_config(config.target)
        self._conditions = conditions(config)
        self._batches = -(-len(self._seeds) // config.batch_size)
        self._stopwatch = Stopwatch(config.out)
        self.origin: dict[str, Any] = {
            "target": target_identity(config.target),
            "tokenizer": tokenizer.sha256,
            "engine": config.engine.kind,
        }

    @property
    def count(self) -> int:
        """Number of units."""
        return self._batches * len(self._conditions)

    @property
    def wanted(self) -> int:
        """Number of answers, where each conversation goes on to its end."""
        return len(self._conditions) * sum(1 + len(later) for later in self._later)

    @property
    def plan(self) -> dict[str, Any]:
        """What the answers depend on; a folder begun with another plan is refused."""
        config = self._config
        return {
            **self.origin,
            "precision": config.target.precision if config.engine.kind == "transformers" else None,
            "model": config.engine.model if config.engine.kind == "openai" else None,
            # Not their ids: a template may write today's date, and a run goes on tomorrow.
            "prompts": unit_seed(
                0, self._seeds, self._tokenizer.chat_template, *([self._later] if self.by_turn else [])
            ),
            **config.model_dump(
                mode="json", include={"temperatures", "top_p", "samples", "max_new_tokens", "batch_size", "seed"}
            ),
        }

    def work(self, unit: int) -> Work:
        """What a unit is made of: all seeds under the first condition come first."""
        condition, batch = divmod(unit, self._batches)
        first, size = batch * self._config.batch_size, self._config.batch_size
        return Work(range(first, min(first + size, len(self._seeds))), self._conditions[condition])

    @cached_property
    def engine(self) -> Engine:
        """What decodes, made when first needed: a rerun with nothing to do loads no model."""
        if self._config.engine.kind == "openai":
            return _server(self._config, self._tokenizer, self.target.vocab_size)
        assert self._device is not None  # to check takes none
        return _decoder(self._config, self._tokenizer, load_decoder(self._config.target, self._device))

    def ready(self) -> dict[str, Any]:
        """Load the model or meet the server, and say what tells its weights from others at the same path.

        Raises UserError where that fails.
        """
        asks, sampling = self._asked(self.work(0))
        return {"weights": self.engine.ready(asks[0], sampling)}

    def make(self, unit: int, path: Path) -> None:
        """Have one unit answered, and write its file."""
        began = time.monotonic()
        seeds, condition = work = self.work(unit)
        asks, sampling = self._asked(work)
        going, rows, turn = list(zip(seeds, asks, strict=True)), [], 1
        while going:
            answers = self.engine.answer([ask for _, ask in going], sampling)
            after = []
            for (seed, ask), answer in zip(going, answers, strict=True):
                rows.append(self._row(seed, ask, answer, condition) | {"turn": turn})
                if answer.finish_reason == "stop" and (following := self._following(seed, ask, rows[-1], condition)):
                    after.append((seed, following))
            going, turn = after, turn + 1
        write_answers(path, rows, self.origin, by_turn=self.by_turn)
        self._stopwatch.note(unit, began)

    def _row(self, seed: int, ask: Ask, answer: Answer, condition: Condition) -> dict[str, Any]:
        return {
            "seed": seed,
            "prompt": ask.messages[-1]["content"],
            "response": self._tokenizer.decode(answer.ids),
            "prompt_ids": ask.ids,
            "response_ids": answer.ids,
            **condition._asdict(),
            "request_seed": ask.seed,
            "finish_reason": answer.finish_reason,
            "reencoded": answer.reencoded,
        }

    def _following(self, seed: int, ask: Ask, row: dict[str, Any], condition: Condition) -> Ask | None:
        """What is asked after a row's response; None at the end of the conversation.

        It also ends where the template refuses the response, or positions do not suffice for another one.
        """
        turn = row["turn"]
        if turn > len(self._later[seed]):
            return None
        messages = [*ask.messages, {"role": "assistant", "content": row["response"]}, *self._later[seed][turn - 1]]
        try:
            ids = self._tokenizer.encode_prompt(messages)
        except RefusedChatError:
            return None
        room = getattr(self.target, "max_position_embeddings", None)
        if room is not None and len(ids) + self._config.max_new_tokens > room:
            return None
        return Ask(messages, ids, _request_seed(self._config.seed, seed, condition, turn))

    def _asked(self, work: Work) -> tuple[list[Ask], Sampling]:
        """What the engine is asked for a unit."""
        seeds, condition = work
        asks = [
            Ask(self._seeds[seed], self.prompts[seed], _request_seed(self._config.seed, seed, condition))
            for seed in seeds
        ]
        return asks, Sampling(condition.temperature, condition.top_p or 1.0, self._config.max_new_tokens)


def _request_seed(seed: int, number: int, condition: Condition, *turn: int) -> int:
    """Of one answer; below 2^31, which every server takes."""
    return unit_seed(seed, number, *condition, *turn) >> 32


def _decoder(config: GenerateConfig, tokenizer: Tokenizer, model: Any) -> Engine:
    from dist_train.generate.local import LocalEngine

    return LocalEngine(model, end_ids(tokenizer, model.generation_config), config.engine.rows)


def _server(config: GenerateConfig, tokenizer: Tokenizer, vocab_size: int) -> Engine:
    from dist_train.generate.server import ServerEngine
    from dist_train.serving.http import Client

    engine = config.engine
    key = os.environ.get(engine.key_variable) if engine.key_variable else None
    if engine.key_variable and not key:
        raise UserError(f"engine.key_variable: {engine.key_variable} is not set here; export it, or leave the key out")
    client = Client(engine.url, key, engine.timeout, engine.patience)
    eos_ids = end_ids(tokenizer, read_generation_config(config.target))
    return ServerEngine(client, engine.model or config.target.path, tokenizer, eos_ids, vocab_size, engine.concurrency)


def _conclude(config: GenerateConfig, generation: Generation, units: Units, seconds: float) -> None:
    """Say what came out and keep it beside the answers; mark them as whole."""
    if not (config.out / COMPLETE).exists():
        works = ((unit, units.path(unit), generation.work(unit).condition) for unit in range(units.count))
        statistics = gather(
            ((unit, path, condition.temperature, condition.top_p) for unit, path, condition in works),
            config.out,
            by_turn=generation.by_turn,
        )
        if generation.by_turn:
            statistics["unasked"] = generation.wanted - statistics["answers"]
        if not statistics["tokens"]:
            raise UserError(f"{config.out}: every answer is empty; does the tokenizer fit the target?")
        save_config(config, config.out / "_config.yaml")
        write_json(config.out / STATISTICS, statistics)
        write_page(config.out, statistics, generation.origin)
        units.conclude({key: statistics[key] for key in ("answers", "tokens")})
    told = read_json(config.out / STATISTICS)
    again = f", {told['reencoded']:.0%} encoded again" if told["reencoded"] else ""
    rate = f"{told['tokens_per_s']:,.0f} tokens/s a process, " if told["tokens_per_s"] else ""
    print(
        f"generate: {told['answers']:,} answers, {told['tokens']:,} tokens ({told['mean_tokens']:.0f} each), "
        f"{told['stopped_by_itself']:.0%} ended by themselves, {told['distinct']:.0%} distinct{again}; "
        f"{rate}{seconds:.1f} s; {config.out}",
        flush=True,
    )
    if told.get("turns"):
        turns = ", ".join(f"{one['answers']:,} of {one['mean_tokens']:.0f} tokens" for one in told["turns"])
        print(
            f"generate: by turn {turns}; {told['unasked']:,} more were not asked: the answer before did not end in "
            "max_new_tokens, or the conversation had no room for another",
            flush=True,
        )
