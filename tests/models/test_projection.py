"""The projected head against numpy's singular values, and at full width against the target itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_train.losses import Head
from dist_train.models.projection import measure, project_embedding, project_head, reach

VOCAB, WIDE, ROWS = 300, 24, 700


@pytest.fixture(scope="module")
def target():
    """A head, and states whose directions differ in size and are not those of the axes."""
    torch.manual_seed(0)
    mix = torch.randn(WIDE, WIDE) * torch.logspace(0, -2, WIDE)[:, None]
    return Head(torch.randn(VOCAB, WIDE) + 0.5), torch.randn(ROWS, WIDE) @ mix + 0.3


def test_at_full_width_every_draft_is_accepted(target):
    head, states = target
    accepted, equal = reach(head, project_head(head, measure(head, [states]), WIDE), states)
    assert accepted == pytest.approx(1, abs=1e-4)
    assert equal == 1


@pytest.mark.parametrize("width", [1, 5, 16])
def test_no_map_of_its_rank_costs_less(target, width):
    """Eckart and Young: what the singular values of G^1/2 C^1/2 leave over, with both made state by state in numpy."""
    head, states = target
    weight, h = head.weight.double().numpy(), states.double().numpy()
    moment = h.T @ h / ROWS
    fisher = np.zeros((WIDE, WIDE))
    for one in h:
        q = np.exp(weight @ one - (weight @ one).max())
        fisher += np.cov(weight.T, aweights=q, ddof=0) / ROWS
    roots = [vectors * np.sqrt(values) @ vectors.T for values, vectors in map(np.linalg.eigh, (fisher, moment))]
    values = np.linalg.svd(roots[0] @ roots[1], compute_uv=False)
    least = values[width:]
    made = project_head(head, measure(head, [states[:400], states[400:]]), width)
    # The map of states that the projected head stands for: its rows are those of the centred head times this.
    centred = weight - weight.mean(0)
    kept = np.linalg.lstsq(centred, made.head.double().numpy(), rcond=None)[0] @ made.states.double().numpy()
    lost = roots[0] @ (np.eye(WIDE) - kept) @ roots[1]
    assert np.linalg.norm(lost) == pytest.approx(np.linalg.norm(least), rel=2e-3)
    np.testing.assert_allclose(made.costs.numpy(), values[:width] ** 2, rtol=2e-3)


def test_the_states_are_as_large_as_an_rmsnorm_leaves_them(target):
    head, states = target
    made = project_head(head, measure(head, [states]), 8)
    moment = (states @ made.states.T).double().T @ (states @ made.states.T).double() / ROWS
    torch.testing.assert_close(moment, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-3)


def test_reach_grows_with_width(target):
    head, states = target
    geometry = measure(head, [states])
    accepted = [reach(head, project_head(head, geometry, width), states)[0] for width in (2, 6, 12, 24)]
    assert accepted == sorted(accepted)
    assert accepted[0] < 0.9


def test_a_scaled_head_is_projected_with_its_scale(target):
    head, states = target
    scaled = Head(head.weight, scale=0.25)
    accepted, _ = reach(scaled, project_head(scaled, measure(scaled, [states]), WIDE), states)
    assert accepted == pytest.approx(1, abs=1e-4)


def test_an_embedding_keeps_its_distances(target):
    """As well as its best `width` directions can, by numpy's decomposition of rows repeated as often as they come."""
    weight = target[0].weight
    counts = np.random.default_rng(0).integers(1, 5, VOCAB)
    often = torch.from_numpy(counts / counts.sum())
    projected = project_embedding(weight, often, 6, 0.02)
    assert float(projected.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)
    centred = (weight - weight.mean(0)).double().numpy()
    by = (counts / counts.sum() + 1 / VOCAB) / 2
    _, vectors = np.linalg.eigh(np.cov(centred.T, aweights=by, ddof=0))
    best = centred @ vectors[:, -6:]
    best *= 0.02 / np.sqrt((best**2).mean())
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (projected.double().numpy(), best)]
    np.testing.assert_allclose(distances[0], distances[1], rtol=0, atol=1e-5)


def test_states_are_needed():
    with pytest.raises(ValueError, match="no hidden states"):
        measure(Head(torch.zeros(3, 2)), [])
