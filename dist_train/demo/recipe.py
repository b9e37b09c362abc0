"""What the demo does, in numbers: small enough for two CPU cores and a quarter of an hour, large enough to show the
method's effect. A tenth of the steps of anything real; the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEQUENCE_LENGTH = 256
VOCAB_SIZE = 2048
LOSSES = ("kld", "tvd", "tvdpp")

TARGET_SHAPE: dict[str, Any] = {"hidden_size": 256, "layers": 3, "heads": 4, "mlp_size": 688, "max_positions": 1024}
DRAFTER_SHAPE: dict[str, Any] = {"hidden_size": 64, "layers": 1, "heads": 2, "mlp_size": 176}


@dataclass(frozen=True)
class Recipe:
    """Steps and sizes of a demo on `processes` ranks; `scale` shortens every training for a smoke test."""

    scale: float = 1.0
    processes: int = 2

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
            "deepspeed": "zero1",
        }
