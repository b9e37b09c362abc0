"""`dist-train evaluate --server URL`: block efficiency by a server's own counters, on the prompts of the evaluation.

vLLM counts, for Prometheus: drafts made (one a call of the target that drafts were verified in), drafted tokens,
accepted tokens, and accepted tokens by position. They are read before and after the prompts of a task were answered;
1 + accepted/drafts is the block efficiency, as vLLM itself logs it. Whatever else the server answers meanwhile is
counted too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_shards.files import write_atomically, write_json
from dist_train.config import ServedConfig, save_config
from dist_train.config.address import check_address
from dist_train.errors import UserError
from dist_train.evaluate.results import make_folder
from dist_train.evaluate.tasks import Prompts, load_prompts, refuse_long_prompts
from dist_train.models.load import read_target_config
from dist_train.models.target_tokenizer import load_target_tokenizer, named_tokenizer
from dist_train.reports.results import RESULTS, read_tables
from dist_train.reports.tables import interval, markdown, shares
from dist_train.runtime.interrupts import one_interrupt, results
from dist_train.runtime.progress import phase
from dist_train.serving.http import Client, RefusedError, parse_json
from dist_train.serving.vllm import NEEDED, PREFIX, UNBENT, Sample, counted_between, parse_counters
from dist_train.tokenizer import Tokenizer
from dist_train.work.units import unit_seed

SERVED = "served.json"
_SECONDS_TO_REST = 60


class Server:
    """An OpenAI-compatible server. Every method raises UserError, naming the address, when it does not answer."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            check_address(self.url)
        except ValueError as error:
            raise UserError(f"{error}; it does not answer; check --server") from error
        self._client = Client(self.url, None, timeout, patience=0)

    def model(self) -> str:
        """The first model that it lists."""
        try:
            return str(self._answer("/v1/models")["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url}/v1/models: no model is listed; name the target's, model=NAME") from error

    def counters(self) -> dict[Sample, float]:
        """Its counters, once they stand still: the last are written after the answer is sent."""
        before, began = self._counters(), time.monotonic()
        while time.monotonic() - began < _SECONDS_TO_REST:
            time.sleep(0.2)
            now = self._counters()
            if now == before:
                return now
            before = now
        raise UserError(
            f"{self.url}/metrics: its counters do not stand still for {_SECONDS_TO_REST} s; does it answer others? "
            "measure on a server that answers nobody else"
        )

    def complete(self, request: dict[str, Any]) -> int:
        """Tokens of the answer to one request. What is wrong with one ends all that are under way, and is told by all.

        No request is sent twice: the server would count both.
        """
        try:
            return self._complete(request)
        except UserError as error:
            raise UserError(self._client.give_up(str(error))) from error

    def hang_up(self) -> None:
        """End all requests that are under way."""
        self._client.give_up("stopped")

    def _complete(self, request: dict[str, Any]) -> int:
        try:
            tokens = self._answer("/v1/completions", request)["usage"]["completion_tokens"]
            if type(tokens) is not int:
                raise TypeError("completion_tokens is no integer")
            return tokens
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{self.url}/v1/completions: an answer without usage.completion_tokens; is it vLLM's own?"
            ) from error

    def _counters(self) -> dict[Sample, float]:
        try:
            found = parse_counters(self._ask("/metrics"))
        except ValueError as error:
            raise UserError(f"{self.url}/metrics: a counter {PREFIX}* cannot be read: {error}") from error
        if missing := [counter for counter in NEEDED if counter not in {sample.counter for sample in found}]:
            raise UserError(
                f"{self.url}/metrics: no counter {PREFIX}{missing[0]}; it serves without speculative decoding, or is "
                "no vLLM"
            )
        return found

    def _answer(self, path: str, content: dict[str, Any] | None = None) -> Any:
        said = self._ask(path, content)
        try:
            return parse_json(said)
        except ValueError as error:
            raise UserError(f"{self.url}{path}: answers no JSON: {said[:80]!r}; check --server") from error

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> str:
        try:
            return self._client.ask_once("GET" if content is None else "POST", path, content).decode()
        except RefusedError as error:
            mend = "; check --server" if error.status == 404 else ""
            raise UserError(f"{self.url}{path}: answers {error}{mend}") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"{self.url}{path}: does not answer: {reason}; check --server") from error


def _read(config: ServedConfig) -> tuple[Tokenizer, Any]:
    """The tokenizer; and the target's configuration, None where only the server has the target."""
    try:
        target = read_target_config(config.target)
    except UserError:
        return named_tokenizer(config.target, config.tokenizer, config.chat_template), None
    return load_target_tokenizer(config.target, config.tokenizer, config.chat_template), target


def check(config: ServedConfig) -> None:
    """Raise UserError or DataError for what is wrong before anything is asked of the server."""
    tokenizer, target = _read(config)
    refuse_long_prompts(load_prompts(config, tokenizer), config.target.path, target)
    if config.beside is not None and not (config.beside / RESULTS).exists():
        raise UserError(f"{config.beside}: no finished results of dist-train evaluate here")


