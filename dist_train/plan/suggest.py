"""`dist-train plan --suggest`: which width and depth of a drafter can pay, from a target's own hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dist_train.config import TrainConfig
from dist_train.errors import UserError
from dist_train.models.drafter import drafter_config
from dist_train.models.load import read_target_config
from dist_train.models.projection import measure, project_head, reach
from dist_train.models.sizes import bytes_read, skeleton
from dist_train.models.target import Target
from dist_train.reports.tables import markdown
from dist_train.runtime.process_group import Runtime
from dist_train.train.beginning import target_states

_DEPTHS = (1, 2, 4)
_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the target's width
_MEASURED = 4096  # states that the heads are tried on
_MOST_DRAFTS = 8


@dataclass(frozen=True)
class Reach:
    """What a drafter's head of `width` dimensions can reach at the best, and what a pass costs by depth."""

    width: int
    acceptance: float
    equal: float
    costs: dict[int, float]
    """layers to bytes read by a draft over those read by the target"""


def block_efficiency(acceptance: float, gamma: int) -> float:
    """Expected tokens a call where each draft is accepted with the same chance (Leviathan et al., 2023, eq. 1)."""
    return sum(acceptance**k for k in range(gamma + 1))


def best_speed_up(acceptance: float, cost: float) -> tuple[int, float]:
    """The number of drafts with the largest memory-bound speed-up tau / (c gamma + 1), and that speed-up."""
    found = ((gamma, block_efficiency(acceptance, gamma) / (cost * gamma + 1)) for gamma in range(_MOST_DRAFTS + 1))
    return max(found, key=lambda one: one[1])


def suggest(config: TrainConfig, runtime: Runtime) -> list[Reach]:
    """The reach of several widths up to the target's. Raises UserError where there is no target or too little data.

    Heads are made of one half of the states at trained positions of the run's first samples, and tried on the others.
    """
    if config.target is None:
        raise UserError("--suggest looks at a target; set target.path")
    target = Target(config.target, runtime)
    wide = target.config.hidden_size
    states = torch.cat(target_states(config, target, runtime, 32 * wide))
    half = len(states) // 2
    if half < wide:
        raise UserError(f"--suggest needs more than {2 * wide} trained positions, data.sources have {len(states)}")
    geometry, tried = measure(target.head, [states[:half]]), states[half:][-_MEASURED:]
    shape = read_target_config(config.target)
    target_bytes = bytes_read(skeleton(shape))
    found = []
    for width in sorted({max(32, round(share * wide / 32) * 32) for share in _SHARES} | {wide}):
        if width > wide:
            continue
        costs = {layers: _bytes(config, shape, width, layers) / target_bytes for layers in _DEPTHS}
        found.append(Reach(width, *reach(target.head, project_head(target.head, geometry, width), tried), costs))
    return found


def _bytes(config: TrainConfig, target: Any, width: int, layers: int) -> int:
    """Bytes that a pass of a drafter of this width and depth reads, beside a target of the configuration `target`."""
    heads = next(n for n in (8, 6, 4, 3, 2, 1) if width % (2 * n) == 0 and (width // n >= 32 or n == 1))
    sizes = {"hidden_size": width, "layers": layers, "heads": heads, "mlp_size": width * 11 // 4, "kv_heads": None}
    section = config.drafter.model_copy(update=sizes)
    return bytes_read(skeleton(drafter_config(section, target.vocab_size, 1, 2, target)))


def report(found: list[Reach]) -> str:
    """A Markdown table."""
    header = [
        "width",
        "acceptance, at most",
        "equal best tokens",
        *(f"{n} layer{'s' * (n > 1)}: c; speed-up" for n in _DEPTHS),
    ]
    rows = []
    for one in found:
        cells = [str(one.width), f"{one.acceptance:.3f}", f"{one.equal:.3f}"]
        for cost in one.costs.values():
            gamma, speed_up = best_speed_up(one.acceptance, cost)
            cells.append(f"{cost:.3f}; {speed_up:.2f} at {gamma}")
        rows.append(cells)
    return "\n".join(
        [
            markdown(header, rows),
            "",
            "Acceptance: of a head of that width over the target's own hidden states, projected; no drafter of that "
            "width has been trained, and one with few layers stays below it. c: bytes read by a draft over the "
            "target's. Speed-up: memory-bound, with the best number of drafts, if that acceptance were reached.",
        ]
    )
