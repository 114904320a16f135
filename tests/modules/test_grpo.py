"""GRPOModule against a naive computation with full logits, one unshared completion at a time."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import GRPOModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.rl import PolicyLoss
from rlhf_lightning.sequences import Example

from ..helpers import save_tiny_model
from ..rl.fixed_rollouts import FixedGRPO, fixed_completions, options, picky, prompts, remainder
from .naive import Step, assert_gradient, naive_model, step

GROUP, ROWS = 5, 6
Tokens = list[list[tuple[Tensor, Tensor]]]  # log-probs and entropies of every completion of every prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    return naive_model(folder, moved=0.05)


def grpo(folder: str, **given: Any) -> FixedGRPO:
    return FixedGRPO(folder, **options(num_generations=GROUP, **given))


def samples() -> list[tuple[Example, list[Completion]]]:
    return [(row, fixed_completions(row.row_id, GROUP)) for row in prompts(ROWS)]


def look(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs of a completion's tokens and the entropies there, from the full softmax."""
    tokens = torch.tensor([*prompt, *completion])
    log_p = (model(input_ids=tokens[None]).logits[0] / temperature).log_softmax(dim=-1)
    log_p = log_p[len(prompt) - 1 : -1]
    return log_p[torch.arange(len(completion)), completion], -(log_p.exp() * log_p).sum(dim=1)


def look_at_all(model: Any, temperature: float = 1.0) -> Tokens:
    return [
        [look(model, row.root.tokens.tolist(), sample.token_ids, temperature) for sample in group]
        for row, group in samples()
    ]


def naive_rewards() -> list[list[float]]:
    """Weighted sums; a reward without an opinion counts as 0 next to one with."""
    totals = []
    for _, group in samples():
        ids = [sample.token_ids for sample in group]
        pairs = zip(remainder(ids), picky(ids), strict=True)
        totals.append([first + 0.5 * (second or 0.0) for first, second in pairs])
    return totals


def mean_and_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def naive_advantages(rewards: list[list[float]]) -> list[list[float]]:
    found = []
    for group in rewards:
        mean, std = mean_and_std(group)
        found.append([(value - mean) / (std + 1e-4) for value in group])
    return found


def tokens_of(groups: Tokens, token_loss: Callable[[int, int, Tensor, Tensor], Tensor]) -> list[list[Tensor]]:
    """Applies a loss of one completion's tokens to all: row, sample, log-probs, entropies."""
    return [
        [token_loss(r, s, logprobs, entropy) for s, (logprobs, entropy) in enumerate(group)]
        for r, group in enumerate(groups)
    ]


def mean_over_tokens(losses: list[list[Tensor]]) -> Tensor:
    return torch.cat([loss for group in losses for loss in group]).mean()


def mean_over_completions(losses: list[list[Tensor]]) -> Tensor:
    return torch.stack([loss.mean() for group in losses for loss in group]).mean()


def compare(found: Step, policy: Any, loss: Tensor) -> None:
    policy.zero_grad()
    loss.backward()
    loss = loss.detach()
    assert_gradient(found.gradient, policy)
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    policy.zero_grad()


def reinforce(advantages: list[list[float]]) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    """The loss of a policy that has not moved: its gradient is that of -A log p, its value -A."""

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return -advantages[row][sample] * (logprobs - logprobs.detach() + 1)

    return token_loss


AGGREGATED: dict[str, Callable[[list[list[Tensor]]], Tensor]] = {
    "dapo": mean_over_tokens,
    "grpo": mean_over_completions,
    "dr_grpo": lambda losses: torch.cat([t for g in losses for t in g]).sum() / (ROWS * GROUP * 10),
    "luspo": lambda losses: torch.cat([t for g in losses for t in g]).sum() / (ROWS * GROUP),
}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_first_update(loss_type: str, folder: str, policy: Any) -> None:
    found = step(grpo(folder, loss={"loss_type": loss_type}), prompts(ROWS), policy)
    losses = tokens_of(look_at_all(policy), reinforce(naive_advantages(naive_rewards())))
    compare(found, policy, AGGREGATED[loss_type](losses))


def test_sequence_level(folder: str, policy: Any) -> None:
    found = step(grpo(folder, loss={"loss_type": "luspo"}), prompts(ROWS), policy)
    advantages = naive_advantages(naive_rewards())

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        ratio = (logprobs - logprobs.detach()).mean().exp()
        return -advantages[row][sample] * ratio * torch.ones_like(logprobs)

    compare(found, policy, AGGREGATED["luspo"](tokens_of(look_at_all(policy), token_loss)))


