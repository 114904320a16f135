"""Formulas of the metrics against loops, numpy and numbers derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.metrics import functional as F


def draw(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def rated(count: int) -> tuple[Tensor, Tensor]:
    ratings = draw(count, 3, seed=1)
    ratings[::4, 1] = torch.nan
    return ratings * 2 + draw(count, 3, seed=2), ratings


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_calibration_error_is_the_loop_over_bins(num_bins: int) -> None:
    confidence, correct = draw(200).sigmoid(), draw(200, seed=1) > 0.3
    total = 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = [i for i in range(200) if low <= float(confidence[i]) < high]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / 200 * abs(accuracy - mean)
    assert float(F.expected_calibration_error(confidence, correct, num_bins)) == pytest.approx(total, rel=1e-6)


def test_certainty_is_in_the_last_bin() -> None:
    assert float(F.expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))) == 0.0
    with pytest.raises(ValueError, match=r"a confidence is 1\.5, outside \[0, 1\]"):
        F.expected_calibration_error(torch.tensor([1.5]), torch.tensor([1]))


def test_correlation_is_numpys_over_the_rated_rows() -> None:
    rewards, ratings = rated(50)
    found = F.attribute_correlation(rewards, ratings)
    for k in range(3):
        rows = ~ratings[:, k].isnan()
        expected = np.corrcoef(rewards[rows, k].numpy(), ratings[rows, k].numpy())[0, 1]
        assert float(found[k]) == pytest.approx(expected, rel=1e-6)


def test_correlation_with_a_constant_is_undefined() -> None:
    rewards = torch.tensor([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1]])
    ratings = torch.tensor([[5.1, 1.0], [5.1, 2.0], [5.1, 3.0]])
    assert F.attribute_correlation(rewards, ratings).isnan().all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1, max_size=6), st.floats(0.1, 0.9))
def test_first_errors_is_the_first_below_the_threshold(rows: list[list[float]], threshold: float) -> None:
    scores = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    index = torch.tensor([n for n, row in enumerate(rows) for _ in row], dtype=torch.long)
    expected = [next((i for i, x in enumerate(row) if x < threshold), F.NO_ERROR) for row in rows]
    assert F.first_errors(scores, index, len(rows), threshold).tolist() == expected


def test_first_error_f1_is_processbenchs() -> None:
    # With an error: 2 of 4 found; without: 3 of 4 let pass.
    predicted = torch.tensor([0, 2, 1, -1, -1, -1, -1, 3])
    expected = torch.tensor([0, 2, 2, 1, -1, -1, -1, -1])
    found = F.first_error_f1(predicted, expected)
    assert (float(found.with_error), float(found.without_error)) == (0.5, 0.75)
    assert float(found.f1) == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    nothing = F.first_error_f1(torch.tensor([1, 1]), torch.tensor([0, -1]))
    assert float(nothing.f1) == 0.0
    assert F.first_error_f1(torch.tensor([1]), torch.tensor([1])).without_error.isnan()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"confidence_B has shape \(2,\) and correct_B \(3,\): give all"):
        F.expected_calibration_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"rewards_BK has shape \(2,\) .*the shape \(B, K\)$"):
        F.attribute_correlation(torch.zeros(2), torch.zeros(2))
