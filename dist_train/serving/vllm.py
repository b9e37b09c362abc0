"""vLLM: what its requests take beside OpenAI's fields, and its counters of speculative decoding."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from dist_train.errors import UserError

UNBENT = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM's and SGLang's fields for what cuts or bends a distribution beside temperature and top-p, off: they otherwise
take them from the model's generation configuration."""

PREFIX = "vllm:spec_decode_num_"
NEEDED = ("drafts", "draft_tokens", "accepted_tokens")
_BY_POSITION = "accepted_tokens_per_pos"
_SAMPLE = re.compile(rf"{PREFIX}({'|'.join((*NEEDED, _BY_POSITION))})(_total)?(?:\{{(.*)\}})?\s+([-+.\w]+)(?:\s+\d+)?")
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