def test_kl_entropy_and_temperature(folder: str, policy: Any) -> None:
    found = step(grpo(folder, beta=0.3, entropy={"coef": 0.1}, temperature=0.7), prompts(ROWS), policy)
    with torch.no_grad():
        reference = look_at_all(naive_model(folder), 0.7)
    advantages = naive_advantages(naive_rewards())
    now = look_at_all(policy, 0.7)
    divergences = []

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        gap = reference[row][sample][0] - logprobs
        kl = gap.exp() - 1 - gap
        divergences.append(kl.detach())
        ratio = (logprobs - logprobs.detach()).exp()
        return -advantages[row][sample] * ratio + 0.3 * kl * ratio - 0.1 * entropy

    compare(found, policy, mean_over_tokens(tokens_of(now, token_loss)))
    assert found.metrics["train/kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-5)
    entropies = torch.cat([entropy for group in now for _, entropy in group])
    assert found.metrics["train/entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)


def test_kl_in_the_reward(folder: str, policy: Any) -> None:
    found = step(
        grpo(
            folder,
            beta=0.3,
            kl={"in_reward": True, "estimator": "k1"},
            loss={"mask_truncated_completions": True},
        ),
        prompts(ROWS),
        policy,
    )
    now = look_at_all(policy)
    with torch.no_grad():
        reference = look_at_all(naive_model(folder))
        rewards = [
            [reward - 0.3 * float((now[r][s][0] - reference[r][s][0]).sum()) for s, reward in enumerate(group)]
            for r, group in enumerate(naive_rewards())
        ]
    losses = tokens_of(now, reinforce(naive_advantages(rewards)))
    # Completions cut off by the limit are in the statistics, and not in the loss.
    kept = [
        [loss for loss, sample in zip(group, drawn, strict=True) if sample.finish_reason == "stop"]
        for group, (_, drawn) in zip(losses, samples(), strict=True)
    ]
    assert sum(map(len, kept)) < ROWS * GROUP
    compare(found, policy, mean_over_tokens(kept))


def test_truncated_completions_count_as_completions(folder: str, policy: Any) -> None:
    found = step(grpo(folder, loss={"loss_type": "grpo", "mask_truncated_completions": True}), prompts(ROWS), policy)
    losses = tokens_of(look_at_all(policy), reinforce(naive_advantages(naive_rewards())))
    kept = [
        loss.mean()
        for group, (_, drawn) in zip(losses, samples(), strict=True)
        for loss, sample in zip(group, drawn, strict=True)
        if sample.finish_reason == "stop"
    ]
    compare(found, policy, torch.stack(kept).sum() / (ROWS * GROUP))


def test_batch_scale_and_leave_one_out(folder: str, policy: Any) -> None:
    found = step(
        grpo(folder, advantages={"scale_rewards": "batch", "baseline": "leave_one_out"}), prompts(ROWS), policy
    )
    rewards = naive_rewards()
    _, std = mean_and_std([value for group in rewards for value in group])
    advantages = [[(value - (sum(group) - value) / (GROUP - 1)) / (std + 1e-4) for value in group] for group in rewards]
    compare(found, policy, mean_over_tokens(tokens_of(look_at_all(policy), reinforce(advantages))))


def test_rewards_normalised_apart(folder: str, policy: Any) -> None:
    found = step(grpo(folder, advantages={"multi_objective_aggregation": "normalize_then_sum"}), prompts(ROWS), policy)
    totals = []
    for _, group in samples():
        ids = [sample.token_ids for sample in group]
        total = [0.0] * GROUP
        for weight, values in ((1.0, remainder(ids)), (0.5, picky(ids))):
            scored = [value for value in values if value is not None]
            if len(set(scored)) < 2:
                continue
            mean, std = mean_and_std(scored)
            for n, value in enumerate(values):
                total[n] += 0.0 if value is None else weight * (value - mean) / (std + 1e-4)
        totals.append(total)
    mean, std = mean_and_std([value for group in totals for value in group])
    advantages = [[(value - mean) / (std + 1e-4) for value in group] for group in totals]
    compare(found, policy, mean_over_tokens(tokens_of(look_at_all(policy), reinforce(advantages))))


def test_uncertain_tokens_alone(folder: str, policy: Any) -> None:
    found = step(grpo(folder, entropy={"top_quantile": 0.3}), prompts(ROWS), policy)
    now = look_at_all(policy)
    threshold = torch.cat([entropy.detach() for group in now for _, entropy in group]).quantile(0.7)
    plain = reinforce(naive_advantages(naive_rewards()))

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return plain(row, sample, logprobs, entropy) * (entropy.detach() >= threshold)

    compare(found, policy, mean_over_tokens(tokens_of(now, token_loss)))


def test_correction_for_the_engine(folder: str, policy: Any) -> None:
    given = {"correction": "sequence_mask", "mask_threshold": 0.8, "max": 2.0}
    found = step(grpo(folder, off_policy=given), prompts(ROWS), policy)
    advantages, drawn = naive_advantages(naive_rewards()), samples()
    weights, dropped = [], 0

    def token_loss(row: int, sample: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        nonlocal dropped
        gap = logprobs.detach() - torch.tensor(drawn[row][1][sample].logprobs, dtype=torch.float64)
        weight = float(gap.sum().exp())
        weight = weight if weight <= 2.0 else 0.0
        weights.append(torch.full_like(gap, weight))
        if advantages[row][sample] < 0 and -float(gap.mean()) > 0.8:
            dropped += 1
            weight = 0.0
        return -advantages[row][sample] * weight * (logprobs - logprobs.detach() + 1)

    compare(found, policy, mean_over_tokens(tokens_of(look_at_all(policy), token_loss)))
    assert 0 < dropped < ROWS * GROUP
    ratio = float(torch.cat(weights).mean())
    assert found.metrics["train/sampling/importance_sampling_ratio/mean"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_several_updates(num_mini_batches: int, folder: str, policy: Any) -> None:
    """Two passes with ratios that leave the clipping range, stepped by hand."""
    module = grpo(
        folder, num_updates=2, num_mini_batches=num_mini_batches, loss=PolicyLoss(epsilon=0.1, epsilon_high=0.2)
    )
    parts: list[list[str]] = []
    optimize = module.optimize

    def watched(examples: list[Example]) -> Any:
        parts.append([example.fields["prompt_id"] for example in examples])
        return optimize(examples)

    module.optimize = watched  # type: ignore[method-assign, assignment]
    found = step(module, prompts(ROWS), policy)
    ids = [row.row_id for row in prompts(ROWS)]
    for first in range(0, len(parts), num_mini_batches):
        every = [row for part in parts[first : first + num_mini_batches] for row in part]
        assert sorted(every) == ids

    advantages = naive_advantages(naive_rewards())
    model = copy.deepcopy(policy)
    with torch.no_grad():
        old = look_at_all(model)
    losses, tokens, clipped = 0.0, 0, 0
    for part in parts:
        chosen = [ids.index(row) for row in part]
        now = look_at_all(model)
        values = []
        for r in chosen:
            for s, (logprobs, _) in enumerate(now[r]):
                for t in range(len(logprobs)):
                    ratio, advantage = (logprobs[t] - old[r][s][0][t]).exp(), advantages[r][s]
                    bounded = min(max(ratio, torch.tensor(0.9)), torch.tensor(1.2))
                    values.append(-min(ratio * advantage, bounded * advantage))
                    clipped += bool((ratio < 0.9 and advantage < 0) or (ratio > 1.2 and advantage > 0))
        loss = torch.stack(values).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        losses, tokens = losses + float(loss) * len(values), tokens + len(values)
    for (name, before), after in zip(policy.named_parameters(), model.parameters(), strict=True):
        moved = before - after
        error = float((found.gradient[f"model.{name}"] - moved).norm())
        assert error <= 1e-9 * max(float(moved.norm()), 1e-4), name
    assert found.metrics["train/loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert 0 < clipped / tokens < 1
    assert found.metrics["train/clip_ratio/region_mean"] == pytest.approx(clipped / tokens, rel=1e-5)


def test_what_is_logged_of_rollouts(folder: str, policy: Any) -> None:
    metrics = step(grpo(folder), prompts(ROWS), policy).metrics
    rewards = naive_rewards()
    every = [value for group in rewards for value in group]
    drawn = [sample for _, group in samples() for sample in group]
    lengths = [len(sample.token_ids) for sample in drawn]
    ended = [len(sample.token_ids) for sample in drawn if sample.finish_reason == "stop"]
    opinions = [value for value in picky([sample.token_ids for sample in drawn]) if value is not None]
    mean, std = mean_and_std(opinions)
    expected = {
        "reward": sum(every) / len(every),
        "reward_std": sum(mean_and_std(group)[1] for group in rewards) / ROWS,
        "frac_reward_zero_std": sum(len(set(group)) == 1 for group in rewards) / ROWS,
        "rewards/picky/mean": mean,
        "rewards/picky/std": std,
        "rewards/picky/scored": len(opinions) / len(every),
        "rewards/picky/failures": 0.0,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "clip_ratio/region_mean": 0.0,
    }
    assert {name: metrics[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-6)


class DrawnAgain(FixedGRPO):
    """Groups of rows whose number is even have equal completions, whatever they are drawn with."""

    def generate(self, prompts: Any, seeds: Any) -> list[list[Completion]]:
        groups = super().generate(prompts, seeds)
        return [
            [group[0]] * GROUP if int(row.row_id.split(":")[1]) % 2 == 0 else group
            for row, group in zip(prompts, groups, strict=True)
        ]


def test_dynamic_sampling(folder: str) -> None:
    """Groups that teach nothing are replaced by those of other prompts of the training data."""
    module = DrawnAgain(folder, **options(num_generations=GROUP, dynamic_sampling=8))
    pool = prompts(40)

    class Loader:
        examples = pool

    class Run:
        train_dataloader = Loader()

    module.configure_model()
    module._trainer = Run()  # type: ignore[assignment]
    module.__class__.trainer = property(lambda self: self._trainer)  # type: ignore[method-assign, assignment]
    rollouts = module.rollout(pool[:ROWS])
    kept = [n for n in range(ROWS) if n % 2]
    assert [rollouts.prompts[n].row_id for n in kept] == [pool[n].row_id for n in kept]
    assert all(int(prompt.row_id.split(":")[1]) % 2 for prompt in rollouts.prompts)
    assert module._replaced >= ROWS / 2
    again = module.rollout(pool[:ROWS])
    assert [p.row_id for p in again.prompts] == [p.row_id for p in rollouts.prompts]
    one_by_one = [module.rollout([pool[n]]).prompts[0].row_id for n in range(ROWS)]
    assert one_by_one == [p.row_id for p in rollouts.prompts]
    assert [p.row_id for p in module.rollout(pool[:ROWS], stage="val").prompts] == [p.row_id for p in pool[:ROWS]]


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_generations": 1}, "num_generations is 1, and a group of one has no advantage over itself: use 2 or more"),
    ({"loss.epsilon": 1.5}, "epsilon=1.5 is outside (0, 1)"),
    ({"loss.delta": 1.1}, "delta=1.1 is not above 1 + epsilon_high = 1.2"),
    ({"loss.loss_type": "dappo"}, "did you mean 'dapo'?"),
    ({"loss.loss_type": "cispo", "loss.dual_clip": 3.0}, "has no clipped surrogate"),
    ({"beta": -0.1}, "beta is -0.1; it must be at least 0"),
    ({"kl.in_reward": True}, "kl.in_reward is true but beta is 0"),
    ({"beta": 0.1, "kl.estimator": "k1", "kl.bias_correction": False}, "whose gradient in the loss is 0"),
    ({"entropy.top_quantile": 0.0}, "entropy.top_quantile=0.0 is outside (0, 1]"),
    ({"off_policy.correction": "token"}, "off_policy.correction is 'token'; it must be one of"),
    (
        {"advantages.scale_rewards": "batch", "advantages.multi_objective_aggregation": "normalize_then_sum"},
        "at their defaults",
    ),
    ({"dynamic_sampling": -1}, "dynamic_sampling is -1; it must be at least 0"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ({"sampling.top_p": 0.0}, "sampling.top_p=0.0 is not allowed"),
    ({"reference": "precomputed"}, "reference is 'precomputed'; it must be one of auto, frozen, adapter"),
    ({"rewards": []}, "rewards is empty; give at least one"),
    ({"rewards": "a.b"}, "it must be a list: write ['a.b']"),
    ({"rewards": ["rlhf_lightning.rewards.exact_answer.exact"]}, "has nothing called 'exact'"),
    ({"reward_weights": [1.0]}, "weights has 1 entries for 2 rewards"),
]


@pytest.mark.parametrize(
    ("given", "message"), BAD_OPTIONS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        GRPOModule("nowhere", **options(**given))
    assert "\n" not in str(error.value)


def test_dynamic_sampling_needs_prompts(folder: str) -> None:
    with pytest.raises(ValueError, match="dynamic_sampling is 2, which needs all prompts at once"):
        step(grpo(folder, dynamic_sampling=2), prompts(2))


def test_nothing_to_learn(folder: str, policy: Any) -> None:
    """Equal rewards leave the weights alone, and are reported."""
    module = FixedGRPO(folder, rewards=[lambda completions: [1.0] * len(completions)], max_completion_length=10)
    found = step(module, prompts(3), policy)
    assert all(float(gradient.norm()) == 0 for gradient in found.gradient.values())
    assert found.metrics["train/frac_reward_zero_std"] == 1.0
