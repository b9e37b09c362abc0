"""What a GPU and its links are sold for, and how much of that a stage is assumed to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device by its vendor's data sheet: operations, bytes and bytes a second."""

    name: str
    peak_flops: Mapping[str, float]
    """by precision, dense"""
    memory: float
    memory_bandwidth: float
    nvlink: float
    """to the other GPUs of its node, in each direction"""
    network: float
    """of the network adapter that goes with each GPU, in each direction"""

    @property
    def fast_precision(self) -> str:
        """What `precision: auto` becomes on it."""
        return max(self.peak_flops, key=lambda precision: self.peak_flops[precision])


GPUS = {
    "h100": Gpu("H100 SXM", {"bf16": 989e12, "fp32": 67e12}, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 SXM", {"bf16": 989e12, "fp32": 67e12}, 141e9, 4.8e12, 450e9, 50e9),
    "a100": Gpu("A100 SXM 80 GB", {"bf16": 312e12, "fp32": 19.5e12}, 80e9, 2.0e12, 300e9, 25e9),
}
"""NVLink 4 and 3; one adapter of 400 Gb/s (H100, H200) or 200 Gb/s (A100) a GPU, as in DGX systems."""


@dataclass(frozen=True)
class Machine:
    """So many GPUs of one kind, on nodes of `per_node`."""

    gpu: Gpu
    gpus: int
    per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise UserError(f"{self.gpus} GPUs on nodes of {self.per_node}: there must be at least 1 of each")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise UserError(f"--gpus {self.gpus} does not fill nodes of {self.per_node}; change --gpus-per-node")

    @property
    def nodes(self) -> int:
        """Nodes that hold the GPUs."""
        return -(-self.gpus // self.per_node)

    def bus_bandwidth(self, ranks: int) -> float:
        """Bytes a second that each of `ranks` neighbouring GPUs sends and receives in a ring.

        Beyond a node the collectives run as many rings as a node has adapters, and each crosses at another one; so all
        adapters of a node together bound every rank, if NVLink does not (Patarasuk and Yuan 2009; NCCL's busbw).
        """
        if ranks <= self.per_node:
            return self.gpu.nvlink
        return min(self.gpu.nvlink, self.gpu.network * self.per_node)


@dataclass(frozen=True)
class Assumptions:
    """Shares of what is sold that are reached. Not measured on GPUs: replace them by what your runs report."""

    mfu: float = 0.20
    """of the peak, by the drafter's passes: a small model, whose kernels are short"""
    target_mfu: float = 0.40
    """of the peak, by the target's forward pass"""
    links: float = 0.80
    """of a link's bandwidth, by collectives"""
    memory_bandwidth: float = 0.60
    """of the memory's bandwidth, while a target decodes"""
    seconds_a_layer: float = 0.8e-3
    """least time of a decoder layer in transformers' generation: its kernels are launched one by one from Python"""
    text_bytes_a_token: float = 4.0
    """of English, with a vocabulary of 32,000"""

    def __post_init__(self) -> None:
        for name in ("mfu", "target_mfu", "links", "memory_bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: a share, above 0 and at most 1")
