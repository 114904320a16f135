"""SimPOModule against a naive computation, and what it refuses."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import SimPOModule
from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.sequences import Example, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from ..invariance.methods import pairs
from .naive import assert_gradient, logps, naive_model, sequences, step

ROWS = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1} or so"} for n in range(1, 14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def log_sigmoid(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def expected_loss(loss_type: str, sums: list[tuple[Tensor, int, Tensor, int]], beta: float, gamma: float) -> Tensor:
    """The papers' formulas, pair by pair."""
    preference, nll, tokens = [], [], 0
    for chosen, n_c, rejected, n_r in sums:
        mean_c, mean_r = chosen / n_c, rejected / n_r
        if loss_type == "simpo":
            preference.append(-log_sigmoid(beta * (mean_c - mean_r) - gamma))
        elif loss_type == "alphapo":
            reward_c, reward_r = ((1 - mean.exp() ** -0.25) / 0.25 for mean in (mean_c, mean_r))
            preference.append(-log_sigmoid(beta * (reward_c - reward_r) - gamma))
        elif loss_type == "cpo":
            preference.append(-log_sigmoid(beta * (chosen - rejected)))
        else:
            odds_c, odds_r = (mean.exp() / (1 - mean.exp()) for mean in (mean_c, mean_r))
            preference.append(-beta * log_sigmoid((odds_c / odds_r).log()))
        nll.append(-chosen)
        tokens += n_c
    loss = sum(preference) / len(sums)
    return loss if loss_type in ("simpo", "alphapo") else loss + sum(nll) / tokens


@pytest.mark.parametrize(
    ("loss_type", "beta", "gamma"), [("simpo", 2.0, 0.7), ("alphapo", 0.5, 0.3), ("cpo", 0.1, 0.0), ("orpo", 0.2, 0.0)]
)
def test_a_step_is_the_naive_gradient(loss_type: str, beta: float, gamma: float, folder: str) -> None:
    examples, naive = pairs(5), naive_model(folder)
    sums = []
    for example in examples:
        (prompt, chosen), (_, rejected) = sequences(example)
        sums.append((logps(naive, prompt, chosen), len(chosen), logps(naive, prompt, rejected), len(rejected)))
    loss = expected_loss(loss_type, sums, beta, gamma)
    loss.backward()
    module = SimPOModule(folder, loss_type=loss_type, beta=beta, gamma=gamma, micro_batch_tokens=40)
    found = step(module, examples)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(found.gradient, naive)


def test_metrics_are_those_of_the_pairs(folder: str) -> None:
    examples, naive = pairs(4), naive_model(folder)
    rewards = []
    for example in examples:
        with torch.no_grad():
            rewards.append([2.5 * float(logps(naive, p, c)) / len(c) for p, c in sequences(example)])
    metrics = step(SimPOModule(folder, beta=2.5), examples).metrics
    assert metrics["train/rewards/chosen"] == pytest.approx(sum(c for c, _ in rewards) / 4, rel=1e-6)
    assert metrics["train/rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards) / 4, rel=1e-5)
    assert metrics["train/rewards/accuracies"] == sum(c > r for c, r in rewards) / 4
    assert "train/nll" not in metrics


@pytest.mark.parametrize("options", [{}, {"loss_type": "orpo", "beta": 0.5}])
def test_it_fits_a_few_pairs(folder: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = SimPOModule(folder, optimizer=partial(torch.optim.AdamW, lr=3e-3), **options)
    run = trainer("32-true", max_epochs=4)
    run.fit(module, PreferenceDataModule(train=ROWS, val=ROWS[:5], global_batch_size=4))
    assert float(run.callback_metrics["val/rewards/accuracies"]) == 1.0
    assert float(run.callback_metrics["val/rewards/margins"]) > 0.5
    assert not [name for name in module.state_dict() if "ref" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpoo"}, "did you mean|simpo"),
        ({"beta": 0.0}, "beta is 0"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"loss_type": "orpo", "label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"nll_weight": -1.0}, "nll_weight"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimPOModule("nowhere", **options)


def test_rows_that_are_no_pairs_are_refused(folder: str) -> None:
    lone = Example("rows:7", Segment([5, 6], children=(Segment([7], [1.0]),)))
    with pytest.raises(ValueError, match=re.escape("row rows:7 has 1 sequences with [1] scored tokens")):
        step(SimPOModule(folder), [lone])


def test_equal_completions_are_refused_by_the_datamodule(folder: str) -> None:
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "2"}]
    run = trainer("32-true", max_epochs=1)
    with pytest.raises(ValueError, match="chosen and rejected are equal"):
        run.fit(SimPOModule(folder), PreferenceDataModule(train=rows))


def test_nll_weight_overrides_the_papers(folder: str) -> None:
    examples = pairs(3)
    plain, weighted = (step(SimPOModule(folder, nll_weight=w), examples).metrics for w in (None, 0.5))
    assert math.isclose(weighted["train/loss"], plain["train/loss"] + 0.5 * weighted["train/nll"], rel_tol=1e-6)
