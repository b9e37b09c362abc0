"""Figures of one rank: its device, its arithmetic, its links, its clock and its disk."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards import DataError
from data_shards.files import write_atomically
from dist_train.doctor.judge import Disk
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.version import __version__
from dist_train.runtime.world import cores

REPEATS = 7
_REPEAT_SECONDS = 0.1  # of multiplying: longer than what interrupts a process
_SIDE = {"cpu": 1024, "cuda": 8192}
_MESSAGE = {"cpu": 16 << 20, "cuda": 256 << 20}
_APPEAR_SECONDS = 30.0  # for a file of another node: network file systems remember what was not there
_TOOL_SECONDS = 20.0
_GIB = 2**30


def versions(device: torch.device) -> dict[str, str]:
    """What must be equal on all nodes."""
    found = {"python": platform.python_version(), "dist-train": __version__}
    found |= {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    if device.type == "cuda":
        found["CUDA"] = torch.version.cuda or "none"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = next(iter(_nvidia_smi("driver_version", device)), "unknown")
    return found


def device_name(device: torch.device) -> str:
    """The GPU's, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_text(device: torch.device, free_gib: float) -> str:
    """What a rank runs on and how much of its memory is free."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / _GIB
        return f"{device_name(device)}, {free_gib:.0f} of {whole:.0f} GiB free"
    return f"no GPU: {cores()} cores, {free_gib:.1f} GiB free a rank"


def device_faults(device: torch.device) -> list[str]:
    """What nvidia-smi and the kernel know against this rank's GPU; nothing on a CPU."""
    if device.type != "cuda":
        return []
    fields = {
        "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since boot",
        "remapped_rows.failure": "memory rows that could not be remapped",
        "remapped_rows.pending": "memory rows to be remapped at the next reset",
    }
    return gpu_faults(fields, _nvidia_smi(",".join(fields), device)) + xid_faults(_output(["dmesg"]))


def gpu_faults(fields: dict[str, str], values: Sequence[str]) -> list[str]:
    """The counters that are not zero; nvidia-smi writes numbers, Yes or No, or [N/A] where there is no such counter."""
    return [
        f"{meaning} ({value})"
        for meaning, value in zip(fields.values(), values, strict=False)
        if value.lower() not in ("0", "no") and not value.startswith("[")
    ]


def xid_faults(kernel_log: str) -> list[str]:
    """The driver's error reports (Xid) in the kernel's log: how many, and the last."""
    reports = [line for line in kernel_log.splitlines() if "NVRM: Xid" in line]
    return [f"{len(reports)} Xid reports, the last: {reports[-1].split('NVRM: ')[1][:100]}"] if reports else []


def _nvidia_smi(fields: str, device: torch.device) -> list[str]:
    """The values of `fields` for one GPU, by its UUID: CUDA_VISIBLE_DEVICES does not change what nvidia-smi counts."""
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return [value.strip() for value in _output(command).split(",") if value.strip()]


def _output(command: list[str]) -> str:
    """What a tool prints; nothing where it is absent, refuses or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# -- arithmetic -------------------------------------------------------------------------------------------------


def gemm_rates(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> list[float]:
    """TFLOP/s of square matrix products, by repeat: 1,024 wide on a CPU, 8,192 on a GPU."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    _timed(multiply, device)
    each = _timed(multiply, device)
    count = max(1, round(_REPEAT_SECONDS / each))
    flops = 2 * side**3 * count / 1e12

    def many() -> None:
        for _ in range(count):
            multiply()

    return [flops / _timed(many, device) for _ in range(repeats)]


