"""The policy-gradient family against loops over tokens, and its sums against the means of the papers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses.policy_gradient import (
    IMPORTANCE_LEVELS,
    LOSS_TYPES,
    aggregation_weights,
    clip_statistics,
    default_importance_level,
    importance_ratio,
    policy_gradient_loss,
    sequence_sum,
)

CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "luspo")
SEQUENCE_LEVEL = ("gspo", "luspo")


@dataclass
class Batch:
    """Sequences of different lengths, one of them empty, and the same flat, shuffled."""

    logprobs: list[list[Tensor]]
    old: list[list[float]]
    advantages: list[list[float]]
    flat: dict[str, Any]


def draw(seed: int = 0, lengths: tuple[int, ...] = (3, 7, 0, 1, 5), spread: float = 0.5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    old_N = -3 * torch.rand(total, generator=generator, dtype=torch.float64)
    new_N = (old_N + spread * torch.randn(total, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages_N = torch.randn(total, generator=generator, dtype=torch.float64)
    index_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    shuffle = torch.randperm(total, generator=generator)
    nested: dict[str, list[list[Any]]] = {"new": [], "old": [], "advantages": []}
    for sequence in range(len(lengths)):
        where = [n for n in range(total) if index_N[n] == sequence]
        nested["new"].append([new_N[n] for n in where])
        nested["old"].append([old_N[n].item() for n in where])
        nested["advantages"].append([advantages_N[n].item() for n in where])
    flat = {
        "leaf": new_N,
        "order": shuffle,
        "logprobs_N": new_N[shuffle],
        "old_logprobs_N": old_N[shuffle],
        "advantages_N": advantages_N[shuffle],
        "sequence_index_N": index_N[shuffle],
        "num_sequences": len(lengths),
    }
    return Batch(nested["new"], nested["old"], nested["advantages"], flat)


def loss_of(batch: Batch, **options: Any) -> Tensor:
    """The flat function's losses, put back in the order of the sequences."""
    tensors = {k: v for k, v in batch.flat.items() if k not in ("leaf", "order")}
    loss_N = policy_gradient_loss(tensors.pop("logprobs_N"), **tensors, **options)
    back = torch.empty_like(loss_N)
    back[batch.flat["order"]] = loss_N
    return back


def naive_ratios(batch: Batch, level: str) -> list[list[Tensor]]:
    ratios = []
    for new, old in zip(batch.logprobs, batch.old, strict=True):
        logs = [a - b for a, b in zip(new, old, strict=True)]
        if level == "token":
            ratios.append([log.exp() for log in logs])
            continue
        if not logs:
            ratios.append([])
            continue
        mean = sum(logs) / len(logs)
        if level == "sequence":
            ratios.append([mean.exp() for _ in logs])
        else:
            ratios.append([mean.detach().exp() * a.exp() / a.detach().exp() for a in new])
    return ratios


def naive_loss(batch: Batch, **options: Any) -> Tensor:
    loss_type = options["loss_type"]
    level = options.get("importance_sampling_level") or ("sequence" if loss_type in SEQUENCE_LEVEL else "token")
    epsilon = options.get("epsilon", 0.2)
    epsilon_high = options.get("epsilon_high")
    delta, dual_clip = options.get("delta"), options.get("dual_clip")
    losses = []
    for new, advantages, ratios in zip(batch.logprobs, batch.advantages, naive_ratios(batch, level), strict=True):
        for logprob, advantage, ratio in zip(new, advantages, ratios, strict=True):
            if loss_type == "cispo":
                weight = min(ratio.item(), 5.0 if epsilon_high is None else epsilon_high)
                losses.append(-weight * advantage * logprob)
            elif loss_type == "sapo":
                tau = 1.0 if advantage > 0 else 1.05
                losses.append(-4 / tau / (1 + (-tau * (ratio - 1)).exp()) * advantage)
            else:
                high = 1 + (epsilon if epsilon_high is None else epsilon_high)
                clipped = min(max(ratio, ratio.new_tensor(1 - epsilon)), ratio.new_tensor(high))
                first = ratio if delta is None else min(ratio, ratio.new_tensor(delta))
                objective = min(first * advantage, clipped * advantage)
                if dual_clip is not None and advantage < 0:
                    objective = max(objective, ratio.new_tensor(dual_clip * advantage))
                losses.append(-objective)
    return torch.stack(losses)


