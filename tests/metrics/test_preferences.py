"""The length-controlled win rate: the regression's optimum, and what it removes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_lightning.metrics.preferences import length_controlled_win_rate


def synthetic(theta: float, phi: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    lengths = draw.normal(30, 80, count)
    chances = 1 / (1 + np.exp(-(theta + phi * np.tanh(lengths / lengths.std()))))
    return (draw.random(count) < chances).astype(float), lengths


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_the_fit_is_the_optimum_that_autograd_finds(ridge: float) -> None:
    outcomes, lengths = synthetic(0.4, 1.2, 60, seed=0)
    outcomes[::7] = 0.5
    y, x = torch.tensor(outcomes), torch.tensor(np.tanh(lengths / lengths.std(ddof=1)))
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        logits = weights[0] + weights[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) + ridge * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    found = length_controlled_win_rate(outcomes, lengths, ridge=ridge)
    assert found == pytest.approx(float(weights[0].detach().sigmoid()), abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_regression_of_weighted_annotations(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed: no oracle")
    # Annotations as AlpacaEval has them: a preference in [1, 2] for an instruction and two outputs. A preference p for
    # the second is two rows of a logistic regression, of label 1 with the weight p and of label 0 with 1 - p; its
    # prediction for outputs of equal length, averaged over instructions, is the win rate.
    draw = np.random.default_rng(seed)
    outputs = [("a" * int(draw.integers(20, 400)), "b" * int(draw.integers(50, 500))) for _ in range(300)]
    difference = np.array([len(second) - len(first) for first, second in outputs], dtype=float)
    signal = 0.3 * (seed - 1) + np.tanh(difference / difference.std(ddof=1))
    preferences = 1 + np.clip(1 / (1 + np.exp(-signal)) + draw.normal(0, 0.2, 300), 0, 1)
    rows = [
        (np.array([np.tanh(d / difference.std(ddof=1)), 1.0]), p - 1)
        for d, p in zip(difference, preferences, strict=True)
    ]
    labelled = [(x, y, weight) for x, p in rows for y, weight in ((1, p), (0, 1 - p))]
    features = np.array([x for x, _, _ in labelled])
    signs, weights = np.array([2 * y - 1 for _, y, _ in labelled]), np.array([w for _, _, w in labelled])
    found = optimize.minimize(
        lambda c: (weights * np.logaddexp(0, -signs * (features @ c))).sum(), np.zeros(2), tol=1e-10
    )
    predicted = 1 / (1 + np.exp(-(np.array([[0.0, 1.0]] * 300) @ found.x)))
    given = length_controlled_win_rate(preferences - 1, difference, ridge=1e-12)
    assert given == pytest.approx(predicted.mean(), abs=1e-6)
    assert abs(given - (preferences - 1).mean()) > 0.01


def test_equal_models_of_which_one_is_longer() -> None:
    # It wins by length alone: 57 % as counted, half at equal lengths.
    outcomes, lengths = synthetic(0.0, 1.5, 20_000, seed=1)
    assert outcomes.mean() > 0.56
    assert length_controlled_win_rate(outcomes, lengths) == pytest.approx(0.5, abs=0.015)


def test_without_differences_of_length_it_is_the_win_rate() -> None:
    outcomes = [1.0, 1.0, 0.0, 0.5]
    assert length_controlled_win_rate(outcomes, [3.0] * 4, ridge=1e-9) == pytest.approx(0.625, abs=1e-6)


def test_a_model_that_always_wins_stays_finite() -> None:
    assert 0.95 < length_controlled_win_rate([1.0] * 30, np.arange(30.0)) < 1


@pytest.mark.parametrize(
    ("given", "word"),
    [(([1.0], [1.0]), "1 outcomes"), (([1.0, 2.0], [0.0, 1.0]), r"is 2\.0"), (([1.0, 0.0], [1.0]), "outcomes")],
)
def test_bad_input(given: tuple[list[float], list[float]], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        length_controlled_win_rate(*given)
