"""The speed-up over plain decoding that measured acceptance and measured costs of calls lead to expect.

A block drafts gamma tokens, verifies them in one call of the target, and gives tau tokens; in units of a plain step of
the target it costs c gamma + v, with c a draft and v that call. So

    speed-up = tau / (c gamma + v).

With tau = (1 - alpha^(gamma + 1)) / (1 - alpha), equation 1 of Leviathan et al. (2023, arXiv 2211.17192), and v = 1
this is their theorem 3.8; with measured tau and v = 1 it is the MBSU of Goel et al. (2024). Verifying is free only
where reading the weights is all that takes time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dist_train.decoding.timing import CallTimes
from dist_train.evaluate.results import Cell, Found, drafts_in_one_pass

THRESHOLDS = tuple(tenth / 10 for tenth in range(10))


class Expected(NamedTuple):
    """Of one call of the target, on average: tokens that come of it, passes of the drafter before it, and the share of
    calls that verify 0, 1, ... drafts.
    """

    tokens: float
    passes: float
    verified: list[float]

    def speed_up(self, draft: float, verify: Sequence[float]) -> float:
        """Over plain decoding, in whose steps `draft`, a pass, and `verify`, a call with 0, 1, ... drafts, are told."""
        cost = self.passes * draft + sum(share * v for share, v in zip(self.verified, verify, strict=False))
        return self.tokens / cost


def expected(
    counts: Mapping[str, Sequence[Any]],
    gamma: int,
    threshold: float = 0.0,
    *,
    keeps_last: bool = False,
    one_pass: bool = False,
) -> Expected:
    """What blocks of at most `gamma` drafts give, told from the blocks of an evaluation that drafted as many or more.

    `counts`: of each prompt the tokens of its "blocks", and their "confidences". Whether the first k drafts of a block
    are accepted does not depend on how many come after them, so that a block is cut short: after `gamma` drafts, or
    where the drafter's confidence is below `threshold`, before that draft or, with `keeps_last`, after it; in
    `one_pass` all are drafted, and so many verified. The shorter blocks would begin at other places of the same texts.
    Each prompt therefore weighs as many calls as its text then takes. That the blocks of one text, too, are not all
    alike is neglected: easy stretches then count for too little, and tau at a gamma much smaller than the evaluation's
    comes out low, by 2 % where texts are very uneven.
    """
    drafted = [blocks for blocks in counts["blocks"] if blocks]  # as servers count, a text of one token has none
    accepted = np.array([tokens - 1 for blocks in drafted for tokens in blocks])
    prompt = np.repeat(np.arange(len(drafted)), [len(blocks) for blocks in drafted])
    drafts = np.full(len(accepted), gamma)
    verified = drafts
    if threshold > 0:
        confidences = np.array([row[:gamma] for blocks in counts["confidences"] for row in blocks])
        below = confidences < threshold
        stops = below.any(1)
        drafts = np.where(stops, below.argmax(1) + 1, gamma)
        verified = drafts if keeps_last else drafts - stops
    tokens = np.minimum(accepted, verified) + 1
    texts, gave = np.bincount(prompt, accepted + 1), np.bincount(prompt, tokens)
    weights = (texts / gave)[prompt]  # calls that the text takes over those that are looked at
    calls = weights.sum()
    shares = np.bincount(verified, weights, gamma + 1) / calls
    passes = np.ones_like(drafts) if one_pass else drafts
    return Expected(float(texts.sum() / calls), float((weights * passes).sum() / calls), shares.tolist())


def acceptance_rate(tokens: float, gamma: int) -> float | None:
    """The alpha, from 0 to 1, at which 1 + alpha + ... + alpha^gamma, tokens per call, is `tokens`; None if above all.

    Leviathan et al. (2023), equation 1, the other way round.
    """
    if tokens > gamma + 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(gamma + 1)) < tokens else (low, middle)
    return high


def predict(
    found: Found,
    times: Sequence[CallTimes],
    length: int,
    read: Mapping[str, int],
    parameters: Mapping[str, int],
    one_pass: Collection[str] = (),
) -> dict[str, Any]:
    """Costs of calls, speed-ups by gamma and batch size, and by threshold at the largest gamma and smallest batch.

    `times` are of the drafters in the order of `read`, bytes of weights, and `parameters`, both with the target under
    the name ""; those of `one_pass` draft a block in one. A batch ends its drafts at different places, of which these
    times say nothing: thresholds are looked at for the smallest one.
    """
    drafters = [name for name in parameters if name]
    ratios = {name: [sizes[name] / sizes[""] for sizes in (read, parameters)] for name in drafters}
    costs = [
        _costs(name, place, each, *ratios[name], one_pass=name in one_pass)
        for place, name in enumerate(drafters)
        for each in times
    ]
    return {
        "length": length,
        "costs": costs,
        "speed_ups": [row for cost in costs for row in _by_gamma(found, cost)],
        "thresholds": [row for name in drafters for row in _by_threshold(found, costs, name)],
    }


def _costs(
    drafter: str, place: int, times: CallTimes, by_bytes: float, by_parameters: float, *, one_pass: bool
) -> dict[str, Any]:
    """In units of a plain step: a pass of the drafter, verifying 1 to gamma drafts; and the alpha at which nothing is
    gained.
    """
    draft, verify = times.draft[place] / times.plain, [seconds / times.plain for seconds in times.verify]
    gammas = range(1, len(verify) + 1)
    return {
        "drafter": drafter,
        "batch_size": times.batch_size,
        "plain_seconds": times.plain,
        "draft": draft,
        "one_pass": one_pass,
        "draft_by_bytes": by_bytes,
        "draft_by_parameters": by_parameters,
        "verify": verify,
        "break_even": [
            acceptance_rate((1 if one_pass else gamma) * draft + verify[gamma - 1], gamma) for gamma in gammas
        ],
    }


def _by_gamma(found: Found, cost: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Under each condition tokens per call and speed-up at gamma 1 to the largest."""
    verify = [1.0, *cost["verify"]]
    for condition, runs in _conditions(found, cost["drafter"]).items():
        bounds = pairwise([0, *runs])  # each gamma from the evaluation with the next larger one
        one_pass = cost["one_pass"] and drafts_in_one_pass(condition[2])
        means = [
            expected(runs[upper], gamma, one_pass=one_pass)
            for lower, upper in bounds
            for gamma in range(lower + 1, upper + 1)
        ]
        speed_ups = [mean.speed_up(cost["draft"], verify) for mean in means]
        best = int(np.argmax(speed_ups))
        yield {
            **dict(zip(_CONDITION, condition, strict=True)),
            "drafter": cost["drafter"],
            "batch_size": cost["batch_size"],
            "tokens_per_call": [mean.tokens for mean in means],
            "acceptance": [acceptance_rate(mean.tokens, gamma) for gamma, mean in enumerate(means, start=1)],
            "speed_up": speed_ups,
            "best_gamma": best + 1 if speed_ups[best] > 1 else 0,
        }


