"""What this process's device is fast at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_CPUINFO = Path("/proc/cpuinfo")
_MULTIPLIES_BF16 = {"avx512_bf16", "amx_bf16"}


def fast_precision() -> Literal["bf16", "fp32"]:
    """bf16 where the hardware multiplies it; elsewhere it is emulated, about four times slower than fp32 on a CPU."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = set(_CPUINFO.read_text().split()) if _CPUINFO.exists() else set()
    return "bf16" if flags & _MULTIPLIES_BF16 else "fp32"
