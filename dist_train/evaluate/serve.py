"""`dist-train evaluate --serve vllm|llama.cpp`: what a real server makes of the evaluation's prompts.

It is started with each drafter at each gamma, and without one, and answers all prompts at each temperature and
concurrency. Its block efficiency stands beside what was decoded here in its own way (`decoding.served`), its tokens/s
with a drafter beside those without, its greedy answers beside each other, and its speed-up beside the one that is
predicted from block efficiency here and costs of calls there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.config import EvaluateConfig
from dist_train.errors import UserError
from dist_train.evaluate.measures import Counts, Estimate, bootstrap_runs, count
from dist_train.evaluate.results import Cell, Found
from dist_train.evaluate.tasks import Prompts
from dist_train.runtime.interrupts import one_interrupt, results
from dist_train.runtime.progress import phase
from dist_train.serving.engines import Answer, Asked, Engine
from dist_train.serving.http import Client
from dist_train.serving.launch import last_words, running
from dist_train.work.units import unit_seed

FOLDER = "served"
"""Logs of the servers, in the results folder."""
_WARM_UP_TOKENS = 8
_TIMED, _TIMED_TOKENS = 8, 64  # answers and their tokens, from which the costs of calls are told
_SLACK = 2  # positions that llama.cpp keeps free behind the drafts
WAYS = {
    "vllm": (
        "vllm: offline as served, drafts are drawn under the temperature alone (draft_sample_method: probabilistic), "
        "the first token comes from the prefill, and a text's last block counts in full."
    ),
    "llama.cpp": (
        "llama.cpp: offline as served, drafts are the likeliest tokens, the first token comes from the prefill, and a "
        "text's last block is cut where the text ends."
    ),
}
_PREDICTED = (
    "Predicted: from block efficiency offline, and what a call costs this server with these drafts before it, timed on "
    "a few prompts; a call in plain steps is also the block efficiency at which nothing is gained."
)
_LOOK_AT = {
    "vllm": (
        "look at serve.dtype beside target.precision, at the positions of the drafter, and, at T > 0 on a CPU, at "
        "vLLM's cpu_triton_utils.py, which up to 0.32 leaves the temperature at draft positions unset"
    ),
    "llama.cpp": (
        "look at the weights that are served beside target.precision (a quantised GGUF answers otherwise than what is "
        "made of it here), and at samplers in serve.arguments"
    ),
}

Gap = Callable[[Sequence[int], int, int], float]
"""How much likelier the target finds one of two tokens than the other after a text, in nats."""


class Key(NamedTuple):
    """One measurement of a running server."""

    task: str
    temperature: float
    concurrency: int


class Timed(NamedTuple):
    """An answer, and when its request was sent and answered, in seconds of one clock."""

    answer: Answer
    sent: float
    came: float

    @property
    def seconds(self) -> float:
        """From the one to the other."""
        return self.came - self.sent


class Costs(NamedTuple):
    """Seconds until an answer has its first token, and of one call of the target with the drafts before it, in a server
    that answers as many prompts at a time as are measured.
    """

    first: float
    call: float

    def seconds(self, tokens: float, tokens_per_call: float) -> float:
        """Of an answer of so many tokens."""
        return self.first + (tokens - 1) / tokens_per_call * self.call


class Measured(NamedTuple):
    """The answers to all prompts of a task, the seconds from the first request to the last answer, and what calls cost,
    timed before and after.
    """

    answers: list[Answer]
    seconds: float
    costs: Costs

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(len(answer.ids) for answer in self.answers) / self.seconds


def check_serve(tasks: Mapping[str, Prompts]) -> None:
    """Raise UserError where nothing would be drafted: the first token comes from the prefill."""
    for name, prompts in tasks.items():
        if prompts.sampling.max_new_tokens < 2:
            raise UserError(f"task {name}: max_new_tokens 1: a server drafts from the second token on; raise it")


def serve(
    config: EvaluateConfig, tasks: Mapping[str, Prompts], found: Found, engine: Engine, limit: int, gap: Gap
) -> dict[str, Any]:
    """What `engine` made of all prompts, for results.json: a row for each condition and concurrency.

    `found`: what was decoded here, its own way included; `limit`: positions of the smallest model. Raises UserError
    with the last words of a server that does not start, or ends.
    """
    section = config.serve
    assert section is not None
    measured: dict[tuple[str | None, int], dict[Key, Measured]] = {}
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=config.out) as scratch:
        engine.load(config.drafters, Path(scratch))
        for drafter, gamma in [*((name, gamma) for name in config.drafters for gamma in config.gammas), (None, 0)]:
            longest = max(max(map(len, task.ids)) + task.sampling.max_new_tokens for task in tasks.values())
            positions = min(longest + gamma + _SLACK, limit)
            command = engine.command(drafter, gamma, max(section.concurrency), positions)
            named = f"{engine.title}, {drafter}, gamma {gamma}" if drafter else f"{engine.title} without a drafter"
            log = config.out / FOLDER / f"{section.engine}-{drafter or 'none'}-{gamma}.log"
            with phase(f"starting {named}"), _told(log), running(command, log, section.patience) as url:
                client = Client(url, None, section.timeout, patience=0)
                version = engine.version(client)
                measured[drafter, gamma] = {
                    key: _measure(client, engine, config, key, tasks[key.task], gamma, named)
                    for key in _keys(config, tasks)
                }
    rows = [
        _row(config, found, tasks, case, key, mine, measured[None, 0][key], gap)
        for case, by_key in measured.items()
        if case[0] is not None
        for key, mine in by_key.items()
    ]
    return {
        "engine": section.engine,
        "version": version,
        "weights": engine.weights(),
        "way": f"{WAYS[section.engine]} {_PREDICTED}",
        "rows": rows,
        "notes": [
            *outside(rows, found, section.engine),
            *best_gammas(rows),
        ],
    }


@contextmanager
def _told(log: Path) -> Iterator[None]:
    """Give what goes wrong with a server that has begun to serve its own last words."""
    try:
        yield
    except UserError as error:
        if str(log) in str(error) or not log.exists():
            raise
        raise UserError(f"{error}; the server said: {last_words(log)}; all of it: {log}") from error


def _keys(config: EvaluateConfig, tasks: Mapping[str, Prompts]) -> list[Key]:
    assert config.serve is not None
    return [
        Key(name, temperature, concurrency)
        for name, prompts in tasks.items()
        for temperature in prompts.sampling.temperatures
        for concurrency in config.serve.concurrency
    ]


def _measure(
    client: Client, engine: Engine, config: EvaluateConfig, key: Key, prompts: Prompts, gamma: int, named: str
) -> Measured:
    """All prompts of a task answered, `concurrency` at a time; before and after, the first few, to time single calls: a
    machine that others share is not equally fast at all times.
    """
    _, limit, top_p = prompts.sampling.temperatures, prompts.sampling.max_new_tokens, prompts.sampling.top_p
    asked = [
        Asked(ids, limit, key.temperature, top_p, unit_seed(config.seed, key.task, i) % 2**31)
        for i, ids in enumerate(prompts.ids)
    ]
    first = [one._replace(max_new_tokens=min(limit, _WARM_UP_TOKENS)) for one in asked[: key.concurrency]]
    with phase(
        f"{named}: {len(asked):,} prompts of task {key.task}, T {key.temperature:g}, {key.concurrency} at a time"
    ):
        _answers(client, engine, first, gamma, key.concurrency)
        before = _time_calls(client, engine, asked, gamma, key.concurrency)
        began = time.monotonic()
        answers = _answers(client, engine, asked, gamma, key.concurrency)
        seconds = time.monotonic() - began
        after = _time_calls(client, engine, asked, gamma, key.concurrency)
        costs = Costs(*(statistics.mean(pair) for pair in zip(before, after, strict=True)))
        return Measured([one.answer for one in answers], seconds, costs)


def _time_calls(client: Client, engine: Engine, asked: list[Asked], gamma: int, concurrency: int) -> Costs:
    """From the first few prompts, answered with one token and with more, as long as so many are under way. How many
    drafts are accepted has no part.
    """
    some = [
        one._replace(max_new_tokens=min(one.max_new_tokens, _TIMED_TOKENS))
        for one in asked[: max(_TIMED, 4 * concurrency)]
    ]
    short = _answers(client, engine, [one._replace(max_new_tokens=1) for one in some], gamma, concurrency)
    whole = _among_as_many(_answers(client, engine, some, gamma, concurrency))
    first = statistics.mean(one.seconds for one in _among_as_many(short))
    calls = sum(one.answer.calls if gamma else len(one.answer.ids) - 1 for one in whole)
    return Costs(first, max(0.0, sum(one.seconds - first for one in whole)) / max(calls, 1))


def _among_as_many(answers: list[Timed]) -> list[Timed]:
    """Those that came before the last request was sent: until then as many were under way as there may be."""
    last = max(one.sent for one in answers)
    return [one for one in answers if one.came <= last] or answers


def _answers(client: Client, engine: Engine, asked: list[Asked], gamma: int, concurrency: int) -> list[Timed]:
    """In the order of the prompts. What is wrong with one request ends all that are under way, and is told by all."""

    def ask(one: Asked) -> Timed:
        sent = time.monotonic()
        try:
            return Timed(engine.answer(client, one, gamma), sent, time.monotonic())
        except UserError as error:
            raise UserError(client.give_up(str(error))) from error

    pool = ThreadPoolExecutor(concurrency)
    try:
        with one_interrupt(lambda: client.give_up("stopped")):
            return list(results([pool.submit(ask, one) for one in asked]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for answers


def _row(
    config: EvaluateConfig,
    found: Found,
    tasks: Mapping[str, Prompts],
    case: tuple[str | None, int],
    key: Key,
    mine: Measured,
    plain: Measured,
    gap: Gap,
) -> dict[str, Any]:
    assert config.serve is not None
    drafter, gamma = case
    cell = Cell(key.task, str(drafter), gamma, key.temperature, config.serve.engine)
    served = Counts([answer.given for answer in mine.answers], [answer.calls for answer in mine.answers])
    if not any(answer.is_drafted for answer in mine.answers):
        raise UserError(f"{config.serve.engine}: answered task {key.task} without drafting once; see {FOLDER}/ for why")
    offline = count(found[cell]["blocks"])
    efficiency, tokens = bootstrap_runs([offline]), statistics.mean(found[cell]["lengths"])
    row = {
        "task": key.task,
        "drafter": drafter,
        "gamma": gamma,
        "temperature": key.temperature,
        "concurrency": key.concurrency,
        "prompts": len(mine.answers),
        "tokens": sum(len(answer.ids) for answer in mine.answers),
        "block_efficiency": bootstrap_runs([served])._asdict(),
        "offline": efficiency._asdict(),
        "difference": bootstrap_runs([served], [offline])._asdict(),
        "tokens_per_s": mine.rate,
        "plain_tokens_per_s": plain.rate,
        "speed_up": mine.rate / plain.rate,
        "predicted_speed_up": plain.costs.seconds(tokens, 1.0) / mine.costs.seconds(tokens, efficiency.value),
        "call": mine.costs.call / plain.costs.call if plain.costs.call else None,
        "costs": mine.costs._asdict(),
        "plain_costs": plain.costs._asdict(),
    }
    if key.temperature > 0:
        return row
    drafted, alone = ([answer.ids for answer in one.answers] for one in (mine, plain))
    return {
        **row,
        "equal_to_plain": sum(one == other for one, other in zip(drafted, alone, strict=True)),
        "plain_equal_to_offline": sum(one == other for one, other in zip(alone, found[cell]["tokens"], strict=True)),
        "differing": [*_differing(tasks[key.task].ids, drafted, alone, gap)],
    }


def _differing(
    prompts: list[list[int]], drafted: list[list[int]], plain: list[list[int]], gap: Gap
) -> Iterator[dict[str, Any]]:
    """Of each answer that is another with a drafter than without: its prompt, where they part, and how near a tie."""
    for number, (prompt, one, other) in enumerate(zip(prompts, drafted, plain, strict=True)):
        if one == other:
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        is_shorter = at == min(len(one), len(other))  # one ends where the other goes on
        tie = None if is_shorter else gap([*prompt, *one[:at]], one[at], other[at])
        yield {"prompt": number, "token": at, "gap": tie}


def best_gammas(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each drafter and condition, at which gamma the server was fastest, and at which it was predicted to be."""
    by_condition = defaultdict[str, list[Mapping[str, Any]]](list)
    for row in rows:
        at = f"{row['task']}, {row['drafter']}, T {row['temperature']:g}, {row['concurrency']} at a time"
        by_condition[at].append(row)
    told = []
    for condition, mine in by_condition.items():
        served, predicted = (max(mine, key=lambda row: row[key]) for key in ("speed_up", "predicted_speed_up"))
        if len(mine) > 1:
            loss = 1 - predicted["speed_up"] / served["speed_up"]
            was = f"{served['gamma']} was, {predicted['gamma']} is {loss:.0%} slower" if loss else "it was"
            told.append(f"{condition}: gamma {predicted['gamma']} predicted to be fastest; {was}")
    return told


def outside(rows: Sequence[Mapping[str, Any]], found: Found, engine: str) -> list[str]:
    """A line for each drafter whose served figures are outside every interval of what was decoded here."""
    told = defaultdict[str, list[str]](list)
    for row in rows:
        served, beside, difference = row["block_efficiency"]["value"], row["offline"], Estimate(**row["difference"])
        if difference.low <= 0 <= difference.high or any(one.low <= served <= one.high for one in _beside(found, row)):
            continue
        told[f"{row['task']}, {row['drafter']}, T {row['temperature']:g}"].append(
            f"gamma {row['gamma']}, {row['concurrency']} at a time {served:.2f} tokens a call served, "
            f"{beside['value']:.2f} [{beside['low']:.2f}, {beside['high']:.2f}] offline"
        )
    return [f"{of}: {'; '.join(some)}: outside every interval: {_LOOK_AT[engine]}" for of, some in told.items()]


def _beside(found: Found, row: Mapping[str, Any]) -> list[Estimate]:
    """Block efficiency here under the same condition, by ways of drafting."""
    condition = (row["task"], row["drafter"], row["gamma"], row["temperature"])
    return [bootstrap_runs([count(counts["blocks"])]) for cell, counts in found.items() if cell[:4] == condition]
