"""vLLM: how it is started, what its requests take beside OpenAI's fields, and its counters of speculative decoding.

llama.cpp's server has the same counters under a name of its own (`--metrics`).
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import UserError
from dist_train.serving.http import Client
from dist_train.serving.launch import ServerCommand

UNBENT = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM's and SGLang's fields for what cuts or bends a distribution beside temperature and top-p, off: they otherwise
take them from the model's generation configuration."""

PREFIX = "vllm:spec_decode_num_"
NEEDED = ("drafts", "draft_tokens", "accepted_tokens")
_BY_POSITION = "accepted_tokens_per_pos"
_SAMPLE = re.compile(
    rf"(?:vllm|llamacpp):spec_decode_num_({'|'.join((*NEEDED, _BY_POSITION))})(_total)?"
    r"(?:\{(.*)\})?\s+([-+.\w]+)(?:\s+\d+)?"
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Sample(NamedTuple):
    """Of which counter, without prefix and suffix, and of what."""

    counter: str
    labels: frozenset[tuple[str, str]]


class Counters(NamedTuple):
    """Of all engines together; `by_position`: accepted tokens at the first, second, ... place of a draft."""

    drafts: float
    drafted: float
    accepted: float
    by_position: tuple[float, ...]


class Completion(NamedTuple):
    """One answer: the ids of its tokens, with the end-of-sequence id if one was drawn.

    `calls`: of the target with drafts, 0 without a drafter; `accepted`: of the draft tokens.
    """

    tokens: list[int]
    calls: int
    accepted: int


def vllm_command(
    python: Path,
    target: str | Path,
    *,
    drafter: Path | None = None,
    gamma: int = 0,
    sampled: bool = False,
    parallel: bool = False,
    dtype: str = "auto",
    positions: int | None = None,
    more: Sequence[str] = (),
) -> ServerCommand:
    """vLLM's server for `target`, in the environment of `python`; `drafter` drafts gamma tokens a block, if above 0.

    `sampled`: drafts are drawn under the temperature and accepted with probability sum min(p, q); else they are the
    drafter's likeliest tokens, which is vLLM's default. `parallel`: all in one pass, by the `pard_token` of the
    drafter's config.json. With a drafter, each answer tells what became of its drafts.
    `dtype`: "auto" is bf16 for a folder in fp32. `positions`: None is the target's; a drafter with fewer stops the
    whole batch's drafting beyond its own. `more`: further options, which have the last word.
    """
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), "--dtype", dtype]
    if positions is not None:
        words += ["--max-model-len", str(positions)]
    if drafter is not None and gamma:
        speculation: dict[str, Any] = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": gamma}
        if sampled:
            speculation["draft_sample_method"] = "probabilistic"
        if parallel:
            speculation["parallel_drafting"] = True
        words += ["--speculative-config", json.dumps(speculation), "--per-request-spec-decode-metrics", "summary"]
    return ServerCommand("vLLM", (*words, *more), {"VLLM_NO_USAGE_STATS": "1"})


def complete(
    client: Client,
    model: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end_ids: Sequence[int] = (),
) -> Completion:
    """Answer one prompt, given as ids, with the target's own distribution. Raises UserError where that fails.

    Without a seed: vLLM draws for requests that have one apart from the others, one by one.
    """
    request = {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p if temperature > 0 else 1.0,
        **UNBENT,
        "stop_token_ids": list(end_ids),
        "return_token_ids": True,
    }
    answer = client.ask_for_object("POST", "/v1/completions", request)
    try:
        (choice,) = answer["choices"]
        tokens, finish = choice["token_ids"], choice["finish_reason"]
        drafting = (answer.get("metrics") or {}).get("speculative_decoding") or {}
        calls, accepted = drafting.get("num_spec_steps", 0), drafting.get("num_accepted_draft_tokens", 0)
        if not tokens or any(type(number) is not int for number in (*tokens, calls, accepted)):
            raise TypeError("no ids, or counts that are none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{client.url}/v1/completions: not vLLM's answer ({error!r}); is it vLLM's own?") from error
    if finish == "stop" and tokens[-1] not in end_ids:
        tokens = [*tokens, *end_ids[:1]]  # drawn, and not shown
    return Completion(tokens, calls, accepted)


def parse_counters(text: str) -> dict[Sample, float]:
    """The counters in Prometheus' text format. Raises ValueError where one of them is no count."""
    plain, total = defaultdict[Sample, float](float), defaultdict[Sample, float](float)
    for line in text.splitlines():
        if match := _SAMPLE.fullmatch(line.strip()):
            name, suffix, labels, value = match.groups()
            (total if suffix else plain)[Sample(name, frozenset(_LABEL.findall(labels or "")))] += _count(value)
    # A server that exports a counter with and without the suffix means one and the same.
    twice = {sample.counter for sample in total}
    return {sample: count for sample, count in plain.items() if sample.counter not in twice} | total


def counted_between(before: Mapping[Sample, float], after: Mapping[Sample, float]) -> Counters:
    """What was counted, summed over engines. Raises UserError where the server began to count anew, or miscounts."""
    if any(after.get(sample, -1.0) < count for sample, count in before.items()):
        raise UserError("the server's counters went back: it was restarted meanwhile; start again")
    sums = defaultdict[tuple[str, str], float](float)
    for sample, count in after.items():
        place = dict(sample.labels).get("position", "") if sample.counter == _BY_POSITION else ""
        sums[sample.counter, place] += count - before.get(sample, 0.0)
    drafts, drafted, accepted = (sums[counter, ""] for counter in NEEDED)
    places = sorted((int(place), count) for (_, place), count in sums.items() if place.isdecimal())
    by_position = tuple(count for _, count in places)
    adds_up = not by_position or sum(by_position) == accepted
    if not (adds_up and max(by_position, default=0.0) <= drafts <= drafted >= accepted):
        raise UserError(
            f"what the server counts does not hold together: {accepted:.0f} tokens accepted of {drafted:.0f} in "
            f"{drafts:.0f} drafts; is it vLLM's own?"
        )
    return Counters(drafts, drafted, accepted, by_position)


def _count(value: str) -> float:
    found = float(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{value} is no count")
    return found
