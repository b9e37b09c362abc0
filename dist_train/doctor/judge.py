"""From tables of measurements to findings: pure functions, so that every fault can be tried without having it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high

from dist_train.doctor.findings import Finding

SLOW = 0.10
"""share below the median from which on a rank is called slow"""
SKEW_SECONDS = 1.0
_GIB = 2**30
_LEAST_FREE_GIB = 10.0
_LEAST_INODES = 10_000


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    node: str
    device: str
    """name of its GPU, or "cpu": only like devices are compared"""


def slow_ranks(places: Sequence[Place], rates: Sequence[Sequence[float]]) -> dict[int, float]:
    """The ranks, of `rates` [place][repeat], more is better, that are slow, and the share by which each is.

    A rank is slow where even its best repeat is 10 % or more below the median of the ranks' medians on such devices:
    what slows one repeat down is noise. Of two ranks the faster one is the median.
    """
    found = {}
    for device in {place.device for place in places}:
        rows = {p.rank: row for p, row in zip(places, rates, strict=True) if p.device == device}
        middle = median_high([median(row) for row in rows.values()])
        found.update({rank: 1 - max(row) / middle for rank, row in rows.items() if max(row) <= (1 - SLOW) * middle})
    return found


def judge_rates(
    check: str, unit: str, places: Sequence[Place], rates: Sequence[Sequence[float]], mend: str, who: str = "rank"
) -> list[Finding]:
    """One finding a node of `rates` [place][repeat], more is better; each slow rank (or `who` else) is named."""
    slow, rows = slow_ranks(places, rates), {place.rank: row for place, row in zip(places, rates, strict=True)}
    found = []
    for node, ranks in by_node(places).items():
        low, high = (pick(median(rows[rank]) for rank in ranks) for pick in (min, max))
        figures = f"{low:.4g} {unit}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.4g} to {high:.4g} {unit}"
        named = [
            f"{who} {rank} reaches {max(rows[rank]):.4g} at best, {slow[rank]:.0%} below the median"
            for rank in ranks
            if rank in slow
        ]
        found.append(
            Finding(check, node, "FAIL" if named else "ok", "; ".join([figures, *named]), mend if named else "")
        )
    return found


def judge_pairs(
    check: str, nodes: Sequence[str], pairs: Mapping[tuple[str, str], Sequence[float]], mend: str
) -> list[Finding]:
    """One finding a node from GB/s between neighbours in a ring of nodes, by repeat.

    A slow node drags both of its pairs down, its neighbours have one fast pair each; so a node is as fast as its best
    pair. Of two nodes, the only pair tells nothing about which.
    """
    if len(nodes) == 2:
        ((_, rates),) = pairs.items()
        text = f"{median(rates):.4g} GB/s between the two (a slow one cannot be told apart from the other)"
        return [Finding(check, "all", "ok", text)]
    places = [Place(i, node, "node") for i, node in enumerate(nodes)]
    best = [max((rates for pair, rates in pairs.items() if node in pair), key=median) for node in nodes]
    return judge_rates(check, "GB/s with its neighbours", places, best, mend, who="node")


def judge_devices(places: Sequence[Place], health: Sequence[Sequence[str]], texts: Sequence[str]) -> list[Finding]:
    """One finding a node: what its ranks run on, and what is wrong with each device, [rank][fault]."""
    kinds = Counter(place.device for place in places)
    found = []
    for node, ranks in by_node(places).items():
        faults = [f"rank {rank}: {fault}" for rank in ranks for fault in health[rank]]
        text = "; ".join(dict.fromkeys(texts[rank] for rank in ranks)) + f" ({_ranks(ranks)})"
        mend = "drain the node, or leave it out with --exclude" if faults else ""
        found.append(Finding("device", node, "FAIL" if faults else "ok", "; ".join([text, *faults]), mend))
    if len(kinds) > 1:
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        mend = "ask for one kind (sbatch --constraint or --gpus-per-node=KIND:N)"
        found.append(Finding("device", "all", "FAIL", f"different devices: {listed}; the slowest sets the pace", mend))
    return found


def judge_versions(nodes: Sequence[str], versions: Sequence[Mapping[str, str]]) -> list[Finding]:
    """One finding a node, [rank]: what differs from what most nodes have."""
    names = list(dict.fromkeys(name for one in versions for name in one))
    most = {name: Counter(one.get(name, "none") for one in versions).most_common(1)[0][0] for name in names}
    found = []
    for node in dict.fromkeys(nodes):
        own = [one for where, one in zip(nodes, versions, strict=True) if where == node]
        odd = [
            f"{name} {have}, elsewhere {most[name]}"
            for name in names
            for have in dict.fromkeys(one.get(name, "none") for one in own)
            if have != most[name]
        ]
        text = "; ".join(odd) if odd else ", ".join(f"{name} {have}" for name, have in own[0].items())
        mend = "load the same environment on every node (env.sh)" if odd else ""
        found.append(Finding("versions", node, "FAIL" if odd else "ok", text, mend))
    return found


def judge_clocks(nodes: Sequence[str], seconds: Sequence[Sequence[float]]) -> list[Finding]:
    """One finding a node of each node's clock, [node][repeat], read at the same moments, give or take the network."""
    moments = [median(column) for column in zip(*seconds, strict=True)]
    found = []
    for node, row in zip(nodes, seconds, strict=True):
        skew = median(own - middle for own, middle in zip(row, moments, strict=True))
        bad = abs(skew) > SKEW_SECONDS
        text = f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the median"
        mend = "start chronyd or ntpd there: leases and logs go by the clock" if bad else ""
        found.append(Finding("clock", node, "FAIL" if bad else "ok", text, mend))
    return found


