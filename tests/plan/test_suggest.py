"""What a drafter of each width can reach, and what is said of it."""

from __future__ import annotations

import pytest
from runs import distillation

from dist_train.plan.suggest import best_speed_up, block_efficiency


def test_block_efficiency_is_the_geometric_sum():
    assert block_efficiency(0.0, 5) == 1
    assert block_efficiency(1.0, 5) == 6
    assert block_efficiency(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))


def test_the_best_number_of_drafts_is_that_of_all():
    """Tried one by one; none where no draft pays."""
    for acceptance, cost in ((0.3, 0.4), (0.6, 0.1), (0.8, 0.05)):
        tried = {g: block_efficiency(acceptance, g) / (cost * g + 1) for g in range(9)}
        assert best_speed_up(acceptance, cost) == pytest.approx((max(tried, key=tried.get), max(tried.values())))
    assert best_speed_up(0.3, 0.4) == (0, 1)


def test_at_the_targets_width_all_is_accepted(tiny, command, tmp_path):
    """Of the tiny target, 32 wide, from the corpora of a configuration; no GPU is named."""
    code, out, err = command("plan", *distillation(tiny, tmp_path / "run")[1:], "--suggest", "--stage", "distill")
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("| 32 "))
    _, width, accepted, equal, *costs = (cell.strip() for cell in row.split("|")[:-1])
    assert (width, accepted, equal) == ("32", "1.000", "1.000")
    assert len(costs) == 3
    assert "no drafter of that width has been trained" in out


def test_a_plan_needs_its_gpus_or_a_target(tiny, refused, tmp_path):
    words = distillation(tiny, tmp_path / "run")[1:]
    assert "--gpus N and --gpu KIND, or --suggest" in refused("plan", *words)
    assert "trains none" in refused(
        "plan", "target.path=x", "seeds.inputs=y", "out=z", "--stage", "generate", "--suggest"
    )
