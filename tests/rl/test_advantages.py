"""Group baselines against loops with the statistics module, GAE against a double sum, whitening against numpy."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_lightning.rl.advantages import (
    BASELINES,
    SCALE_REWARDS,
    combine_rewards,
    gae,
    gdpo_advantages,
    group_advantages,
    moment_sums,
    whiten,
)

NAN = float("nan")
EPS = 1e-4

# Groups of different sizes: mixed, one sample missing, all alike, one scored, none scored, alike up to rounding.
GROUPS = [
    [1.0, 0.0, 0.5, 0.0],
    [2.0, NAN, -1.0],
    [3.0, 3.0, 3.0],
    [NAN, 0.7, NAN],
    [NAN, NAN],
    [0.1 + 0.2, 0.3],
]


def flat(groups: list[list[float]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and group indices, shuffled, and the shuffle."""
    values = torch.tensor([v for group in groups for v in group], dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(group) for group in groups]))
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return values[shuffle], index[shuffle], shuffle


def unshuffled(values: Tensor, shuffle: Tensor) -> list[float]:
    back = torch.empty_like(values)
    back[shuffle] = values
    return back.tolist()


def stdev(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def naive(groups: list[list[float]], scale: str, baseline: str) -> list[float]:
    everything = [v for group in groups for v in group if not math.isnan(v)]
    advantages = []
    for group in groups:
        scored = [v for v in group if not math.isnan(v)]
        for n, value in enumerate(group):
            if math.isnan(value) or len(scored) < 2:
                advantages.append(0.0)
                continue
            others = [v for m, v in enumerate(group) if m != n and not math.isnan(v)]
            advantage = value - statistics.fmean(scored if baseline == "mean" else others)
            divisor = {"none": 1.0, "group": stdev(scored) + EPS, "batch": stdev(everything) + EPS}[scale]
            advantages.append(advantage / divisor)
    return advantages


class TestGroups:
    @pytest.mark.parametrize("scale", SCALE_REWARDS)
    @pytest.mark.parametrize("baseline", BASELINES)
    def test_against_a_loop(self, scale: str, baseline: str) -> None:
        rewards, index, shuffle = flat(GROUPS)
        got = group_advantages(rewards, group_index_S=index, num_groups=6, scale_rewards=scale, baseline=baseline)
        want = naive(GROUPS, scale, baseline)
        assert unshuffled(got.advantages_S, shuffle) == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert got.has_signal_G.tolist() == [True, True, False, False, False, False]
        stds = [stdev([v for v in group if not math.isnan(v)]) for group in GROUPS]
        assert got.std_G.tolist() == pytest.approx(stds, rel=1e-12, abs=1e-15)

    def test_by_hand(self) -> None:
        rewards, index = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
        plain = group_advantages(rewards, group_index_S=index, num_groups=1, eps=0.0)
        torch.testing.assert_close(plain.advantages_S, torch.tensor([1.5, -0.5, -0.5, -0.5]))
        out = group_advantages(
            rewards, group_index_S=index, num_groups=1, scale_rewards="none", baseline="leave_one_out"
        )
        torch.testing.assert_close(out.advantages_S, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))

    @pytest.mark.parametrize("eps", [0.0, 1e-4])
    @pytest.mark.parametrize("scale", SCALE_REWARDS)
    def test_groups_without_signal_teach_exactly_nothing(self, scale: str, eps: float) -> None:
        rewards = torch.tensor([0.1, 0.1, 0.1, 1e6, 1e6, NAN])
        index = torch.tensor([0, 0, 0, 1, 1, 1])
        got = group_advantages(rewards, group_index_S=index, num_groups=2, scale_rewards=scale, eps=eps)
        assert got.advantages_S.tolist() == [0.0] * 6
        assert not got.has_signal_G.any()

    def test_small_differences_are_a_signal(self) -> None:
        for values in ([1e-9, 0.0], [1e6, 1e6 + 0.5]):
            got = group_advantages(
                torch.tensor(values, dtype=torch.float64), group_index_S=torch.zeros(2, dtype=torch.long), num_groups=1
            )
            assert got.has_signal_G.all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_order_of_samples_cannot_matter(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        groups = [torch.randn(n, generator=generator).tolist() for n in (4, 8, 3)]
        results = []
        for seed in range(4):
            rewards, index, shuffle = flat(groups, seed)
            got = group_advantages(rewards.to(dtype), group_index_S=index, num_groups=3, scale_rewards="batch")
            assert got.advantages_S.dtype == dtype
            results.append(torch.tensor(unshuffled(got.advantages_S, shuffle), dtype=torch.float64))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-12 if dtype == torch.float64 else 1e-7, atol=1e-13)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale_rewards": "std"}, "scale_rewards is 'std'; it must be one of group, batch, none"),
            ({"baseline": "loo"}, "baseline is 'loo'; it must be one of mean, leave_one_out"),
            ({"eps": -1.0}, "eps=-1.0 is below 0"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            group_advantages(torch.ones(2), group_index_S=torch.zeros(2, dtype=torch.long), num_groups=1, **options)


class TestSeveralRewards:
    REWARDS = (
        [[1.0, 200.0], [0.0, 100.0], [0.0, NAN], [1.0, 0.0]],
        [[0.0, NAN], [NAN, NAN], [1.0, 5.0]],
        [[1.0, 1.0], [1.0, 1.0]],
    )
    WEIGHTS = (2.0, 0.5)

    def arrays(self) -> tuple[Tensor, Tensor]:
        index = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 3, 2]))
        return torch.tensor([row for group in self.REWARDS for row in group], dtype=torch.float64), index

    def test_combined(self) -> None:
        rewards, _ = self.arrays()
        got = combine_rewards(rewards, weights_K=torch.tensor(self.WEIGHTS))
        want = [102.0, 50.0, 0.0, 2.0, 0.0, NAN, 4.5, 2.5, 2.5]
        assert got.tolist() == pytest.approx(want, nan_ok=True)

    def test_gdpo_against_a_loop(self) -> None:
        rewards, index = self.arrays()
        totals = []
        for group in self.REWARDS:
            columns = list(zip(*group, strict=True))
            for row in group:
                total = 0.0
                for value, column, weight in zip(row, columns, self.WEIGHTS, strict=True):
                    scored = [v for v in column if not math.isnan(v)]
                    if not math.isnan(value) and len(scored) > 1:
                        total += weight * (value - statistics.fmean(scored)) / (stdev(scored) + EPS)
                totals.append(NAN if all(math.isnan(v) for v in row) else total)
        scored = [t for t in totals if not math.isnan(t)]
        mean, std = statistics.fmean(scored), stdev(scored)
        want = [0.0 if math.isnan(t) else (t - mean) / (std + EPS) for t in totals]
        got = gdpo_advantages(rewards, weights_K=torch.tensor(self.WEIGHTS), group_index_S=index, num_groups=3)
        assert got.advantages_S.tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert got.has_signal_G.tolist() == [True, True, False]

    def test_gdpo_of_nothing_is_nothing(self) -> None:
        got = gdpo_advantages(
            torch.ones(4, 2),
            weights_K=torch.ones(2),
            group_index_S=torch.zeros(4, dtype=torch.long),
            num_groups=1,
            eps=0.0,
        )
        assert got.advantages_S.tolist() == [0.0] * 4

    def test_one_weight_per_function(self) -> None:
        with pytest.raises(ValueError, match=r"rewards have shape \(2, 3\), weights \(2,\): use one weight per column"):
            combine_rewards(torch.ones(2, 3), weights_K=torch.ones(2))


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: the exponentially weighted sum of all later temporal differences, as a double sum."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