@dataclass(frozen=True)
class Disk:
    """What a node found in the shared folder."""

    error: str = ""
    seconds: float = 0.0
    """to write, fsync, rename"""
    unseen: tuple[str, ...] = ()
    """nodes whose files did not appear here"""
    free: float = 0.0
    inodes: int | None = None
    """free ones; None where the file system does not count them"""


def judge_disk(folder: str, nodes: Sequence[str], disks: Sequence[Disk], needed: float = 0.0) -> list[Finding]:
    """One finding a node; `needed`: bytes that the run will write."""
    found = []
    least = max(needed, 0.0 if needed else _LEAST_FREE_GIB * _GIB)
    for node, disk in zip(nodes, disks, strict=True):
        faults = []
        if disk.error:
            faults.append((disk.error, "make it writable on every node, or choose another folder"))
        elif disk.unseen:
            files = f"files of {', '.join(disk.unseen)} do not appear"
            faults.append((files, "take a folder on a file system that all nodes mount"))
        if not disk.error and disk.free < least:
            faults.append((f"{disk.free / _GIB:.1f} GiB free, {least / _GIB:.1f} needed", "free space"))
        if not disk.error and disk.inodes is not None and disk.inodes < _LEAST_INODES:
            faults.append((f"{disk.inodes:,} inodes free", "remove small files, or ask for a larger quota"))
        if faults:
            text, mend = "; ".join(text for text, _ in faults), "; ".join(mend for _, mend in faults)
            found.append(Finding("disk", node, "FAIL", f"{folder}: {text}", mend))
            continue
        counted = "inodes not counted" if disk.inodes is None else f"{disk.inodes:,} inodes"
        seen = "" if len(nodes) == 1 else ", seen by all nodes"
        text = f"{folder}: written, synced, renamed in {disk.seconds * 1000:.0f} ms{seen}; "
        found.append(Finding("disk", node, "ok", f"{text}{disk.free / _GIB:,.0f} GiB, {counted} free"))
    return found


def by_node(places: Sequence[Place]) -> dict[str, list[int]]:
    """The ranks of each node, nodes in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(place.node, []).append(place.rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]} to {ranks[-1]}" if ranks[-1] - ranks[0] == len(ranks) - 1 else f"{len(ranks)} ranks"
