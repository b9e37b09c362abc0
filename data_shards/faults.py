"""What to do about records that cannot be used: stop at the first, or leave them out and say which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from data_shards.errors import DataError

Policy = Literal["stop", "skip"]
KINDS = ("malformed", "encoding", "too_long", "empty")
MAX_BYTES = 50_000_000
_NAMED_PER_UNIT = 100  # of a corpus in which everything is at fault the first hundred of each shard say enough


class Fault(NamedTuple):
    """One record left out: `kind` is one of KINDS, `where` file:line."""

    kind: str
    where: str
    reason: str


@dataclass
class Faults:
    """Collects the faults of one unit. `policy`: for each kind of KINDS what to do; a kind not named stops.

    `keys`: the section of the configuration that the policy is from, for messages.
    """

    policy: Mapping[str, Policy]
    max_bytes: int = MAX_BYTES
    keys: str = "faults"
    counts: dict[str, int] = field(default_factory=dict)
    named: list[Fault] = field(default_factory=list)

    def note(self, kind: str, where: Callable[[], str], reason: str) -> None:
        """Count a fault; `where` is asked only if it is named. Raises DataError where the policy is to stop."""
        if self.policy.get(kind, "stop") == "stop":
            instead = f"set {self.keys}.{kind}=skip" if kind in self.policy else "take it out"
            raise DataError(f"{where()}: {reason}; mend it, or {instead}")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.named) < _NAMED_PER_UNIT:
            self.named.append(Fault(kind, where(), reason))

    def as_json(self) -> dict[str, Any]:
        """As stored in a shard's record."""
        return {"counts": dict(sorted(self.counts.items())), "named": [list(fault) for fault in self.named]}


def gather(shards: Iterable[Mapping[str, Any]]) -> tuple[dict[str, int], list[Fault]]:
    """All counts and all named faults of the shards' records, in order."""
    counts: dict[str, int] = {}
    named: list[Fault] = []
    for shard in shards:
        for kind, count in shard["counts"].items():
            counts[kind] = counts.get(kind, 0) + count
        named += [Fault(*fault) for fault in shard["named"]]
    return counts, named


STRICT = Faults({})
"""Stops at every fault; for readers of small files."""
