"""`dist-train evaluate --server URL`: block efficiency by a server's own counters, on the prompts of the evaluation.

vLLM counts, for Prometheus: drafts made (one a call of the target that drafts were verified in), drafted tokens,
accepted tokens, and accepted tokens by position. They are read before and after the prompts of a task were answered;
1 + accepted/drafts is the block efficiency, as vLLM itself logs it. Whatever else the server answers meanwhile is
counted too.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import read_json, write_atomically, write_json
from dist_train.config import ServedConfig, save_config
from dist_train.errors import UserError
from dist_train.evaluate.results import RESULTS, make_folder
from dist_train.evaluate.tables import interval, markdown, shares
from dist_train.evaluate.tasks import Prompts, load_prompts, refuse_long_prompts
from dist_train.generate.asks import UNBENT
from dist_train.target import load_target_tokenizer, named_tokenizer, read_target_config
from dist_train.tokenizer import Tokenizer
from dist_train.units import unit_seed

SERVED = "served.json"
_SECONDS_TO_REST = 60
_PREFIX = "vllm:spec_decode_num_"
_SAMPLE = re.compile(rf"{_PREFIX}(\w+?)(_total)?(?:\{{(.*)\}})?\s+([-+.\w]+)(?:\s+\d+)?")
_POSITION = re.compile(r'position="(\d+)"')


class Counters(NamedTuple):
    """Of all engines together; `by_position`: accepted tokens at the first, second, ... place of a draft."""

    drafts: float
    drafted: float
    accepted: float
    by_position: tuple[float, ...]

    def since(self, before: Counters) -> Counters:
        """What was counted after `before`. Raises UserError where the server began to count anew."""
        if self.drafts < before.drafts:
            raise UserError("the server's counters went back: it was restarted meanwhile; start again")
        old = before.by_position + (0.0,) * (len(self.by_position) - len(before.by_position))
        positions = tuple(now - then for now, then in zip(self.by_position, old, strict=True))
        drafts, drafted = self.drafts - before.drafts, self.drafted - before.drafted
        return Counters(drafts, drafted, self.accepted - before.accepted, positions)


def parse_counters(text: str) -> Counters | None:
    """The counters in Prometheus' text format, summed over engines; None where there are none.

    Raises ValueError where one of them is no count.
    """
    sums: dict[tuple[str, int], dict[bool, float]] = {}
    for line in text.splitlines():
        if match := _SAMPLE.fullmatch(line.strip()):
            name, total, labels, value = match.groups()
            place = _POSITION.search(labels or "")
            by_suffix = sums.setdefault((name, int(place[1]) if place else -1), {})
            by_suffix[bool(total)] = by_suffix.get(bool(total), 0.0) + _count(value)
    # A server that exports a counter with and without the suffix means one and the same.
    found = {key: by_suffix.get(True, by_suffix.get(False, 0.0)) for key, by_suffix in sums.items()}
    if ("drafts", -1) not in found:
        return None
    positions = 1 + max((place for name, place in found if name == "accepted_tokens_per_pos"), default=-1)
    return Counters(
        found["drafts", -1],
        found.get(("draft_tokens", -1), 0.0),
        found.get(("accepted_tokens", -1), 0.0),
        tuple(found.get(("accepted_tokens_per_pos", k), 0.0) for k in range(positions)),
    )


def _count(value: str) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value} is no count")
    return found


class Server:
    """An OpenAI-compatible server. Every method raises UserError, naming the address, when it does not answer."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout

    def model(self) -> str:
        """The first model that it lists."""
        try:
            return str(self._answer("/v1/models")["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url}/v1/models: no model is listed; name the target's, model=NAME") from error

    def counters(self) -> Counters:
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

    def complete(self, request: Mapping[str, Any]) -> int:
        """Tokens of the answer to one request."""
        try:
            return int(self._answer("/v1/completions", request)["usage"]["completion_tokens"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url}/v1/completions: an answer without usage.completion_tokens; is it vLLM's own?"
            ) from error

    def _counters(self) -> Counters:
        try:
            found = parse_counters(self._ask("/metrics"))
        except ValueError as error:
            raise UserError(f"{self.url}/metrics: a counter {_PREFIX}* cannot be read: {error}") from error
        if found is None:
            raise UserError(
                f"{self.url}/metrics: no counters {_PREFIX}*; it serves without speculative decoding, or is no vLLM"
            )
        return found

    def _answer(self, path: str, content: Mapping[str, Any] | None = None) -> Any:
        said = self._ask(path, content)
        try:
            return json.loads(said)
        except ValueError as error:
            raise UserError(f"{self.url}{path}: answers no JSON: {said[:80]!r}; check --server") from error

    def _ask(self, path: str, content: Mapping[str, Any] | None = None) -> str:
        data = None if content is None else json.dumps(content).encode()
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            raise UserError(f"{self.url}{path}: answers {error.code}: {said or error.reason}") from error
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:  # OverflowError: of a port
            reason = getattr(error, "reason", error)
            raise UserError(f"{self.url}{path}: does not answer: {reason}; check --server") from error


def _read(config: ServedConfig) -> tuple[Tokenizer, Any]:
    """The tokenizer; and the target's configuration, None where only the server has the target."""
    try:
        target = read_target_config(config.target)
    except UserError:
        return named_tokenizer(config.target, config.tokenizer), None
    return load_target_tokenizer(config.target, config.tokenizer), target


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
    beside = read_json(config.beside / RESULTS) if config.beside else None
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
    with ThreadPoolExecutor(config.concurrency) as pool:
        tokens = sum(pool.map(server.complete, requests))
    seconds = time.monotonic() - began
    counted = server.counters().since(before)
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
    """The served figures and, below each, the offline ones of the same task, temperature, length and gamma."""
    header = ["task", "gamma", "T", "measured", "drafting", "block efficiency", "accepted at position 1, 2, ..."]
    lines = []
    for row in rows:
        # vLLM counts by position up to its setting; the mean falls short of it where drafts are cut at max_model_len.
        gamma = len(row["accepted_shares"]) or round(row["gamma"])
        at = [row["task"], str(gamma), f"{row['temperature']:g}"]
        lines.append([*at, "served", "", f"{row['block_efficiency']:.2f}", shares(row["accepted_shares"])])
        same = ("task", "temperature", "top_p", "max_new_tokens")
        for other in beside["rows"] if beside else ():
            if other["gamma"] == gamma and all(other[key] == row[key] for key in same):
                efficiency = other["block_efficiency"]
                figure = f"{efficiency['value']:.2f} {interval(efficiency)}"
                who = f"offline, {other['drafter']}"
                lines.append([*at, who, other["drafting"], figure, shares(other["accepted_shares"])])
    return markdown(header, lines)
