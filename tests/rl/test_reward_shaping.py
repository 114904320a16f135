"""Shaping of scores before advantages are computed, against loops and hand-derived numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_lightning.rl.reward_shaping import KLController, kl_penalised_scores, missing_eos_penalty, token_rewards

INDEX = torch.tensor([1, 0, 1, 3, 0, 1])
KL = torch.tensor([0.5, 1.0, -0.25, 2.0, 3.0, 1.5])


def test_missing_eos_penalty_is_subtracted_whatever_the_sign_of_the_score() -> None:
    got = missing_eos_penalty(
        torch.tensor([1.0, -1.0, 2.0]), has_eos_S=torch.tensor([False, False, True]), penalty=0.75
    )
    assert got.tolist() == [0.25, -1.75, 2.0]
    with pytest.raises(ValueError, match=r"missing_eos_penalty=-1.0 is below 0"):
        missing_eos_penalty(torch.ones(1), has_eos_S=torch.ones(1), penalty=-1.0)


def test_kl_of_a_completion_is_the_sum_over_its_tokens() -> None:
    kl = KL.clone().requires_grad_()
    got = kl_penalised_scores(torch.tensor([1.0, 2.0, 3.0, 4.0]), kl_N=kl, coef=0.1, sequence_index_N=INDEX)
    torch.testing.assert_close(got, torch.tensor([1 - 0.4, 2 - 0.175, 3.0, 4 - 0.2]))
    assert not got.requires_grad


class TestTokenRewards:
    def test_score_lands_on_the_last_token_and_kl_on_each(self) -> None:
        got = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), sequence_index_N=INDEX, kl_N=KL, kl_coef=0.1)
        torch.testing.assert_close(got, torch.tensor([-0.05, -0.1, 0.025, 39.8, 9.7, 19.85]))

    def test_sums_per_sequence_are_the_penalised_scores(self) -> None:
        scores = torch.tensor([10.0, 20.0, 30.0, 40.0])
        rewards = token_rewards(scores, sequence_index_N=INDEX, kl_N=KL, kl_coef=0.3)
        want = kl_penalised_scores(scores, kl_N=KL, coef=0.3, sequence_index_N=INDEX)
        sums = torch.zeros(4).index_add(0, INDEX, rewards)
        torch.testing.assert_close(sums[[0, 1, 3]], want[[0, 1, 3]])

    def test_without_a_reference(self) -> None:
        got = token_rewards(torch.tensor([1.0, 2.0]), sequence_index_N=torch.tensor([0, 0, 1]))
        assert got.tolist() == [0.0, 1.0, 2.0]

    def test_unscored_sequences_are_refused_unless_they_have_no_tokens(self) -> None:
        nan = float("nan")
        with pytest.raises(ValueError, match=r"^the score of sequence 1 is nan: leave samples"):
            token_rewards(torch.tensor([1.0, nan]), sequence_index_N=torch.tensor([0, 1]))
        got = token_rewards(torch.tensor([1.0, nan]), sequence_index_N=torch.tensor([0, 0]))
        assert got.tolist() == [0.0, 1.0]


class TestKLController:
    def test_fixed(self) -> None:
        controller = KLController(0.05)
        assert controller.update(100.0, num_samples=64) == controller.coef == 0.05

    def test_adaptive_against_the_papers_formula(self) -> None:
        controller = KLController(0.2, target=6.0, horizon=1000)
        coef = 0.2
        for kl, error in ((6.0, 0.0), (6.6, 0.1), (12.0, 0.2), (5.7, -0.05), (0.0, -0.2), (-3.0, -0.2)):
            coef *= 1 + error * 64 / 1000
            assert controller.update(kl, num_samples=64) == pytest.approx(coef, rel=1e-12)

    def test_state_round_trip_continues_exactly(self) -> None:
        first, second = (KLController(0.2, target=6.0) for _ in range(2))
        first.update(9.0, num_samples=64)
        second.load_state_dict(first.state_dict())
        assert second.update(2.0, num_samples=8) == first.update(2.0, num_samples=8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"coef": -0.1}, "kl_coef=-0.1"),
            ({"coef": 0.1, "target": 0.0}, "kl_target=0.0"),
            ({"coef": 0.1, "target": 6.0, "horizon": 0}, "kl_horizon=0"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            KLController(**options)

    def test_a_diverged_policy_is_an_error_and_not_a_weight(self) -> None:
        controller = KLController(0.1, target=6.0)
        with pytest.raises(ValueError, match="the measured KL divergence is nan"):
            controller.update(float("nan"), num_samples=1)
        assert controller.coef == 0.1
