"""What can be known to be wrong before a job is queued: of the cluster, of the disk, of the GPUs' memory.

Only sinfo is asked; where it is not there, or does not answer, sbatch's own refusal remains.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import SlurmSection
from dist_train.errors import UserError

_UNUSABLE = ("down", "drain", "fail", "maint", "power", "unk", "inval")
# GiB of the largest model of each kind, by the name that sites give it in gres: what does not fit there fits nowhere.
_GPU_GIB = {"b200": 180, "h200": 141, "h100": 80, "a100": 80, "l40s": 48, "a40": 48, "v100": 32, "a10": 24, "t4": 16}
_LEAST_INODES = 10_000
_GIB = 2**30


@dataclass(frozen=True)
class Node:
    """A node as sinfo shows it."""

    name: str
    partition: str
    gpus: int
    gpu_kind: str
    usable: bool
    limit: str


def find_nodes() -> list[Node] | None:
    """Every node once for each of its partitions; None where sinfo does not answer."""
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--Node", "--format=%N|%P|%G|%T|%l"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None
    nodes = []
    for line in done.stdout.splitlines():
        name, partition, gres, state, limit = line.split("|")
        gpus = re.findall(r"gpu:(?:([\w.-]+):)?(\d+)", gres)
        usable = not state.endswith("*") and not state.startswith(_UNUSABLE)
        kind = gpus[0][0] if gpus else ""
        nodes.append(Node(name, partition, sum(int(count) for _, count in gpus), kind.lower(), usable, limit))
    return nodes


def check_cluster(resources: SlurmSection, nodes: Sequence[Node]) -> list[str]:
    """Warnings of what must be waited for. Raises UserError on what this cluster does not have."""
    known = sorted({node.partition.rstrip("*") for node in nodes})
    default = [node.partition.rstrip("*") for node in nodes if node.partition.endswith("*")]
    wanted = resources.partition.split(",") if resources.partition else default[:1] or known
    for partition in wanted:
        if partition not in known:
            raise UserError(f"no partition {partition} here; there are {', '.join(known)}")
    within = [node for node in nodes if node.partition.rstrip("*") in wanted]
    where = f"partition {', '.join(wanted)}"
    longest = [_minutes(node.limit) for node in within]
    asked = _minutes(resources.time) if resources.time else None
    if asked is not None and None not in longest and asked > max(limit for limit in longest if limit is not None):
        raise UserError(f"--time {resources.time} is more than {where} allows ({within[0].limit})")
    gpus = resources.gpus_per_node or 0
    fitting = {node.name: node for node in within if node.gpus >= gpus}
    if len(fitting) < resources.nodes:
        most = max((node.gpus for node in within), default=0)
        total = len({node.name for node in within})
        raise UserError(
            f"{resources.nodes} nodes with {gpus} GPUs each are asked for; "
            f"{where} has {total} nodes with at most {most}"
        )
    usable = sum(node.usable for node in fitting.values())
    if usable < resources.nodes:
        return [f"only {usable} of the {resources.nodes} nodes asked for are usable now (sinfo); the job will wait"]
    return []


def _minutes(limit: str) -> float | None:
    """Of sbatch's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None where there is no limit or it is not known."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (days or "0", *parts)) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


def gpu_gib(resources: SlurmSection, nodes: Sequence[Node]) -> float | None:
    """Memory of a GPU that the job may get, the largest; None where the kinds are not named or not known."""
    names = resources.partition.split(",") if resources.partition else []
    kinds = {
        node.gpu_kind
        for node in nodes
        if node.gpus and (node.partition.rstrip("*") in names if names else node.partition.endswith("*"))
    }
    found = [next((gib for name, gib in _GPU_GIB.items() if name in kind), None) for kind in kinds]
    return None if not found or None in found else float(max(gib for gib in found if gib is not None))


def check_disk(folder: Path, needed_bytes: float) -> list[str]:
    """Warnings of a disk that gets full. Raises UserError when `needed_bytes` are not free where `folder` will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / _GIB:.1f} GiB free, checkpoints will take {needed_bytes / _GIB:.1f}; choose another "
            "run.dir, or a smaller checkpoint.keep"
        )
    system = os.statvfs(place)
    if system.f_files and system.f_favail < _LEAST_INODES:  # some file systems do not count them
        return [f"{folder}: only {system.f_favail:,} more files can be made there (df -i)"]
    return []
