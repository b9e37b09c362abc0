"""What the demo does, in numbers: small enough for two CPU cores and a quarter of an hour, large enough to show the
method's effect. A tenth of the steps of anything real; the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEQUENCE_LENGTH = 256
VOCAB_SIZE = 2048
LOSSES = ("kld", "tvd", "tvdpp")

TARGET_SHAPE = {"hidden_size": 256, "layers": 3, "heads": 4, "mlp_size": 688, "max_positions": 1024}
DRAFTER_SHAPE = {"hidden_size": 64, "layers": 1, "heads": 2, "mlp_size": 176, "max_positions": 1024}


@dataclass(frozen=True)
class Recipe:
    """Steps and sizes of a demo; `scale` shortens every training for a smoke test."""

    scale: float = 1.0

    def steps(self, full: int) -> int:
        """Optimizer steps of a training that has `full` of them at scale 1."""
        return max(4, round(full * self.scale))

    def count(self, full: int) -> int:
        """Seeds or prompts, `full` at scale 1."""
        return max(8, round(full * self.scale))

    def target(self) -> dict[str, Any]:
        """The `train` section of the target's training."""
        return self._train(self.steps(600), 3e-3)

    def drafter(self) -> dict[str, Any]:
        """The `train` section of the drafter's pretraining."""
        return self._train(self.steps(900), 6e-3)

    def distillation(self) -> dict[str, Any]:
        """The `train` section of one distillation."""
        return self._train(self.steps(350), 3e-3)

    def _train(self, steps: int, learning_rate: float) -> dict[str, Any]:
        return {
            "steps": steps,
            "global_batch": 16,
            "micro_batch": 8,
            "learning_rate": learning_rate,
            "warmup_steps": steps // 20,
            "precision": "bf16",
            "deepspeed": "zero1",
        }