def _by_threshold(found: Found, costs: Sequence[Mapping[str, Any]], drafter: str) -> Iterator[dict[str, Any]]:
    cost = next((cost for cost in costs if cost["drafter"] == drafter), None)
    if cost is None:
        return
    for condition, runs in _conditions(found, drafter).items():
        if condition[2] == "vllm":  # it has no threshold
            continue
        gamma, one_pass = max(runs), cost["one_pass"] and drafts_in_one_pass(condition[2])
        for threshold in THRESHOLDS:
            # llama.cpp, which drafts greedily, drops the draft that it stops at; transformers lets it be verified.
            mean = expected(runs[gamma], gamma, threshold, keeps_last=condition[2] == "sampled", one_pass=one_pass)
            yield {
                **dict(zip(_CONDITION, condition, strict=True)),
                "drafter": drafter,
                "gamma": gamma,
                "batch_size": cost["batch_size"],
                "threshold": threshold,
                "tokens_per_call": mean.tokens,
                "drafts_per_call": mean.passes,
                "speed_up": mean.speed_up(cost["draft"], [1.0, *cost["verify"]]),
            }


_CONDITION = ("task", "temperature", "drafting")


def _conditions(found: Found, drafter: str) -> dict[tuple[str, float, str], dict[int, Mapping[str, Any]]]:
    """The counts of a drafter by condition and, smallest first, by gamma."""
    cells: list[Cell] = sorted(cell for cell in found if cell.drafter == drafter)
    by_condition: dict[tuple[str, float, str], dict[int, Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.gamma):
        by_condition.setdefault((cell.task, cell.temperature, cell.drafting), {})[cell.gamma] = found[cell]
    return by_condition