PAIRS = [(t, level) for t in LOSS_TYPES for level in IMPORTANCE_LEVELS if (t, level) != ("gspo", "token")]
OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": loss_type} for loss_type in LOSS_TYPES),
    *({"loss_type": loss_type, "epsilon": 0.1, "epsilon_high": 0.28} for loss_type in CLIPPED),
    *({"loss_type": loss_type, "delta": 1.5} for loss_type in CLIPPED),
    *({"loss_type": loss_type, "dual_clip": 1.3} for loss_type in CLIPPED),
    {"loss_type": "dapo", "dual_clip": 1.1},
    {"loss_type": "grpo", "delta": 1.6, "dual_clip": 1.4},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    *({"loss_type": loss_type, "importance_sampling_level": level} for loss_type, level in PAIRS),
]


class TestLoss:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_values_and_gradients_against_a_loop(self, options: dict[str, Any]) -> None:
        batch = draw()
        got, want = loss_of(batch, **options), naive_loss(batch, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        weights = torch.linspace(0.5, 2, len(want), dtype=torch.float64)
        (got_gradient,) = torch.autograd.grad((got * weights).sum(), batch.flat["leaf"], retain_graph=True)
        (want_gradient,) = torch.autograd.grad((want * weights).sum(), batch.flat["leaf"])
        torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-11, atol=1e-13)
        assert want_gradient.abs().max() > 0

    # The weight of cispo is a constant, which numerical derivatives do not know.
    @pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "cispo"])
    def test_gradcheck(self, loss_type: str) -> None:
        batch = draw(3)
        tensors = {k: v for k, v in batch.flat.items() if k not in ("leaf", "order", "logprobs_N")}
        leaf = batch.flat["logprobs_N"].detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda logprobs: policy_gradient_loss(logprobs, loss_type=loss_type, **tensors), (leaf,)
        )

    def test_by_hand(self) -> None:
        new = torch.tensor([0.9, 0.9, 0.3, 0.3, 0.5]).log()
        old = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.5]).log()
        advantages = torch.tensor([1.0, -2.0, 1.0, -2.0, 3.0])
        index = torch.zeros(5, dtype=torch.long)
        # Ratios 1.5, 1.5, 0.5, 0.5, 1.
        got = policy_gradient_loss(
            new, old_logprobs_N=old, advantages_N=advantages, sequence_index_N=index, num_sequences=1
        )
        torch.testing.assert_close(got, torch.tensor([-1.2, 3.0, -0.5, 1.6, -3.0]))

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_on_policy_gradient_is_the_policy_gradient(self, loss_type: str) -> None:
        """Before the first update every member of the family is -A grad log p, up to its importance level."""
        batch = draw(1)
        batch.flat["old_logprobs_N"] = None
        loss = loss_of(batch, loss_type=loss_type)
        (gradient,) = torch.autograd.grad(loss.sum(), batch.flat["leaf"])
        want = []
        for advantages in batch.advantages:
            mean = sum(advantages) / max(len(advantages), 1)
            want += [-(mean if loss_type in SEQUENCE_LEVEL else advantage) for advantage in advantages]
        torch.testing.assert_close(gradient, torch.tensor(want, dtype=torch.float64))

    def test_dual_clip_and_delta_agree_where_both_are_allowed(self) -> None:
        batch = draw(2, spread=2.0)
        torch.testing.assert_close(
            loss_of(batch, loss_type="dapo", delta=2.5), loss_of(batch, loss_type="dapo", dual_clip=2.5)
        )

    @pytest.mark.parametrize(("loss_type", "level"), PAIRS)
    def test_extreme_ratios_stay_finite(self, loss_type: str, level: str) -> None:
        new = torch.tensor([-1e4, -1e4, 0.0, 0.0, -1.0, -200.0, 0.0], requires_grad=True)
        old = torch.tensor([0.0, 0.0, -1e4, -1e4, -1.0, 0.0, -200.0])
        advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, -3.0, -3.0])
        loss = policy_gradient_loss(
            new,
            old_logprobs_N=old,
            advantages_N=advantages,
            sequence_index_N=torch.tensor([0, 1, 2, 3, 4, 5, 6]),
            num_sequences=7,
            loss_type=loss_type,
            importance_sampling_level=level,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        if loss_type in CLIPPED:
            assert gradient[3] > 1e12  # a bad token that became far more likely is still pushed down

    @pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
    def test_ratio_against_a_loop(self, level: str) -> None:
        batch = draw(4)
        ratio = importance_ratio(
            batch.flat["logprobs_N"],
            old_logprobs_N=batch.flat["old_logprobs_N"],
            sequence_index_N=batch.flat["sequence_index_N"],
            num_sequences=5,
            level=level,
        )
        want = torch.stack([r for ratios in naive_ratios(batch, level) for r in ratios])
        torch.testing.assert_close(ratio, want[batch.flat["order"]])


def naive_total(loss_type: str, losses: list[list[float]], constant: int) -> float:
    """The loss of a whole batch as its paper writes it."""
    tokens = sum(len(sequence) for sequence in losses)
    if loss_type in ("grpo", "gspo", "sapo"):
        return sum(sum(sequence) / max(len(sequence), 1) for sequence in losses) / len(losses)
    if loss_type in ("dapo", "bnpo", "cispo"):
        return sum(sum(sequence) for sequence in losses) / tokens
    divisor = len(losses) * (constant if loss_type == "dr_grpo" else 1)
    return sum(sum(sequence) for sequence in losses) / divisor


class TestAggregation:
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_any_split_and_order_gives_the_papers_mean(self, loss_type: str) -> None:
        generator = torch.Generator().manual_seed(5)
        lengths = [4, 1, 9, 0, 2, 6, 3]
        losses = [torch.randn(n, generator=generator, dtype=torch.float64).tolist() for n in lengths]
        want = naive_total(loss_type, losses, constant=16)
        for split in ([[0, 1, 2, 3, 4, 5, 6]], [[6, 0], [3], [5, 2, 1], [4]], [[i] for i in (4, 2, 6, 0, 1, 3, 5)]):
            total = 0.0
            for part in split:
                weights = aggregation_weights(
                    loss_type,
                    torch.tensor([lengths[i] for i in part]),
                    total_sequences=7,
                    total_tokens=25,
                    max_completion_length=16,
                    dtype=torch.float64,
                )
                total += sum(w * sum(losses[i]) for i, w in zip(part, weights.tolist(), strict=True))
            assert total == pytest.approx(want, rel=1e-13)

    def test_gspo_and_luspo_of_a_batch(self) -> None:
        """Mean over sequences of min(s A, clip(s) A), for luspo times the length, straight from the ratios."""
        batch = draw(6)
        advantages_S = [0.7, -1.1, 0.4, 2.0, -0.3]
        index = batch.flat["sequence_index_N"]
        batch.flat["advantages_N"] = torch.tensor(advantages_S, dtype=torch.float64)[index]
        lengths = [len(sequence) for sequence in batch.logprobs]
        for loss_type in SEQUENCE_LEVEL:
            terms = []
            for new, old, advantage in zip(batch.logprobs, batch.old, advantages_S, strict=True):
                if not new:
                    continue
                s = math.exp(sum(a.item() - b for a, b in zip(new, old, strict=True)) / len(new))
                term = min(s * advantage, min(max(s, 0.8), 1.2) * advantage)
                terms.append(-term * (len(new) if loss_type == "luspo" else 1))
            weights = aggregation_weights(
                loss_type, torch.tensor(lengths), total_sequences=5, total_tokens=sum(lengths), dtype=torch.float64
            )
            flat_weights = torch.repeat_interleave(weights, torch.tensor(lengths))
            got = (loss_of(batch, loss_type=loss_type) * flat_weights).sum().item()
            assert got == pytest.approx(sum(terms) / 5, rel=1e-12)

    def test_nothing_to_learn_from_divides_by_nothing(self) -> None:
        for loss_type in LOSS_TYPES:
            weights = aggregation_weights(
                loss_type, torch.zeros(3), total_sequences=3, total_tokens=0, max_completion_length=4
            )
            assert weights.tolist() == [0.0, 0.0, 0.0]

    def test_bnpo_is_dapo_on_the_global_batch(self) -> None:
        lengths = torch.tensor([2, 5])
        bnpo, dapo = (aggregation_weights(t, lengths, total_sequences=9, total_tokens=31) for t in ("bnpo", "dapo"))
        assert bnpo.tolist() == dapo.tolist() == [pytest.approx(1 / 31)] * 2


class TestClipStatistics:
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_against_a_loop(self, loss_type: str) -> None:
        batch = draw(7)
        level = default_importance_level(loss_type)
        ratios = naive_ratios(batch, level)
        low, high, count = [0.0] * 5, [0.0] * 5, [0.0] * 5
        for s, (values, advantages) in enumerate(zip(ratios, batch.advantages, strict=True)):
            for ratio, advantage in zip(values, advantages, strict=True):
                count[s] += 1
                if loss_type == "cispo":
                    high[s] += ratio.item() > 1.3
                elif loss_type != "sapo":
                    low[s] += ratio.item() < 0.9 and advantage < 0
                    high[s] += ratio.item() > 1.3 and advantage > 0
        ratio_N = torch.tensor([r.item() for values in ratios for r in values], dtype=torch.float64)
        arguments = {
            "advantages_N": batch.flat["advantages_N"],
            "sequence_index_N": batch.flat["sequence_index_N"],
            "num_sequences": 5,
            "loss_type": loss_type,
            "epsilon": 0.1,
            "epsilon_high": 1.3 if loss_type == "cispo" else 0.3,
        }
        got = clip_statistics(ratio_N[batch.flat["order"]], **arguments)
        assert got.low_S.tolist() == low
        assert got.high_S.tolist() == high
        assert got.count_S.tolist() == count
        once = clip_statistics(ratio_N[batch.flat["order"]], **arguments, per_sequence=True)
        assert once.count_S.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
        assert once.high_S.tolist() == pytest.approx([h / max(n, 1) for h, n in zip(high, count, strict=True)])
        assert once.low_S.tolist() == pytest.approx([h / max(n, 1) for h, n in zip(low, count, strict=True)])

    def test_statistics_carry_no_gradient(self) -> None:
        ratio = torch.ones(2, requires_grad=True)
        index = torch.zeros(2, dtype=torch.long)
        got = clip_statistics(ratio, advantages_N=torch.ones(2), sequence_index_N=index, num_sequences=1)
        assert not any(sums.requires_grad for sums in got)


def test_sequence_sum_of_interleaved_tokens() -> None:
    got = sequence_sum(
        torch.tensor([1.0, 10.0, 2.0, 20.0]), sequence_index_N=torch.tensor([0, 2, 0, 2]), num_sequences=4
    )
    assert got.tolist() == [3.0, 0.0, 30.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grop"}, r"loss_type is 'grop'; it must be one of .*; did you mean 'grpo'"),
        ({"loss_type": "gspo", "importance_sampling_level": "token"}, "makes gspo what grpo is"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level is 'batch'; it must be one of"),
        ({"epsilon": 0.0}, r"epsilon=0.0 is outside \(0, 1\)"),
        ({"epsilon": 1.5}, r"epsilon=1.5 is outside \(0, 1\)"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1; it must be above 0"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high=0.28 is below 1: for cispo"),
        ({"delta": 1.1}, "delta=1.1 is not above 1 \\+ epsilon_high = 1.2"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 is not above 1"),
        ({"loss_type": "sapo", "delta": 4.0}, "loss_type='sapo' has no clipped surrogate"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos is 0.0"),
        ({"advantages_N": torch.ones(2)}, "shape"),
        ({"old_logprobs_N": torch.ones(4)}, "shape"),
    ],
)
def test_refusals_are_one_line(options: dict[str, Any], message: str) -> None:
    zeros = torch.zeros(3)
    call = {
        "old_logprobs_N": zeros,
        "advantages_N": zeros,
        "sequence_index_N": torch.zeros(3, dtype=torch.long),
        "num_sequences": 1,
        **options,
    }
    with pytest.raises(ValueError, match=message) as caught:
        policy_gradient_loss(zeros, **call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dr_grpo"}, "max_completion_length=None is not 1 or more"),
        ({"total_sequences": 1}, "total_sequences=1 is less than the 2 given"),
        ({"loss_type": "vespo"}, "loss_type is 'vespo'; it must be one of"),
    ],
)
def test_refused_totals(options: dict[str, Any], message: str) -> None:
    call = {"loss_type": "grpo", "lengths_S": torch.ones(2), "total_sequences": 2, "total_tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        aggregation_weights(**call)
