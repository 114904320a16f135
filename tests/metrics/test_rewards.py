"""Logged metrics of rewards, against numbers by hand."""

from __future__ import annotations

import torch

from rlhf_lightning.metrics.rewards import pair_metrics, reward_metrics


def numbers(values):
    return {name: value.item() for name, value in values.items()}


def test_the_margin_of_pairs_and_of_completions_without_partners():
    chosen, rejected = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([0.5, 4.0, -6.0])
    expected = {"rewards/chosen": 1.0, "rewards/rejected": -0.5, "rewards/margins": 1.5}
    assert numbers(reward_metrics(chosen, rejected)) == expected
    assert numbers(reward_metrics(chosen, torch.tensor([0.5, 1.0]))) == {
        "rewards/chosen": 1.0,
        "rewards/rejected": 0.75,
        "rewards/margins": 0.25,
    }
    assert numbers(reward_metrics(chosen, torch.empty(0))) == {"rewards/chosen": 1.0}


def test_accuracy_leaves_ties_out_and_equal_rewards_are_wrong():
    chosen, rejected = torch.tensor([1.0, 4.0, -2.0, 7.0]), torch.tensor([0.5, 5.0, -2.0, 0.0])
    assert pair_metrics(chosen, rejected)["rewards/accuracies"] == 0.5
    tie = torch.tensor([False, True, True, False])
    found = pair_metrics(chosen, rejected, tie_P=tie)
    assert found["rewards/accuracies"] == 1.0
    assert found["rewards/margins"] == (0.5 - 1.0 + 0.0 + 7.0) / 4  # ties are in the means
    assert "rewards/accuracies" not in pair_metrics(chosen, rejected, tie_P=torch.ones(4, dtype=torch.bool))


def test_calibration_of_one_bin():
    """One pair right and one wrong, both at a margin of log 3: confidence 0.75, accuracy 0.5."""
    margin = torch.tensor([3.0, 1 / 3], dtype=torch.float64).log()
    found = pair_metrics(margin, torch.zeros(2, dtype=torch.float64), calibration=True)
    torch.testing.assert_close(found["calibration_error"], torch.tensor(0.25, dtype=torch.float64))
