"""Time and peak memory of the losses, forward and backward, against what one would write or install instead.

    python tests/benchmarks/losses.py --vocab 49152 --drafter-hidden 128 --target-hidden 576
    python tests/benchmarks/losses.py --rows 1024 4096 16384 --vocab 32000 152064

Hidden states and both heads are made, the loss is taken and differentiated to the drafter's hidden states and head
weight: ours as it is compiled, ours eager, dense torch, the same under torch.compile, and libraries; `products` are the
matrix products alone, which bound what fusing the rest can give. Memory is what the first call of this size adds to the
level before it (a small one, and where something is compiled one of this size, went before): on a CPU the rise of peak
RSS, in a process of its own for each; on CUDA the allocator's peak. Times are taken in one process, in turns, and the
least of all turns counts: what else a machine does only adds. `first` is the first call, which compiles;
TORCHINDUCTOR_CACHE_DIR keeps what it makes, so name an empty folder to see all of it. Prints a Markdown table; "no
room" where memory did not suffice, "-" where a peer has no such loss, "not installed" where its package is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.losses import NAMES, linear_divergence

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_ROOM, NOT_THERE = "no room", "not installed"
# Generalised JSD's beta of the public implementations, whose ends are the two KL divergences.
JSD_BETA = {"kld": 0.0, "rkl": 1.0, "jsd": 0.5}


@dataclass(frozen=True)
class Case:
    """One measurement: which implementation of which loss at which size."""

    path: str
    name: str
    rows: int
    vocab: int
    drafter_hidden: int
    target_hidden: int
    dtype: str
    device: str
    repeats: int


@dataclass
class Inputs:
    """Hidden states [N, D] and head weight [V, D] of the drafter, [N, E] and [V, E] of the target, labels [N]."""

    hidden: Tensor
    weight: Tensor
    target_hidden: Tensor
    target_weight: Tensor
    labels: Tensor


# -- the implementations ----------------------------------------------------------------------------------------


def fused(name: str, x: Inputs) -> Tensor:
    """The chunked head, compiled."""
    return eager(name, x, compile=True)


def eager(name: str, x: Inputs, compile: bool = False) -> Tensor:
    """The chunked head, operator by operator."""
    target = (None, None) if name == "ce" else (x.target_hidden, x.target_weight)
    return linear_divergence(name, x.hidden, x.weight, *target, labels=x.labels, compile=compile).loss


def both_logits(x: Inputs) -> tuple[Tensor, Tensor]:
    """Drafter's and target's logits, [N, V]."""
    with torch.no_grad():
        y = x.target_hidden @ x.target_weight.T
    return x.hidden @ x.weight.T, y


def dense(name: str, x: Inputs) -> Tensor:
    """The definitions in plain torch, fp32 from the logits on."""
    if name == "ce":
        return F.cross_entropy((x.hidden @ x.weight.T).float(), x.labels)
    z, y = both_logits(x)
    log_p, log_q = torch.log_softmax(z.float(), -1), torch.log_softmax(y.float(), -1)
    if name == "kld":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    if name == "rkl":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    p, q = log_p.exp(), log_q.exp()
    if name == "jsd":
        log_m = ((p + q) / 2).log()
        to_target = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        return (to_target + F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)) / 2
    if name == "lk":
        return -torch.minimum(p, q).sum(-1).log().mean()
    distance = (p - q).abs().sum(-1) / 2
    if name == "tvd":
        return distance.mean()
    mu = (p.detach() * (q > p)).sum(-1)
    return (distance / (mu * (1 - mu)).sqrt().clamp_min(1e-6)).mean()


def products(name: str, x: Inputs) -> Tensor:
    """No loss: only the matrix products that any of these must make, a block of rows at a time."""
    rows = 256 if x.hidden.device.type == "cpu" else 8192
    with torch.no_grad():
        gradient = torch.zeros_like(x.weight)
        for hidden, target in zip(x.hidden.split(rows), x.target_hidden.split(rows), strict=True):
            if name != "ce":
                target @ x.target_weight.T
            z = hidden @ x.weight.T
            z @ x.weight
            gradient.addmm_(z.T, hidden)
    return 0 * x.hidden.sum()


def trl(name: str, x: Inputs) -> Tensor | None:
    """TRL's generalised JSD of whole logits."""
    if name not in JSD_BETA:
        return None
    from trl.experimental.gkd import GKDTrainer

    z, y = both_logits(x)
    return GKDTrainer.generalized_jsd_loss(z.float(), y.float(), beta=JSD_BETA[name])


