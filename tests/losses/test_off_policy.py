"""Masks and weights for tokens that are not quite the policy's own, against loops and numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.losses.off_policy import (
    ENGINE_CORRECTIONS,
    engine_correction_weights,
    entropy_bonus_loss,
    off_policy_mask,
    top_entropy_mask,
    top_entropy_threshold,
)

NAN = float("nan")
INDEX = torch.tensor([0, 1, 0, 2, 2, 1, 0, 4])
TRAINER = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -1.5, -0.1, -9.0])
ENGINE = torch.tensor([-1.3, -1.2, -0.9, -3.0, NAN, -1.4, -1.6, -0.1])


def naive_weights(mode: str, minimum: float | None, maximum: float | None) -> list[float]:
    level, action = mode.split("_")
    logs = [0.0 if math.isnan(e) else t - e for t, e in zip(TRAINER.tolist(), ENGINE.tolist(), strict=True)]
    weights = []
    for n, sequence in enumerate(INDEX.tolist()):
        log = logs[n]
        if level == "sequence":
            log = sum(value for value, other in zip(logs, INDEX.tolist(), strict=True) if other == sequence)
        weight = math.exp(log)
        low, high = minimum or 0.0, math.inf if maximum is None else maximum
        inside = low <= weight <= high
        weights.append(min(max(weight, low), high) if action == "truncate" else weight if inside else 0.0)
    return weights


class TestEngineCorrection:
    @pytest.mark.parametrize("mode", ENGINE_CORRECTIONS)
    @pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 2.0), (0.5, None), (None, None)])
    def test_against_a_loop(self, mode: str, bounds: tuple[float | None, float | None]) -> None:
        got = engine_correction_weights(
            TRAINER.clone().requires_grad_(),
            engine_logprobs_N=ENGINE,
            sequence_index_N=INDEX,
            num_sequences=5,
            mode=mode,
            minimum=bounds[0],
            maximum=bounds[1],
        )
        torch.testing.assert_close(got, torch.tensor(naive_weights(mode, *bounds)))
        assert not got.requires_grad

    @pytest.mark.parametrize("mode", ENGINE_CORRECTIONS)
    def test_extremes_are_finite(self, mode: str) -> None:
        got = engine_correction_weights(
            torch.tensor([0.0, -1e4]),
            engine_logprobs_N=torch.tensor([-1e4, 0.0]),
            sequence_index_N=torch.tensor([0, 1]),
            num_sequences=2,
            mode=mode,
            maximum=None,
        )
        assert got.isfinite().all()
        assert got[1] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "sequence"}, "engine correction is 'sequence'; it must be one of"),
            ({"minimum": 3.0}, "minimum=3.0 and maximum=3.0 bound no weight"),
            ({"minimum": -1.0}, "minimum=-1.0 and maximum=3.0"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            engine_correction_weights(
                TRAINER, engine_logprobs_N=ENGINE, sequence_index_N=INDEX, num_sequences=5, **options
            )


class TestOffPolicyMask:
    def test_against_a_loop(self) -> None:
        advantages_S = [-1.0, 1.0, -1.0, 0.0, -2.0]
        threshold = 0.3
        want = []
        for sequence in INDEX.tolist():
            moved = [
                0.0 if math.isnan(e) else e - t
                for t, e, other in zip(TRAINER.tolist(), ENGINE.tolist(), INDEX.tolist(), strict=True)
                if other == sequence
            ]
            want.append(advantages_S[sequence] >= 0 or sum(moved) / len(moved) <= threshold)
        got = off_policy_mask(
            TRAINER,
            sampling_logprobs_N=ENGINE,
            advantages_N=torch.tensor(advantages_S)[INDEX],
            sequence_index_N=INDEX,
            num_sequences=5,
            threshold=threshold,
        )
        assert got.tolist() == want
        assert want == [True, True, True, True, True, True, True, False]

    def test_refuses_a_threshold_of_zero(self) -> None:
        with pytest.raises(ValueError, match="threshold is 0; it must be above 0"):
            off_policy_mask(
                TRAINER,
                sampling_logprobs_N=ENGINE,
                advantages_N=ENGINE,
                sequence_index_N=INDEX,
                num_sequences=5,
                threshold=0,
            )


class TestEntropy:
    @pytest.mark.parametrize("top_fraction", [0.01, 0.2, 0.37, 0.5, 1.0])
    @pytest.mark.parametrize("n", [1, 2, 7, 1000])
    def test_threshold_is_numpys_quantile(self, top_fraction: float, n: int) -> None:
        entropies = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        got = top_entropy_threshold(entropies, top_fraction=top_fraction)
        assert got.item() == pytest.approx(np.quantile(entropies.numpy(), 1 - top_fraction), rel=1e-12)

    def test_share_is_kept_whatever_the_split(self) -> None:
        entropies = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        threshold = top_entropy_threshold(entropies[torch.randperm(1000)], top_fraction=0.2)
        kept = torch.cat([top_entropy_mask(part, threshold=threshold) for part in entropies.split(77)])
        assert kept.sum() == 200
        assert entropies[kept].min() > entropies[~kept].max()

    def test_all_tokens_stay_at_one_and_none_is_needed(self) -> None:
        entropies = torch.rand(10)
        threshold = top_entropy_threshold(entropies, top_fraction=1.0)
        assert top_entropy_mask(entropies, threshold=threshold).all()
        assert top_entropy_threshold(torch.zeros(0), top_fraction=0.2) == -math.inf

    def test_bonus_pushes_entropy_up_where_it_acts(self) -> None:
        entropies = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        mask = torch.tensor([True, False, True])
        loss = entropy_bonus_loss(entropies, coef=0.5, mask_N=mask)
        assert loss.tolist() == [-0.5, 0.0, -1.5]
        (gradient,) = torch.autograd.grad(loss.sum(), entropies)
        assert gradient.tolist() == [-0.5, 0.0, -0.5]

    @pytest.mark.parametrize("top_fraction", [0.0, 1.5, NAN])
    def test_refuses_other_shares(self, top_fraction: float) -> None:
        with pytest.raises(ValueError, match=r"top_fraction=.* is outside \(0, 1\]"):
            top_entropy_threshold(torch.ones(2), top_fraction=top_fraction)


def test_equal_entropies_are_kept_together() -> None:
    """Two equal completions in different micro-batches, at the threshold."""
    entropies = torch.tensor([1.0, 1.0 + 4e-15, 2.0, 0.5], dtype=torch.float64)
    threshold = top_entropy_threshold(entropies, top_fraction=0.6)
    assert float(threshold) > 1.0
    assert top_entropy_mask(entropies, threshold=threshold).tolist() == [True, True, True, False]
    assert top_entropy_mask(entropies, threshold=torch.tensor(-torch.inf)).all()
