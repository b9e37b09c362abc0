"""A drafter that begins as a projection of its target, and learns the target's hidden states first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import distillation, figures, losses, weights

from dist_train.losses import Head
from dist_train.train.beginning import Regression

PROJECTED = ("drafter.projected=true", "regression={share: 0.5}")


def test_the_regressions_gradient_is_that_of_the_mean_squared_error():
    """By hand in float64: 2 w (h - A t) / d over the positions of a whole step."""
    torch.manual_seed(0)
    states, hidden = torch.randn(4, 6), torch.randn(2, 3, 4, requires_grad=True)
    target, head = torch.randn(2, 3, 6), torch.randn(9, 4, requires_grad=True)
    weights = torch.rand(4)
    loss = Regression(states, weights, steps=1, positions=60).loss(hidden, Head(head), target)
    loss.backward()
    error = hidden.detach().double().numpy() - target.double().numpy() @ states.double().numpy().T
    by = weights.double().numpy()
    assert loss.item() == pytest.approx((error**2 * by).mean(-1).sum() / 60, rel=1e-6)
    np.testing.assert_allclose(hidden.grad.numpy(), 2 * error * by / 4 / 60, rtol=1e-5, atol=1e-7)
    assert not head.grad.any()


@pytest.fixture(scope="module")
def one_rank(tiny, cli, tmp_path_factory):
    run = tmp_path_factory.mktemp("projected") / "run"
    cli(*distillation(tiny, run, *PROJECTED))
    return run


def test_regression_goes_before_the_objective(one_rank):
    first, last = figures(one_rank)[:3], figures(one_rank)[3:]
    assert all("train/acceptance" not in line for line in first)
    assert all(line["train/acceptance"] > 0 for line in last)
    assert first[2]["train/loss"] < first[0]["train/loss"] <= 3  # of unit numbers against unit numbers: about 2
    assert not np.allclose(weights(one_rank)["lm_head.weight"], 0)


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_have_the_losses_of_one(tiny, command, tmp_path, one_rank, stage):
    code, _, err = command(*distillation(tiny, tmp_path / "run", *PROJECTED, f"train.deepspeed={stage}"), "--nproc", 2)
    assert code == 0, err
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=2e-4)


def test_a_sharded_target_is_projected_alike(tiny, command, tmp_path, one_rank):
    more = (*PROJECTED, "target.sharding=zero3")
    code, _, err = command(*distillation(tiny, tmp_path / "run", *more), "--nproc", 2)
    assert code == 0, err
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), rel=2e-4)


def test_a_resumed_run_goes_on_with_what_it_was_in(tiny, cli, tmp_path):
    """Stopped amid the regression, by its number of steps, and after it."""
    run = tmp_path / "run"
    whole = [*PROJECTED, "train.schedule=constant"]
    cli(*distillation(tiny, tmp_path / "whole", *whole))
    for share, steps in ((0.999, 2), (0.75, 4), (0.5, 6)):  # each time three steps of regression at the most
        cli(*distillation(tiny, run, *whole, f"regression.share={share}", steps=steps))
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_tied_drafter_has_the_projected_head(tiny, cli, tmp_path):
    cli(*distillation(tiny, tmp_path / "run", *PROJECTED, "drafter.tie_embeddings=true"))
    assert losses(tmp_path / "run")[2] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["regression.share=0.5"], "regression.share needs drafter.projected=true"),
        (["drafter.projected=true", "objective={ce: 1.0}"], "drafter.projected needs target.path, and a loss besides"),
        (["drafter.projected=true", "drafter.init_from=x"], "has its own head; keep one"),
        (["drafter.projected=true", "drafter.hidden_size=64"], "the drafter is 64 wide and its target 32"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, refused, tmp_path, words, told):
    assert told in refused(*distillation(tiny, tmp_path / "run", *words))
