"""Measures of an evaluation against numbers worked out by hand or by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.evaluate.measures import (
    accepted_histogram,
    block_efficiency,
    bootstrap,
    bootstrap_difference,
    memory_bound_speed_up,
    position_acceptance,
    token_rates,
)

BLOCKS = [[4, 1, 2], [1], [3, 4, 4, 1]]


def test_block_efficiency_is_a_ratio_of_sums():
    assert block_efficiency(BLOCKS) == 20 / 8


def test_mbsu_of_the_papers_drafter():
    """115M drafter of a 7B target: c = 1.64 %, so gamma 3 costs 4.9 % of a target call."""
    assert memory_bound_speed_up(2.3, 0.0164, 3) == pytest.approx(2.3 / 1.0492)


def test_histogram_and_acceptance_by_position():
    histogram = accepted_histogram(BLOCKS, gamma=3)
    assert histogram == [3, 1, 1, 3]
    assert position_acceptance(histogram) == [5 / 8, 4 / 5, 3 / 4]
    assert position_acceptance([4, 0, 0]) == [0.0, 0.0]


def drawn_blocks(generator, mean, prompts):
    """Prompts with their own difficulty, so that blocks of one prompt are alike."""
    return [
        np.minimum(generator.geometric(1 / generator.uniform(mean - 0.5, mean + 0.5), 20), 4).tolist()
        for _ in range(prompts)
    ]


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    truth = block_efficiency(drawn_blocks(generator, 2.0, 50_000))
    hits = 0
    for _ in range(200):
        estimate = bootstrap(drawn_blocks(generator, 2.0, 60))
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= truth <= estimate.high
    assert 178 <= hits <= 199


def test_pairing_narrows_the_interval_of_a_difference():
    generator = np.random.default_rng(1)
    difficulty = generator.integers(1, 4, 80)
    base = [[int(d)] * 10 for d in difficulty]
    better = [[int(d)] * 9 + [4] for d in difficulty]
    paired = bootstrap_difference(better, base)
    assert paired.low > 0
    assert paired.high - paired.low < 0.5 * (bootstrap(base).high - bootstrap(base).low)
    assert bootstrap_difference(base, base) == (0.0, 0.0, 0.0)


def test_token_rates_rank_as_their_ratios_do():
    """Medians of rates and of ratios, each over three rounds on its own, often do not."""
    drawn = np.random.default_rng(0)
    cases = [drawn.uniform(0.5, 2.0, (3, 4)).tolist() for _ in range(200)]
    medians_disagree = 0
    for rounds in cases:
        seconds = np.array(rounds)
        found = token_rates(rounds)
        rates, ratios = (np.array([row[key] for row in found]) for key in ("tokens_per_s", "speed_up"))
        assert np.allclose(ratios, np.median(seconds[:, :1] / seconds, axis=0))
        assert np.isclose(rates[0], np.median(1 / seconds[:, 0]))
        assert (rates.argsort() == ratios.argsort()).all()
        medians_disagree += (np.median(1 / seconds, axis=0).argsort() != ratios.argsort()).any()
    assert medians_disagree > 20  # else this would show nothing
