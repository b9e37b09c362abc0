"""What the errors of GPUs, NCCL and collectives mean, by their own words: a node's fault, the run's, or a lost rank.

The words are CUDA's (cudaGetErrorString), NCCL's (ncclGetErrorString and its last error), gloo's, the driver's (Xid)
and SLURM's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

FaultKind = Literal["node fault", "error", "lost peer"]

# A node's own: the same job runs elsewhere.
_NODE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "unspecified launch failure",
    "hardware stack error",
    "fallen off the bus",
    "GPU is lost",
    "Unable to determine the device handle",
    "CUDA-capable device(s) is/are busy or unavailable",
    "system not yet initialized",  # the fabric manager of an NVSwitch node
)
# The run's own: it would happen again anywhere.
_RUN = (
    "out of memory",
    "oom_kill",
    "oom-kill",
    "can't allocate memory",
    "device-side assert",
    "illegal memory access",
    "invalid device ordinal",
    "no kernel image is available",
    "ncclInvalidUsage",
    "ncclInvalidArgument",
    "Duplicate GPU detected",
)
_PEER = (
    "ncclRemoteError",
    "ncclSystemError",
    "ncclInternalError",
    "NCCL communicator was aborted",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "Broken pipe",
    "failed to recv, got 0 bytes",
)
_FIRST = re.compile("|".join(f"(?P<{kind}>{'|'.join(map(re.escape, signs))})" for kind, signs in
                             (("node", _NODE), ("run", _RUN))), re.IGNORECASE)  # fmt: skip

# How a line begins that says it of itself; what quotes such words, as a prompt or a key may, begins otherwise.
_SPEAKER = re.compile(
    r"(\[rank\d+\]:? *)?"
    r"([\w.]+(Error|Exception): |\s*what\(\): |Cuda failure |nccl[A-Z]\w+: |Duplicate GPU detected|"
    r"\S+:\d+:\d+ \[\d+\] .*NCCL WARN |(\[[ \d.]+\] )?NVRM: Xid |(slurmstepd|srun)(-\S+)?: error: )"
)
_TOLD = re.compile(r"dist-train [\w-]+: node fault: (?P<node>\S+), GPU (?P<gpu>\S+): (?P<words>.*)")
_TASK = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? ")


class Fault(NamedTuple):
    """What a log tells: `node` and `gpu` where they are named, else empty."""

    kind: FaultKind
    words: str
    node: str = ""
    gpu: str = ""


def fault_kind(text: str) -> FaultKind | None:
    """What an exception's text means; None where it says nothing of these."""
    if match := _FIRST.search(text):
        return "node fault" if match["node"] else "error"
    return "lost peer" if any(sign in text for sign in _PEER) else None


def node_fault_line(node: str, gpu: str, error: Exception) -> str:
    """The one line by which a rank tells a fault of its node, and `first_fault` knows it again."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"node fault: {node}, GPU {gpu}: {words}; the same command goes on from what is committed"


def first_fault(lines: Sequence[str]) -> Fault | None:
    """The first line of a log that tells a fault of a node or of the run; lost ranks are what follows from one."""
    for line in lines:
        if told := _TOLD.match(line):
            return Fault("node fault", told["words"], told["node"], told["gpu"])
        if _SPEAKER.match(line) and (kind := fault_kind(line)) in ("node fault", "error"):
            tasks = (_TASK.match(other) for other in lines)
            node = next((match["node"] for match in tasks if match), "")
            return Fault(kind, line.strip(), node)
    return None
