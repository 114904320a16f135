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
    y, x = torch.tensor(outcomes), torch.tensor(np.tanh(lengths / lengths.std()))
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
