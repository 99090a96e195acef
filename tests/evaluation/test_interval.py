"""The interval around a mean loss: against hand-worked numbers, a bootstrap over documents, and how often it holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpt.evaluation.interval import half_width, students_quantile


def width(losses: list[float], counts: list[float]) -> float | None:
    return half_width(torch.tensor(losses, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def made_up(numbers: np.random.Generator, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and counts of documents: long-tailed lengths, a level of their own that falls with the length, and
    noise of each token. The mean loss a token of all such documents is MEAN.
    """
    lengths = np.ceil(numbers.exponential(200.0, num_documents))
    levels = 3.0 + numbers.normal(0.0, 0.5, num_documents) + 100.0 / lengths
    return lengths * levels + numbers.normal(0.0, 1.0, num_documents) * np.sqrt(lengths), lengths


# E[length] of the rounded-up exponential is 1 / (1 - exp(-1 / 200)); 100 / length adds 100 a document.
MEAN = 3.0 + 100.0 * (1 - math.exp(-1 / 200))


def test_three_documents_by_hand():
    # R = 12 / 6 = 2; residuals 3 - 2, 3 - 4, 6 - 6 = 1, -1, 0; variance 3/2 * 2 / 36 = 1/12; t(2) = 4.3026527.
    assert width([3, 3, 6], [1, 2, 3]) == pytest.approx(4.3026527 / math.sqrt(12), rel=1e-9)


def test_of_equal_lengths_it_is_the_interval_of_a_plain_mean():
    values = np.random.default_rng(3).normal(2.0, 1.0, 40)
    expected = students_quantile(39) * values.std(ddof=1) / math.sqrt(40)
    assert width((7 * values).tolist(), [7.0] * 40) == pytest.approx(expected, rel=1e-12)


def test_documents_without_targets_change_nothing_and_one_document_says_nothing():
    assert width([3, 0, 3, 6, 0], [1, 0, 2, 3, 0]) == width([3, 3, 6], [1, 2, 3])
    assert width([3.0], [1.0]) is None
    assert width([], []) is None
    assert width([0.0, 5.0], [0.0, 2.0]) is None


@pytest.mark.parametrize(
    ("freedom", "tabulated"), [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_students_quantiles_are_the_tabulated_ones(freedom, tabulated):
    assert students_quantile(freedom) == pytest.approx(tabulated, rel=1e-3)
    assert students_quantile(3) == pytest.approx(3.182, rel=1e-2)


def test_it_is_as_wide_as_a_bootstrap_over_documents_says():
    numbers = np.random.default_rng(11)
    losses, counts = made_up(numbers, 300)
    drawn = numbers.integers(0, 300, (4000, 300))
    means = losses[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    assert half_width(torch.from_numpy(losses), torch.from_numpy(counts)) == pytest.approx((high - low) / 2, rel=0.05)


@pytest.mark.parametrize(("num_documents", "least"), [(10, 0.90), (50, 0.93), (400, 0.935)])
def test_about_95_in_100_intervals_hold_the_true_mean(num_documents, least):
    numbers = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        losses, counts = made_up(numbers, num_documents)
        interval = half_width(torch.from_numpy(losses), torch.from_numpy(counts))
        held += abs(losses.sum() / counts.sum() - MEAN) <= interval
    assert least <= held / 2000 <= 0.965


def test_tokens_taken_for_independent_would_give_an_interval_that_is_far_too_narrow():
    losses, counts = made_up(np.random.default_rng(5), 400)
    of_tokens = 1.96 * math.sqrt(1.0 + 0.25) / math.sqrt(counts.sum())  # variance within and between documents
    assert half_width(torch.from_numpy(losses), torch.from_numpy(counts)) > 5 * of_tokens
