"""What came out of a generation, unit by unit, so that no more than one file of answers is in memory."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from dist_train.errors import UserError

_COLUMNS = ["seed", "response", "response_ids", "finish_reason", "reencoded"]
_TIMES = "_times-"
_BINS = 40


@dataclass
class Tally:
    """Sums over the answers of one temperature and top-p."""

    temperature: float
    top_p: float | None
    answers: int = 0
    reencoded: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    lengths: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    texts: list[Any] = field(default_factory=list)
    """hashes of the texts, uint64 arrays"""
    pairs: list[Any] = field(default_factory=list)
    """hashes of prompt and text"""
    turns: dict[int, list[int]] = field(default_factory=dict)
    """answers to each turn of conversations, their tokens, and how many of them ended by themselves"""

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return sum(length * count for length, count in self.lengths.items())

    def add(self, path: Path, seconds: float | None, *, by_turn: bool = False) -> None:
        """Count one unit; `seconds`: what it took, if that is known. Raises UserError where its file is damaged."""
        try:
            table = pq.read_table(path, columns=[*_COLUMNS, *(["turn"] if by_turn else [])])
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged: {error}; remove it, and the same command makes it again") from error
        lengths = pc.list_value_length(table["response_ids"]).to_pylist()
        self.answers += len(table)
        self.reencoded += pc.sum(table["reencoded"]).as_py()
        self.lengths.update(lengths)
        self.reasons.update(table["finish_reason"].to_pylist())
        if seconds is not None:
            self.timed_tokens += sum(lengths)
            self.seconds += seconds
        texts = np.array([xxhash.xxh64_intdigest(text.encode()) for text in table["response"].to_pylist()], np.uint64)
        self.texts.append(texts)
        prompts = table["seed"].to_numpy().astype(np.uint64)
        if by_turn:
            prompts |= table["turn"].to_numpy().astype(np.uint64) << np.uint64(48)
            turns = zip(table["turn"].to_pylist(), lengths, table["finish_reason"].to_pylist(), strict=True)
            for turn, length, reason in turns:
                counts = self.turns.setdefault(turn, [0, 0, 0])
                self.turns[turn] = [counts[0] + 1, counts[1] + length, counts[2] + (reason == "stop")]
        self.pairs.append(texts ^ (prompts * np.uint64(0x9E3779B97F4A7C15)))

    def figures(self) -> dict[str, Any]:
        """Lengths in tokens; shares of all answers, 0 to 1; tokens/s of one process, null where no time is known."""
        tokens, answers = self.tokens, max(self.answers, 1)
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "answers": self.answers,
            "tokens": tokens,
            "mean_tokens": tokens / answers,
            "median_tokens": _quantile(self.lengths, 0.5),
            "p95_tokens": _quantile(self.lengths, 0.95),
            "stopped_by_itself": self.reasons["stop"] / answers,
            "finish_reasons": dict(sorted(self.reasons.items())),
            "distinct": _distinct(self.texts) / answers,
            "repeated_to_a_prompt": 1 - _distinct(self.pairs) / answers,
            "reencoded": self.reencoded / answers,
            "tokens_per_s": self.timed_tokens / self.seconds if self.seconds else None,
        }

    def histogram(self, longest: int) -> list[int]:
        """Answers by length, in bins of equal width from 0 to `longest` tokens."""
        width = longest / _BINS
        counts = [0] * _BINS
        for length, count in self.lengths.items():
            counts[min(_BINS - 1, int(length / width))] += count
        return counts


def gather(
    units: Iterable[tuple[int, Path, float, float | None]], folder: Path, *, by_turn: bool = False
) -> dict[str, Any]:
    """Figures of all units (number, file, temperature, top-p), altogether, by temperature and top-p, and by turn."""
    times = dict(_times(folder))
    tallies: dict[tuple[float, float | None], Tally] = {}
    for unit, path, temperature, top_p in units:
        tally = tallies.setdefault((temperature, top_p), Tally(temperature, top_p))
        tally.add(path, times.get(unit), by_turn=by_turn)
    longest = max((max(tally.lengths) for tally in tallies.values()), default=0) or 1
    whole = _altogether(list(tallies.values()))
    figures = {key: value for key, value in whole.figures().items() if key not in ("temperature", "top_p")}
    turns = [
        {"turn": turn, "answers": answers, "mean_tokens": tokens / answers, "stopped_by_itself": stopped / answers}
        for turn, (answers, tokens, stopped) in sorted(whole.turns.items())
    ]
    return {
        **figures,
        **({"turns": turns} if by_turn else {}),
        "longest": longest,
        "conditions": [{**tally.figures(), "histogram": tally.histogram(longest)} for tally in tallies.values()],
    }


class Stopwatch:
    """What each unit of this process took, appended to a file of its own: the answers' files hold nothing of chance.

    Where several units are made at once, one is charged the time since the one before it was done, so that the sum is
    the time that passed.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{_TIMES}{uuid.uuid4().hex}.jsonl"
        self._lock = threading.Lock()
        self._last = 0.0

    def note(self, unit: int, began: float) -> None:
        """A unit, begun at `began` of time.monotonic(), is done."""
        with self._lock:
            now = time.monotonic()
            seconds, self._last = now - max(began, self._last), now
            with suppress(OSError), self._path.open("a") as file:  # a time that is not noted is no loss
                file.write(json.dumps({"unit": unit, "seconds": seconds}) + "\n")


def _times(folder: Path) -> Iterator[tuple[int, float]]:
    for path in folder.glob(f"{_TIMES}*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                noted = json.loads(line)
                yield noted["unit"], noted["seconds"]
            except (ValueError, KeyError):  # the last line of a killed process
                break


def _altogether(tallies: list[Tally]) -> Tally:
    whole = Tally(0.0, None)
    for tally in tallies:
        whole.answers += tally.answers
        whole.reencoded += tally.reencoded
        whole.timed_tokens += tally.timed_tokens
        whole.seconds += tally.seconds
        whole.lengths.update(tally.lengths)
        whole.reasons.update(tally.reasons)
        whole.texts += tally.texts
        whole.pairs += tally.pairs
        for turn, counts in tally.turns.items():
            whole.turns[turn] = [a + b for a, b in zip(counts, whole.turns.get(turn, [0, 0, 0]), strict=True)]
    return whole


def _distinct(hashes: list[Any]) -> int:
    return len(np.unique(np.concatenate(hashes))) if hashes else 0


def _quantile(lengths: Counter[int], share: float) -> int:
    wanted, counted = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        counted += lengths[length]
        if counted >= wanted:
            return length
    return 0