def liger(name: str, x: Inputs) -> Tensor | None:
    """Liger's chunked JSD, which compiles itself."""
    if name not in JSD_BETA:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=JSD_BETA[name])
    out = loss(x.hidden, x.weight, x.target_hidden, x.target_weight, x.labels)
    return out[0] if isinstance(out, tuple) else out


def liger_triton(name: str, x: Inputs) -> Tensor | None:
    """Liger's Triton kernels: both heads fused for JSD and cross-entropy, whole logits for TVD."""
    from liger_kernel import transformers as kernels

    if name in JSD_BETA:
        fused = kernels.LigerFusedLinearJSD(jsd_beta=JSD_BETA[name])
        return fused(x.hidden, x.weight, x.target_hidden, x.target_weight, x.labels)
    if name == "ce":
        return kernels.LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden, x.labels)
    if name == "tvd":
        z, y = both_logits(x)
        return kernels.LigerTVDLoss(reduction="batchmean")(z.float().softmax(-1), y.float().softmax(-1))
    return None


PATHS: dict[str, Callable[[str, Inputs], Tensor | None]] = {
    "fused": fused,
    "eager": eager,
    "dense": dense,
    "compiled": torch.compile(dense),
    "products": products,
    "trl": trl,
    "liger": liger,
    "liger-triton": liger_triton,
}
COMPILING = ("fused", "compiled")
PEERS_OF = {
    "cpu": ("eager", "dense", "compiled", "products", "trl", "liger"),
    "cuda": tuple(path for path in PATHS if path != "fused"),
}


# -- measurements, in processes of their own ---------------------------------------------------------------------


def memory(case: Case) -> float | str | None:
    """MiB that one call adds; None where the peer has no such loss."""
    x = make_inputs(case)
    if case.device == "cpu":
        allow_no_more_than_there_is()
    try:
        run(case, make_inputs(replace(case, rows=64, vocab=512)))  # the libraries' own code and buffers
        if case.path in COMPILING and run(case, x) is not None:
            free_what_can_be_freed(case)
        level = memory_before(case)
        return None if run(case, x) is None else (peak_memory(case) - level) / MIB
    except ImportError:
        return NOT_THERE
    except (RuntimeError, MemoryError) as error:
        return no_room(error)


def times(cases: list[Case]) -> list[tuple[float | str | None, float | str | None]]:
    """Seconds of each case, of its first call and the least of the others, which take turns."""
    x = make_inputs(cases[0])
    if cases[0].device == "cpu":
        allow_no_more_than_there_is()
    first: list[float | str | None] = [seconds(case, x) for case in cases]
    least = list(first)
    for turn in range(cases[0].repeats):
        for i, case in enumerate(cases):
            if isinstance(first[i], float):
                found = seconds(case, x)
                least[i] = found if turn == 0 or not isinstance(found, float) else min(found, float(least[i] or 0))
    return list(zip(first, least, strict=True))


def seconds(case: Case, x: Inputs) -> float | str | None:
    """Of one call; None where the peer has no such loss."""
    started = time.perf_counter()
    try:
        return None if run(case, x) is None else time.perf_counter() - started
    except ImportError:
        return NOT_THERE
    except (RuntimeError, MemoryError) as error:
        return no_room(error)


def no_room(error: Exception) -> str:
    """What is shown where memory did not suffice. Raises any other error."""
    if isinstance(error, RuntimeError) and "memory" not in str(error):  # CUDA's out-of-memory error is a RuntimeError
        raise error
    return NO_ROOM


def make_inputs(case: Case) -> Inputs:
    """Logits of a deviation of about 2 on either side."""
    g = torch.Generator(case.device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=case.device).normal_(0, scale, generator=g)

    return Inputs(
        hidden=normal(case.rows, case.drafter_hidden, 1.0).requires_grad_(),
        weight=normal(case.vocab, case.drafter_hidden, 2 * case.drafter_hidden**-0.5).requires_grad_(),
        target_hidden=normal(case.rows, case.target_hidden, 1.0),
        target_weight=normal(case.vocab, case.target_hidden, 2 * case.target_hidden**-0.5),
        labels=torch.randint(case.vocab, (case.rows,), device=case.device, generator=g),
    )


