"""What the demo does, in numbers: small enough for two CPU cores and a quarter of an hour, large enough to show the
method's effect. A tenth of the steps of anything real; the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 256
VOCAB_SIZE = 2048
LOSSES = ("kld", "tvd", "tvdpp")

TARGET_SHAPE: dict[str, Any] = {"hidden_size": 256, "layers": 3, "heads": 4, "mlp_size": 688, "max_positions": 1024}
DRAFTER_SHAPE: dict[str, Any] = {"hidden_size": 64, "layers": 1, "heads": 2, "mlp_size": 176, "max_positions": 1024}

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Recipe:
    """Steps and sizes of a demo on `processes` ranks; `scale` shortens every training for a smoke test."""

    scale: float = 1.0
    processes: int = 2

    @property
    def precision(self) -> str:
        """bf16 where the hardware multiplies it; elsewhere it would be slower than fp32."""
        import torch

        if torch.cuda.is_available():
            return "bf16"
        flags = _CPUINFO.read_text() if _CPUINFO.exists() else ""
        return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"

    def steps(self, full: int) -> int:
        """Optimizer steps of a training that has `full` of them at scale 1."""
        return max(4, round(full * self.scale))

    def count(self, full: int, least: int = 8) -> int:
        """Seeds or prompts, `full` at scale 1."""
        return max(least, round(full * self.scale))

    def target(self) -> dict[str, Any]:
        """The `train` section of the target's training."""
        return self._train(self.steps(400), 3e-3)

    def drafter(self) -> dict[str, Any]:
        """The `train` section of the drafter's pretraining."""
        return self._train(self.steps(600), 6e-3)

    def distillation(self) -> dict[str, Any]:
        """The `train` section of one distillation."""
        return self._train(self.steps(220), 3e-3)

    def _train(self, steps: int, learning_rate: float) -> dict[str, Any]:
        micro_batch = max(1, 16 // self.processes)
        return {
            "steps": steps,
            "global_batch": micro_batch * self.processes,
            "micro_batch": micro_batch,
            "learning_rate": learning_rate,
            "warmup_steps": steps // 20,
            "precision": self.precision,
            "deepspeed": "zero1",
        }
