"""`dist-train generate`: the target's answers to seed instructions, as Parquet that `prepare` packs."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.files import write_atomically, write_json
from dist_train.config import GenerateConfig, save_config
from dist_train.errors import UserError
from dist_train.progress import Progress
from dist_train.prompts import encode_seeds, read_seeds
from dist_train.runtime import Runtime, started
from dist_train.target import check_vocabulary, load_causal_lm, read_target_config
from dist_train.tokenizer import load_tokenizer
from dist_train.units import Units, unit_seed

SCHEMA = pa.schema(
    {
        "seed": pa.int64(),
        "prompt": pa.string(),
        "response": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "temperature": pa.float32(),
        "finish_reason": pa.string(),
    }
)
STATISTICS = "_statistics.json"


class Work(NamedTuple):
    """One unit: a batch of seeds at one temperature. It fixes batch and random numbers, and so its answers."""

    seeds: range
    temperature: float


def check(config: GenerateConfig) -> None:
    """Raise UserError or DataError for what is wrong before ranks start."""
    tokenizer = load_tokenizer(config.tokenizer or config.target.path)
    if read_target_config(config.target).vocab_size < tokenizer.vocab_size:
        check_vocabulary(config.target, tokenizer.vocab_size, tokenizer.source)
    read_seeds(config.seeds)


def run(config: GenerateConfig) -> None:
    """Answer every seed at every temperature; on every rank."""
    check(config)
    with started() as runtime:
        tokenizer = load_tokenizer(config.tokenizer or config.target.path)
        seeds = read_seeds(config.seeds)
        prompts = encode_seeds(seeds, tokenizer)
        works = [
            Work(range(first, min(first + config.batch_size, len(seeds))), temperature)
            for temperature in config.temperatures
            for first in range(0, len(seeds), config.batch_size)
        ]
        units = Units(config.out, _plan(config, prompts), len(works), ".parquet", runtime)
        began = time.monotonic()
        if any(True for _ in units.mine()):
            engine = _engine(config, tokenizer.eos_id, runtime)

        def make(unit: int, path: Path) -> None:
            work = works[unit]
            answers = engine.answer(
                [prompts[seed] for seed in work.seeds],
                temperature=work.temperature,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                seed=unit_seed(config.seed, unit),
            )
            rows = [
                {
                    "seed": seed,
                    "prompt": seeds[seed][-1]["content"],
                    "response": tokenizer.decode(answer.ids),
                    "prompt_ids": prompts[seed],
                    "response_ids": answer.ids,
                    "temperature": work.temperature,
                    "finish_reason": answer.finish_reason,
                }
                for seed, answer in zip(work.seeds, answers, strict=True)
            ]
            _write(path, rows)

        share = len(range(runtime.rank, len(works), runtime.world_size))
        with Progress("generate", share, "batch", enabled=runtime.is_first) as bar:
            units.run(make, bar.update)
        if runtime.is_first:
            save_config(config, config.out / "_config.yaml")
            _conclude(config, units, time.monotonic() - began)


def _engine(config: GenerateConfig, eos_id: int, runtime: Runtime) -> Any:
    from dist_train.generate.engine import TransformersEngine

    model = load_causal_lm(config.target).to(runtime.device)
    stops = model.generation_config.eos_token_id
    return TransformersEngine(model, [eos_id, *_as_list(stops)])


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _plan(config: GenerateConfig, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the answers depend on; a folder begun with another plan is refused."""
    return {
        "target": config.target.model_dump(mode="json", exclude={"sharding"}),
        "prompts": unit_seed(0, prompts),
        "temperatures": config.temperatures,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    write_atomically(path, [buffer.getbuffer()])


def _conclude(config: GenerateConfig, units: Units, seconds: float) -> None:
    """Say what came out and keep it beside the answers."""
    table = pa.concat_tables(pq.read_table(units.path(unit)) for unit in range(units.count))
    lengths = pc.list_value_length(table["response_ids"])
    tokens = pc.sum(lengths).as_py()
    stopped = pc.sum(pc.equal(table["finish_reason"], "stop")).as_py()
    distinct = len(pc.unique(table["response"]))
    if not tokens:
        raise UserError(f"{config.out}: every answer is empty; does the tokenizer fit the target?")
    statistics = {
        "answers": len(table),
        "tokens": tokens,
        "mean_tokens": tokens / len(table),
        "stopped_by_itself": stopped / len(table),
        "distinct": distinct / len(table),
        "tokens_per_s": tokens / seconds,
    }
    write_json(config.out / STATISTICS, statistics)
    print(
        f"generate: {len(table):,} answers, {tokens:,} tokens ({tokens / len(table):.0f} each), "
        f"{stopped / len(table):.0%} ended by themselves, {distinct / len(table):.0%} distinct; "
        f"{seconds:.1f} s; {config.out}",
        flush=True,
    )