def run(case: Case, x: Inputs) -> float | None:
    """The loss, once forward and backward."""
    x.hidden.grad = x.weight.grad = None
    loss = PATHS[case.path](case.name, x)
    if loss is None:
        return None
    loss.backward()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return loss.item()


def allow_no_more_than_there_is() -> None:
    """Turns running out of memory into an error of the allocation, before the kernel ends the process."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    limit = process_memory("VmSize") + int(available.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def process_memory(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmSize, VmRSS, VmHWM (the peak of VmRSS)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def free_what_can_be_freed(case: Case) -> None:
    """As if nothing had been called yet."""
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_before(case: Case) -> int:
    """The level in bytes; from here on the peak is counted."""
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def peak_memory(case: Case) -> int:
    """The highest level since `memory_before`, in bytes."""
    return torch.cuda.max_memory_allocated() if case.device == "cuda" else process_memory("VmHWM")


# -- all of them ------------------------------------------------------------------------------------------------


def apart(cases: list[Case], option: str) -> Any:
    """`memory` or `times` of cases, in a fresh process; what came instead where that failed."""
    command = [sys.executable, __file__, option, json.dumps([asdict(case) for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:  # ended by the kernel
        return NO_ROOM
    if done.returncode > 0:
        return done.stderr.strip().splitlines()[-1][:60]
    return json.loads(done.stdout.splitlines()[-1])


def held_by(cases: list[Case]) -> list[float | str | None]:
    """`memory` of each, in one process."""
    found = apart(cases, "--memory")
    return found if isinstance(found, list) else [found] * len(cases)


def ratio(ours: float | str | None, peer: float | str | None) -> str:
    """Ours over the peer's."""
    return f"{ours / peer:.3f}" if isinstance(ours, float) and isinstance(peer, float) else ""


def shown(value: float | str | None, form: str) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, float) else str(value)


def main() -> None:
    """Reads the sizes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--paths", nargs="+", choices=[path for path in PATHS if path != "fused"])
    parser.add_argument("--rows", nargs="+", type=int, default=[4096])
    parser.add_argument("--vocab", nargs="+", type=int, default=[32_000])
    parser.add_argument("--drafter-hidden", type=int, default=1024)
    parser.add_argument("--target-hidden", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=PEERS_OF, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps([memory(Case(**case)) for case in json.loads(arguments.memory)]))
        return
    if arguments.times:
        print(json.dumps(times([Case(**case) for case in json.loads(arguments.times)])))
        return

    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}, {arguments.dtype}, drafter {arguments.drafter_hidden} wide, ", end="")
    print(f"target {arguments.target_hidden} wide; ratios are of the compiled loss over each\n")
    print("| N | V | loss | path | first s | ms | MiB | time ratio | memory ratio |\n|--|--|--|--|--|--|--|--|--|")
    paths = ("fused", *(arguments.paths or PEERS_OF[arguments.device]))
    for vocab in arguments.vocab:
        for rows in arguments.rows:
            for name in arguments.names:
                sizes = (rows, vocab, arguments.drafter_hidden, arguments.target_hidden)
                cases = [
                    Case(path, name, *sizes, arguments.dtype, arguments.device, arguments.repeats) for path in paths
                ]
                found = apart(cases, "--times")
                taken = found if isinstance(found, list) else [(found, found)] * len(cases)
                # CUDA's allocator counts to the byte; what a process on a CPU has touched once it may keep.
                groups = [cases] if arguments.device == "cuda" else [[case] for case in cases]
                held = [mib for group in groups for mib in held_by(group)]
                for path, (first, least), mib in zip(paths, taken, held, strict=True):
                    cells = (
                        rows,
                        vocab,
                        name,
                        path,
                        shown(first, ".1f"),
                        shown(least and 1e3 * least, ".1f"),
                        shown(mib, ".0f"),
                    )
                    ratios = (ratio(taken[0][1], least), ratio(held[0], mib))
                    print(f"| {' | '.join(map(str, (*cells, *ratios)))} |", flush=True)


if __name__ == "__main__":
    main()