def run(config: ServedConfig) -> None:
    """Answer every task at every temperature and read the counters around each; write served.json and served.md."""
    check(config)
    make_folder(config.out)
    server = Server(config.server, config.timeout)
    server.counters()  # before anything is answered
    model = config.model or server.model()
    tasks = load_prompts(config, _read(config)[0])
    beside = read_tables(config.beside) if config.beside else None
    if beside is not None:
        _refuse_other_prompts(tasks, beside, config.beside)
    rows = [
        _measure(server, model, config, name, prompts, temperature)
        for name, prompts in tasks.items()
        for temperature in prompts.sampling.temperatures
    ]
    found = {"server": server.url, "model": model, "rows": rows}
    write_json(config.out / SERVED, found)
    text = _as_markdown(rows, beside)
    write_atomically(config.out / "served.md", [text.encode()])
    save_config(config, config.out / "served.yaml")  # config.yaml is that of an evaluation in the same folder
    print(f"{text}\nevaluate: {config.out / SERVED}", flush=True)


def _measure(
    server: Server, model: str, config: ServedConfig, name: str, prompts: Prompts, temperature: float
) -> dict[str, Any]:
    sampling = prompts.sampling
    requests = [
        {
            "model": model,
            "prompt": ids,  # as ids: the server's own template and tokenizer have no say
            "max_tokens": sampling.max_new_tokens,
            "temperature": temperature,
            "top_p": sampling.top_p if temperature > 0 else 1.0,
            **UNBENT,  # as offline
            "seed": unit_seed(config.seed, name, i) % 2**31,
        }
        for i, ids in enumerate(prompts.ids)
    ]
    before, began = server.counters(), time.monotonic()
    pool = ThreadPoolExecutor(config.concurrency)
    try:
        with one_interrupt(server.hang_up), phase(f"{len(requests):,} prompts of task {name}"):
            tokens = sum(results([pool.submit(server.complete, request) for request in requests]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for answers
    seconds = time.monotonic() - began
    counted = counted_between(before, server.counters())
    if not counted.drafts:
        raise UserError(f"{server.url}: answered task {name} without drafting once; is its speculative decoding on?")
    return {
        "task": name,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "prompts": len(requests),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "target_calls": int(counted.drafts),
        "gamma": counted.drafted / counted.drafts,
        "block_efficiency": 1 + counted.accepted / counted.drafts,
        "accepted_shares": [accepted / counted.drafts for accepted in counted.by_position],
    }


def _refuse_other_prompts(tasks: Mapping[str, Prompts], beside: Mapping[str, Any], folder: Path | None) -> None:
    for name, prompts in tasks.items():
        if beside["prompts"].get(name) != prompts.identity:
            raise UserError(f"{folder}: its task {name} has other prompts, or none; nothing to show side by side")


def _as_markdown(rows: Sequence[Mapping[str, Any]], beside: Mapping[str, Any] | None) -> str:
    """The served figures and, below each, the offline ones of the same task, temperature, length and gamma.

    Below the table, what has none.
    """
    header = ["task", "gamma", "T", "measured", "drafting", "block efficiency", "accepted at position 1, 2, ..."]
    lines, alone = [], []
    for row in rows:
        # vLLM counts by position up to its setting; the mean falls short of it where drafts are cut at max_model_len.
        row = {**row, "gamma": len(row["accepted_shares"]) or round(row["gamma"])}
        at = [row["task"], str(row["gamma"]), f"{row['temperature']:g}"]
        lines.append([*at, "served", "", f"{row['block_efficiency']:.2f}", shares(row["accepted_shares"])])
        same = ["gamma", "temperature", "max_new_tokens"]
        if row["temperature"] > 0:  # top-p says nothing of greedy answers
            same.append("top_p")
        of_task = [other for other in beside["rows"] if other["task"] == row["task"]] if beside else []
        found = [other for other in of_task if all(other[key] == row[key] for key in same)]
        for other in found:
            efficiency = other["block_efficiency"]
            figure = f"{efficiency['value']:.2f} {interval(efficiency)}"
            who = f"offline, {other['drafter']}"
            lines.append([*at, who, other["drafting"], figure, shares(other["accepted_shares"])])
        if of_task and not found:
            alone.append(
                f"- {row['task']}: no offline figures with {_listed([row], same)}; there are some with "
                f"{_listed(of_task, same)}\n"
            )
    return markdown(header, lines) + "".join(["\n", *alone] if alone else [])


def _listed(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Each key with all its values, as in "gamma 3, 5, temperature 0"."""
    return ", ".join(
        f"{key} {' and '.join(f'{value:g}' for value in sorted({row[key] for row in rows}))}" for key in keys
    )
