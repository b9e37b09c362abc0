"""The projected head against numpy's singular values, and at full width against the target itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_train.losses import Head
from dist_train.models.projection import project_embedding, project_head, reach, second_moment

VOCAB, WIDE, ROWS = 300, 24, 700


@pytest.fixture(scope="module")
def target():
    """A head, and states whose directions differ in size and are not those of the axes."""
    torch.manual_seed(0)
    mix = torch.randn(WIDE, WIDE) * torch.logspace(0, -2, WIDE)[:, None]
    return Head(torch.randn(VOCAB, WIDE) + 0.5), torch.randn(ROWS, WIDE) @ mix + 0.3


def test_at_full_width_every_draft_is_accepted(target):
    head, states = target
    accepted, equal = reach(head, project_head(head, second_moment([states]), WIDE), states)
    assert accepted == pytest.approx(1, abs=1e-4)
    assert equal == 1


@pytest.mark.parametrize("width", [1, 5, 16])
def test_no_map_of_its_rank_is_nearer(target, width):
    """Eckart and Young: what the singular value decomposition of the centred logits themselves leaves over."""
    head, states = target
    logits = (states @ head.weight.T).double().numpy()
    logits -= logits.mean(1, keepdims=True)
    least = np.linalg.svd(logits, compute_uv=False)[width:]
    made = project_head(head, second_moment([states[:400], states[400:]]), width)
    found = (states @ made.states.T @ made.head.T).double().numpy()
    assert np.linalg.norm(found - logits) == pytest.approx(np.linalg.norm(least), rel=1e-3)


def test_the_states_are_as_large_as_an_rmsnorm_leaves_them(target):
    head, states = target
    made = project_head(head, second_moment([states]), 8)
    moment = (states @ made.states.T).double().T @ (states @ made.states.T).double() / ROWS
    torch.testing.assert_close(moment, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-3)


def test_reach_grows_with_width(target):
    head, states = target
    moment = second_moment([states])
    accepted = [reach(head, project_head(head, moment, width), states)[0] for width in (2, 6, 12, 24)]
    assert accepted == sorted(accepted)
    assert accepted[0] < 0.9


def test_a_scaled_head_is_projected_with_its_scale(target):
    head, states = target
    scaled = Head(head.weight, scale=0.25)
    accepted, _ = reach(scaled, project_head(scaled, second_moment([states]), WIDE), states)
    assert accepted == pytest.approx(1, abs=1e-4)


def test_an_embedding_keeps_its_distances(target):
    """As well as its best `width` directions can, by numpy's decomposition."""
    weight = target[0].weight
    projected = project_embedding(weight, 6, 0.02)
    assert float(projected.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)
    centred = (weight - weight.mean(0)).double().numpy()
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    best = left[:, :6] * values[:6]
    best *= 0.02 / np.sqrt((best**2).mean())
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (projected.double().numpy(), best)]
    np.testing.assert_allclose(distances[0], distances[1], rtol=0, atol=1e-5)


def test_states_are_needed():
    with pytest.raises(ValueError, match="no hidden states"):
        second_moment([])