def operator_faults(device: torch.device) -> list[str]:
    """What the device calculates wrongly: the chunked loss, attention and AdamW against a CPU in float64."""
    from dist_train.losses import divergence, linear_divergence

    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(64, 32, generator=generator).to(device) for _ in range(3))
    faults = []
    exact = [part.double().cpu() for part in (hidden, weight, other)]
    found = linear_divergence("tvd", hidden, weight, other, weight, chunk_size=16).loss
    faults += _differs("linear_divergence", found, divergence("tvd", exact[0] @ exact[1].T, exact[2] @ exact[1].T).loss)
    heads = [part.view(1, 4, 16, 32) for part in (hidden, weight, other)]
    faults += _differs("attention", _attend(heads), _attend([head.double().cpu() for head in heads]))
    faults += _differs("fused AdamW", _adamw_step(hidden, other), _adamw_step(exact[0], exact[2]))
    return faults


def _attend(heads: list[torch.Tensor]) -> torch.Tensor:
    query, key, value = heads
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _adamw_step(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    torch.optim.AdamW([parameter], lr=1e-2, fused=parameter.dtype != torch.float64).step()
    return parameter.detach()


def _differs(what: str, found: torch.Tensor, reference: torch.Tensor) -> list[str]:
    gap = float((found.double().cpu() - reference).abs().max())
    # TensorFloat-32 is the coarsest that a library may have turned on.
    return [] if gap <= 1e-2 else [f"{what} is off by {gap:.2g}"]


# -- links ------------------------------------------------------------------------------------------------------


def all_reduce_rates(runtime: Runtime, group: Any, repeats: int = REPEATS) -> list[float]:
    """GB/s of an all-reduce in `group`, by repeat: bytes of one rank's tensor over seconds (algorithm bandwidth)."""
    size = _MESSAGE[runtime.device.type]
    tensor = torch.zeros(size // 4, device=runtime.device)

    def reduce() -> None:
        dist.all_reduce(tensor, group=group)

    _timed(reduce, runtime.device)
    rates = []
    for _ in range(repeats):
        dist.barrier(group)
        rates.append(size / _timed(reduce, runtime.device) / 1e9)
    return rates


def clock_readings(runtime: Runtime, repeats: int = REPEATS) -> list[float]:
    """Unix time at moments that are the same on all ranks, as far as leaving a barrier is."""
    found = []
    for _ in range(repeats):
        runtime.barrier()
        found.append(time.time())
    return found


def _timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds that `action` takes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


# -- disk -------------------------------------------------------------------------------------------------------


def try_disk(folder: Path, node: str, nodes: Sequence[str], runtime: Runtime, *, leads: bool) -> Disk:
    """Write, sync and rename a file in the shared folder, and wait for those of the other nodes. Collective."""
    trial = folder / runtime.first(f".doctor-{uuid.uuid4().hex[:12]}")
    seconds, error = _write(trial, node) if leads else (0.0, "")
    runtime.barrier()  # what is written by now must appear
    found = _look(trial, nodes, seconds, error) if leads else Disk()
    runtime.barrier()
    if leads:  # each its own, if the folder is not shared
        shutil.rmtree(trial, ignore_errors=True)
    return found


def _write(trial: Path, node: str) -> tuple[float, str]:
    """Seconds of writing, or what was in the way."""
    try:
        trial.mkdir(exist_ok=True)
        began = time.perf_counter()
        write_atomically(trial / node, [os.urandom(1 << 20)])
        return time.perf_counter() - began, ""
    except OSError as failure:
        return 0.0, failure.strerror or str(failure)
    except DataError as failure:
        return 0.0, str(failure)


def _look(trial: Path, nodes: Sequence[str], seconds: float, error: str) -> Disk:
    """Whose files appear, and what is free."""
    if error:
        return Disk(error=error)
    limit = time.monotonic() + _APPEAR_SECONDS
    while (unseen := sorted(set(nodes) - set(os.listdir(trial)))) and time.monotonic() < limit:  # noqa: PTH208
        time.sleep(0.1)
    room = os.statvfs(trial)
    inodes = room.f_favail if room.f_files else None
    return Disk("", seconds, tuple(unseen), room.f_bavail * room.f_frsize, inodes)
