"""All checks one after the other, on every rank; rank 0 prints the table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dist_train.config import TrainConfig
from dist_train.doctor import inputs, judge, measure
from dist_train.doctor.findings import Finding, render
from dist_train.doctor.judge import Place
from dist_train.doctor.roll_call import AbsentError, assembled, deadline
from dist_train.errors import UserError
from dist_train.runtime.faults import fault_kind
from dist_train.runtime.process_group import Runtime, started
from dist_train.runtime.world import find_world, node_name
from dist_train.train.memory import available_gib

_SLOW_DEVICE = (
    "look at clocks and temperature (nvidia-smi -q -d CLOCK,PERFORMANCE) and for other processes, or --exclude"
)
_SLOW_LINK = "look at nvidia-smi topo -m, ibstat and NCCL_SOCKET_IFNAME, or --exclude the node"
_STUCK = "is a rank gone? On GPUs NCCL_DEBUG=INFO tells which link"


def examine(module: str | None, config: Any, folder: Path | None, patience: float) -> int:
    """Check this machine, and `config` of the stage `module` if there is one. Returns 0 if all is well, else 1.

    Ends within `patience` seconds of the check that does not: no rank waits forever for another.
    """
    world = find_world()
    try:
        with assembled(world, patience), started() as runtime:
            return _Examination(runtime, patience).run(module, config, folder)
    except AbsentError as error:
        if error.tells:
            print(f"FAIL  ranks  {error}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        if fault_kind(str(error)) != "lost peer":
            raise
        print(f"FAIL  ranks  rank {world.rank}: another rank ended in the middle; see its output", file=sys.stderr)
    return 1


_ROUNDS = 4  # of a measurement that names a slow rank


class _Examination:
    """The checks of one run of the doctor. Every method is collective."""

    def __init__(self, runtime: Runtime, patience: float) -> None:
        self._runtime, self._patience, self._bad = runtime, patience, 0
        self._node_width = 4

    def run(self, module: str | None, config: Any, folder: Path | None) -> int:
        runtime = self._runtime
        with self._within("devices"):
            self._places = self._locate()
            self._devices()
        self._nodes = judge.by_node(self._places)
        self._leads = self._nodes[self._places[runtime.rank].node][0] == runtime.rank
        with self._within("arithmetic"):
            self._arithmetic()
        if runtime.world_size > 1:
            with self._within("links"):
                self._links()
        if len(self._nodes) > 1:
            with self._within("clock"):
                clocks = runtime.gather(measure.clock_readings(runtime))
            self._show(judge.judge_clocks(list(self._nodes), [clocks[ranks[0]] for ranks in self._nodes.values()]))
        with self._within("disk"):
            self._disk(folder or _folder_of(config), _needed(config))
        with self._within("slurm"):
            self._show(runtime.first(inputs.slurm_findings() if runtime.is_first else None))
        if module is not None:
            with self._within("inputs"):
                self._inputs(importlib.import_module(module), config)
        if runtime.is_first:
            print(f"{self._bad} to mend" if self._bad else "all well", flush=True)
        return 1 if self._bad else 0

    def _within(self, what: str) -> Any:
        return deadline(what, self._patience, self._runtime.rank, _STUCK)

    def _show(self, findings: Sequence[Finding]) -> None:
        """Every rank judges the same tables, so that all end with one code; the first prints."""
        for finding in findings:
            self._bad += finding.is_bad
            if self._runtime.is_first:
                print(render(finding, self._node_width), flush=True)

    def _settled(self, measured: Callable[[], list[float]], places: Sequence[Place]) -> list[list[float]]:
        """Rates [rank][repeat]; measured again while a rank seems slow, so that a passing disturbance names nobody."""
        rates: list[list[float]] = [[] for _ in range(self._runtime.world_size)]
        for _ in range(_ROUNDS):
            rates = [row + new for row, new in zip(rates, self._runtime.gather(measured()), strict=True)]
            if not judge.slow_ranks(places, [rates[place.rank] for place in places]):
                break
        return rates

    def _leaders(self, found: Sequence[Any]) -> list[Any]:
        """What the first rank of each node found, of what all did."""
        return [found[ranks[0]] for ranks in self._nodes.values()]

    def _locate(self) -> list[Place]:
        runtime = self._runtime
        place = Place(runtime.rank, node_name(), measure.device_name(runtime.device))
        places: list[Place] = runtime.gather(place)
        self._node_width = max(len(place.node) for place in places)
        nodes = len({place.node for place in places})
        text = f"{runtime.world_size} started by {runtime.world.launcher}, {nodes} node{'s' if nodes > 1 else ''}"
        self._show([Finding("ranks", "all", "ok", text)])
        return places

    def _devices(self) -> None:
        runtime = self._runtime
        free = available_gib(runtime)
        self._free: list[float] = runtime.gather(free)
        rows = runtime.gather((measure.device_faults(runtime.device), measure.device_text(runtime.device, free)))
        self._show(judge.judge_devices(self._places, [row[0] for row in rows], [row[1] for row in rows]))
        names = [place.node for place in self._places]
        self._show(judge.judge_versions(names, runtime.gather(measure.versions(runtime.device))))

    def _arithmetic(self) -> None:
        runtime = self._runtime
        kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if runtime.device.type == "cuda" else {})
        for kind, dtype in kinds.items():
            runtime.barrier()
            rates = self._settled(partial(measure.gemm_rates, runtime.device, dtype), self._places)
            self._show(judge.judge_rates(f"gemm {kind}", "TFLOP/s", self._places, rates, _SLOW_DEVICE))
        faults: list[list[str]] = runtime.gather(measure.operator_faults(runtime.device))
        for node, ranks in self._nodes.items():
            wrong = [f"rank {rank}: {fault}" for rank in ranks for fault in faults[rank]]
            text = "; ".join(wrong) or "chunked loss, attention, fused AdamW as a float64 reference"
            mend = "take another torch, or leave the node out with --exclude" if wrong else ""
            self._show([Finding("operators", node, "FAIL" if wrong else "ok", text, mend)])

    def _links(self) -> None:
        """All-reduces within each node at once, then between neighbouring nodes in rounds, then of all ranks."""
        runtime = self._runtime
        mine = self._places[runtime.rank].node
        groups = {node: dist.new_group(ranks) for node, ranks in self._nodes.items() if len(ranks) > 1}
        within = [place for place in self._places if place.node in groups]
        if within:
            own = groups.get(mine)
            rates = self._settled(lambda: measure.all_reduce_rates(runtime, own) if own else [], within)
            rows = [rates[place.rank] for place in within]
            self._show(judge.judge_rates("links, node", "GB/s all-reduced", within, rows, _SLOW_LINK))
        if len(self._nodes) == 1:
            return
        found: dict[tuple[str, str], list[float]] = {}
        for pairs in rounds(list(self._nodes)):
            made = {pair: dist.new_group(sorted(self._nodes[pair[0]] + self._nodes[pair[1]])) for pair in pairs}
            pair_of_mine = next((pair for pair in pairs if mine in pair), None)
            rates = runtime.gather(measure.all_reduce_rates(runtime, made[pair_of_mine]) if pair_of_mine else [])
            found |= {pair: rates[self._nodes[pair[0]][0]] for pair in pairs}
        self._show(judge.judge_pairs("links, between", list(self._nodes), found, _SLOW_LINK))
        rates = runtime.gather(measure.all_reduce_rates(runtime, dist.group.WORLD))
        ranks = runtime.world_size
        rate = median([median(row) for row in rates])
        text = f"{rate:.4g} GB/s all-reduced by {ranks} ranks: bytes of a tensor over seconds; "
        text += f"{rate * 2 * (ranks - 1) / ranks:.4g} GB/s through each rank"
        self._show([Finding("links, all", "all", "ok", text)])

    def _disk(self, folder: Path, needed: float) -> None:
        nodes, mine = list(self._nodes), self._places[self._runtime.rank].node
        disk = measure.try_disk(folder, mine, nodes, self._runtime, leads=self._leads)
        self._show(judge.judge_disk(str(folder), nodes, self._leaders(self._runtime.gather(disk)), needed))

    def _inputs(self, module: Any, config: Any) -> None:
        runtime, mine = self._runtime, self._places[self._runtime.rank].node
        found = runtime.gather(inputs.input_findings(module, config, mine) if self._leads else [])
        self._show(inputs.together(self._leaders(found)))
        if isinstance(config, TrainConfig):
            self._show(
                [runtime.first(inputs.memory_finding(config, runtime, self._free) if runtime.is_first else None)]
            )


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The neighbours of a ring of nodes, in rounds in which no node is in two pairs; each node is in two in all."""
    if len(nodes) == 2:
        return [[(nodes[0], nodes[1])]]
    ring = [(nodes[i], nodes[(i + 1) % len(nodes)]) for i in range(len(nodes))]
    even = [pair for i, pair in enumerate(ring) if i % 2 == 0 and i + 1 < len(nodes)]
    odd = [pair for i, pair in enumerate(ring) if i % 2 == 1]
    closing = [pair for pair in ring if pair not in even and pair not in odd]
    return [pairs for pairs in (even, odd, closing) if pairs]


def _folder_of(config: Any) -> Path:
    """Where a stage writes: its run folder or output, or the nearest folder above that is there."""
    folder = config.run.dir if isinstance(config, TrainConfig) else getattr(config, "out", None)
    if folder is None:
        return Path.cwd()
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _needed(config: Any) -> float:
    """Bytes of the checkpoints that a training keeps; 0 where that is not known."""
    if not isinstance(config, TrainConfig):
        return 0.0
    from dist_train.train.stage import checkpoints_bytes

    try:
        return checkpoints_bytes(config)
    except UserError:
        return 0.0  # told among the inputs