class TestGAE:
    LENGTHS = (5, 1, 0, 12, 3)

    def draw(self, interleaved: bool) -> tuple[list[list[float]], list[list[float]], Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        rewards = [torch.randn(n, generator=generator, dtype=torch.float64).tolist() for n in self.LENGTHS]
        values = [torch.randn(n, generator=generator, dtype=torch.float64).tolist() for n in self.LENGTHS]
        index = torch.repeat_interleave(torch.arange(5), torch.tensor(self.LENGTHS))
        if interleaved:
            index = index[torch.randperm(len(index), generator=generator)]
        cursors = [iter(zip(r, v, strict=True)) for r, v in zip(rewards, values, strict=True)]
        pairs = torch.tensor([next(cursors[s]) for s in index.tolist()], dtype=torch.float64)
        return rewards, values, pairs[:, 0], pairs[:, 1], index

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
    def test_against_a_double_sum(self, gamma: float, lam: float, interleaved: bool) -> None:
        rewards, values, rewards_N, values_N, index = self.draw(interleaved)
        got = gae(rewards_N, values_N=values_N, sequence_index_N=index, num_sequences=5, gamma=gamma, gae_lambda=lam)
        cursors = [iter(naive_gae(r, v, gamma, lam)) for r, v in zip(rewards, values, strict=True)]
        want = torch.tensor([next(cursors[s]) for s in index.tolist()], dtype=torch.float64)
        torch.testing.assert_close(got.advantages_N, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.returns_N, want + values_N, rtol=1e-12, atol=1e-12)

    def test_lambda_one_returns_are_the_discounted_rewards(self) -> None:
        rewards = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        index = torch.zeros(3, dtype=torch.long)
        got = gae(
            rewards, values_N=torch.randn(3).double(), sequence_index_N=index, num_sequences=1, gamma=0.5, gae_lambda=1
        )
        torch.testing.assert_close(got.returns_N, torch.tensor([3.0, 4.0, 4.0], dtype=torch.float64))

    def test_sequences_do_not_see_each_other(self) -> None:
        _, _, rewards_N, values_N, index = self.draw(False)
        whole = gae(rewards_N, values_N=values_N, sequence_index_N=index, num_sequences=5).advantages_N
        for sequence in range(5):
            own = index == sequence
            alone = gae(
                rewards_N[own], values_N=values_N[own], sequence_index_N=index[own] * 0, num_sequences=1
            ).advantages_N
            assert torch.equal(whole[own], alone)

    def test_no_gradient_no_tokens_and_inputs_untouched(self) -> None:
        values = torch.randn(3, requires_grad=True)
        rewards, index = torch.ones(3), torch.tensor([0, 0, 1])
        got = gae(rewards, values_N=values, sequence_index_N=index, num_sequences=2)
        assert not got.advantages_N.requires_grad
        assert not got.returns_N.requires_grad
        assert rewards.tolist() == [1.0] * 3
        nothing = torch.zeros(0)
        empty = gae(nothing, values_N=nothing, sequence_index_N=nothing.long(), num_sequences=0)
        assert empty.advantages_N.shape == (0,)

    @pytest.mark.parametrize("options", [{"gamma": 1.1}, {"gae_lambda": -0.1}])
    def test_refusals(self, options: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"is outside \[0, 1\]"):
            gae(
                torch.ones(1),
                values_N=torch.ones(1),
                sequence_index_N=torch.zeros(1, dtype=torch.long),
                num_sequences=1,
                **options,
            )


class TestWhitening:
    def test_any_split_gives_numpys_answer(self) -> None:
        values = 5 + 3 * torch.randn(101, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = values.numpy()
        want = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)
        for size in (101, 10, 1):
            parts = values.split(size)
            sums = torch.stack([moment_sums(part) for part in parts]).sum(dim=0)
            got = torch.cat([whiten(part, sums=sums) for part in parts])
            torch.testing.assert_close(got.numpy(), want, rtol=1e-10, atol=1e-12)
            kept = torch.cat([whiten(part, sums=sums, shift_mean=False) for part in parts])
            torch.testing.assert_close(kept.numpy(), want + x.mean(), rtol=1e-10, atol=1e-12)

    def test_masked_tokens_are_in_no_statistic(self) -> None:
        values, mask = torch.tensor([1.0, 3.0, 1e9, NAN]), torch.tensor([True, True, False, False])
        got = whiten(values, sums=moment_sums(values, weights_N=mask))
        torch.testing.assert_close(got[:2], torch.tensor([-1.0, 1.0]) / math.sqrt(2))

    @pytest.mark.parametrize("values", [[0.3], [0.1, 0.1, 0.1], []])
    def test_without_variance_the_result_is_zero(self, values: list[float]) -> None:
        got = whiten(torch.tensor(values), sums=moment_sums(torch.tensor(values)))
        torch.testing.assert_close(got, torch.zeros(len(values)), atol=1e-4, rtol=0)
