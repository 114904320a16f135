"""PPOModule against a naive computation: one completion at a time, with full logits, by loops over tokens."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_lightning import PPOModule, ProcessRewardModule, RewardModule
from rlhf_lightning.rl import GAE
from rlhf_lightning.sequences import Example

from ..helpers import EOS_ID, save_tiny_model
from ..rl.fixed_rollouts import FixedPPO, fixed_completions, options, picky, prompts, remainder
from .naive import assert_gradient, naive_model, states, step

GROUP, ROWS = 2, 6
KL_COEF, GAMMA, LAMBDA, VF_COEF = 0.3, 0.98, 0.9, 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


class Naive(torch.nn.Module):
    """A policy with a linear value head; on a backbone of its own if one is given."""

    def __init__(self, model: Any, head: Tensor, critic: Any = None) -> None:
        super().__init__()
        self.model = model
        self.head = torch.nn.Parameter(head.clone())
        self.own = critic

    def look(self, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropies and values of a completion's tokens."""
        tokens = torch.tensor([*prompt, *completion])
        log_p = self.model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)[len(prompt) - 1 : -1]
        logprobs = log_p[torch.arange(len(completion)), completion]
        hidden = states(self.model if self.own is None else self.own, prompt, completion)[len(prompt) - 1 : -1]
        return logprobs, -(log_p.exp() * log_p).sum(dim=1), hidden @ self.head


class Sample(NamedTuple):
    row: Example
    tokens: list[int]
    reward: float
    ended: bool


def samples() -> list[Sample]:
    found = []
    for row in prompts(ROWS):
        for sample in fixed_completions(row.row_id, GROUP):
            first, second = remainder([sample.token_ids])[0], picky([sample.token_ids])[0]
            reward = first + 0.5 * (second or 0.0)
            found.append(Sample(row, sample.token_ids, reward, sample.finish_reason == "stop"))
    return found


@pytest.fixture(scope="module")
def head() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 8


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    return naive_model(folder, moved=0.05)


def made(folder: str, head: Tensor, **given: Any) -> FixedPPO:
    """The module, with the weights of the naive head in its own."""

    class Headed(FixedPPO):
        def configure_model(self) -> None:
            fresh = self.model is None
            super().configure_model()
            if fresh:
                assert self.critic is not None
                assert float(self.critic.head.weight.abs().sum()) == 0, "values must start at 0"
                with torch.no_grad():
                    self.critic.head.weight.copy_(head.view(1, 1, -1))

    settings = {
        "num_generations": GROUP,
        "num_updates": 1,
        "kl_coef": KL_COEF,
        "gae.gamma": GAMMA,
        "gae.lam": LAMBDA,
        "value.coef": VF_COEF,
        **given,
    }
    return Headed(folder, **options(**settings))


class Fixed(NamedTuple):
    """Tensors that are fixed during the updates, per sample."""

    logprobs: list[Tensor]
    values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]
    kl: list[Tensor]


def naive_fixed(
    naive: Naive, reference: Any, *, penalty: float = 0.0, whiten_rewards: bool = False, k3: bool = False
) -> Fixed:
    """Rewards of tokens, advantages and returns by their recursions."""
    found = Fixed([], [], [], [], [])
    rewards = []
    ref = Naive(reference, naive.head.detach())
    with torch.no_grad():
        for sample in samples():
            prompt = sample.row.root.tokens.tolist()
            logprobs, _, values = naive.look(prompt, sample.tokens)
            gap = logprobs - ref.look(prompt, sample.tokens)[0]
            kl = (-gap).exp() - 1 + gap if k3 else gap
            reward = -KL_COEF * kl
            reward[-1] += sample.reward - (0.0 if sample.ended else penalty)
            found.logprobs.append(logprobs)
            found.values.append(values)
            found.kl.append(kl)
            rewards.append(reward)
    if whiten_rewards:
        every = torch.cat(rewards)
        rewards = [(r - every.mean()) / torch.sqrt(every.var() + 1e-8) + every.mean() for r in rewards]
    for reward, values in zip(rewards, found.values, strict=True):
        advantages = torch.zeros_like(values)
        last = 0.0
        for t in reversed(range(len(values))):
            after = float(values[t + 1]) if t + 1 < len(values) else 0.0
            last = float(reward[t]) + GAMMA * after - float(values[t]) + GAMMA * LAMBDA * last
            advantages[t] = last
        found.advantages.append(advantages)
        found.returns.append(advantages + values)
    return found


def whitened(parts: list[Tensor]) -> list[Tensor]:
    every = torch.cat(parts)
    return [(part - every.mean()) / torch.sqrt(every.var() + 1e-8) for part in parts]


def naive_loss(
    naive: Naive, fixed: Fixed, chosen: list[int], *, entropy_coef: float = 0.0, cliprange: float | None = 0.2
) -> dict[str, Tensor]:
    """The losses of some samples' tokens: clipped policy gradient, clipped value, entropy."""
    advantages = whitened(fixed.advantages)
    policy, value, entropies = [], [], []
    for n in chosen:
        sample = samples()[n]
        logprobs, entropy, values = naive.look(sample.row.root.tokens.tolist(), sample.tokens)
        entropies.append(entropy)
        for t in range(len(sample.tokens)):
            ratio, advantage = (logprobs[t] - fixed.logprobs[n][t]).exp(), advantages[n][t]
            policy.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            error = (values[t] - fixed.returns[n][t]) ** 2
            if cliprange is not None:
                near = fixed.values[n][t] + (values[t] - fixed.values[n][t]).clamp(-cliprange, cliprange)
                error = torch.maximum(error, (near - fixed.returns[n][t]) ** 2)
            value.append(error / 2)
    parts = {
        "policy": torch.stack(policy).mean(),
        "value": torch.stack(value).mean(),
        "entropy": torch.cat(entropies).mean(),
    }
    return parts | {"loss": parts["policy"] + VF_COEF * parts["value"] - entropy_coef * parts["entropy"]}


def compare(found: Any, naive: Naive, loss: Tensor) -> None:
    naive.zero_grad()
    loss.backward()
    assert_gradient(found.gradient, naive.model)
    own = found.gradient["critic.head.weight"][0, 0]
    assert naive.head.grad is not None
    assert float((own - naive.head.grad).norm()) < 1e-10 * float(naive.head.grad.norm())
    assert found.metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "penalty": ({"missing_eos_penalty": 0.7}, {"penalty": 0.7}, {}),
    "whitened-rewards": ({"gae.whiten_rewards": True}, {"whiten_rewards": True}, {}),
    "k3": ({"kl.estimator": "k3"}, {"k3": True}, {}),
    "entropy": ({"entropy.coef": 0.05}, {}, {"entropy_coef": 0.05}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_update(variant: str, folder: str, policy: Any, head: Tensor) -> None:
    given, fixing, losing = VARIANTS[variant]
    found = step(made(folder, head, **given), prompts(ROWS), policy)
    naive = Naive(copy.deepcopy(policy), head)
    fixed = naive_fixed(naive, naive_model(folder), **fixing)
    parts = naive_loss(naive, fixed, list(range(ROWS * GROUP)), **losing)
    compare(found, naive, parts["loss"])
    [sample.reward - (0 if sample.ended else fixing.get("penalty", 0)) for sample in samples()]
    logged = {
        "loss/policy_avg": float(parts["policy"]),
        "loss/value_avg": float(parts["value"]),
        "entropy": float(parts["entropy"]),
        "objective/kl": sum(float(kl.sum()) for kl in fixed.kl) / len(fixed.kl),
        "kl": float(torch.cat(fixed.kl).mean()),
        "objective/entropy": -sum(float(p.sum()) for p in fixed.logprobs) / len(fixed.logprobs),
        "objective/scores": sum(s.reward - (0 if s.ended else fixing.get("penalty", 0)) for s in samples())
        / len(fixed.kl),
        "completions/num_eos": sum(s.ended for s in samples()),
        "kl_coef": KL_COEF,
        "policy/ratio": 1.0,
    }
    logged["objective/non_score_reward"] = -KL_COEF * logged["objective/kl"]
    logged["objective/rlhf_reward"] = logged["objective/non_score_reward"] + logged["objective/scores"]
    returns, values = torch.cat(fixed.returns), torch.cat(fixed.values)
    logged["explained_variance"] = 1 - float((returns - values).var() / returns.var())
    assert {name: found.metrics[f"train/{name}"] for name in logged} == pytest.approx(logged, rel=1e-5, abs=1e-6)


def test_epochs_and_mini_batches(folder: str, policy: Any, head: Tensor) -> None:
    """Two passes of two steps each, with ratios and values that leave their clipping ranges, stepped by hand."""
    module = made(folder, head, num_updates=2, num_mini_batches=2, **{"value.cliprange": 0.05})
    parts: list[list[str]] = []
    optimize = module.optimize

    def watched(examples: list[Example]) -> Any:
        parts.append([example.fields["prompt_id"] for example in examples])
        return optimize(examples)

    module.optimize = watched  # type: ignore[method-assign, assignment]
    found = step(module, prompts(ROWS), policy)
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    naive = Naive(copy.deepcopy(policy), head)
    fixed = naive_fixed(naive, naive_model(folder))
    tokens, clipped = 0, 0
    for part in parts:
        chosen = [n for n, sample in enumerate(samples()) if sample.row.row_id in part]
        naive.zero_grad()
        naive_loss(naive, fixed, chosen, cliprange=0.05)["loss"].backward()
        with torch.no_grad():
            for n in chosen:
                _, _, values = naive.look(samples()[n].row.root.tokens.tolist(), samples()[n].tokens)
                near = fixed.values[n] + (values - fixed.values[n]).clamp(-0.05, 0.05)
                clipped += int(((near - fixed.returns[n]) ** 2 > (values - fixed.returns[n]) ** 2).sum())
                tokens += len(values)
            for parameter in naive.parameters():
                parameter -= parameter.grad
    for (name, before), after in zip(policy.named_parameters(), naive.model.parameters(), strict=True):
        moved = before - after
        assert float((found.gradient[f"model.{name}"] - moved).norm()) <= 1e-9 * max(float(moved.norm()), 1e-4), name
    assert torch.allclose(found.gradient["critic.head.weight"][0, 0], head - naive.head, rtol=1e-9, atol=1e-12)
    assert 0 < clipped / tokens < 1
    assert found.metrics["train/value/clip_frac"] == pytest.approx(clipped / tokens, rel=1e-5)


def test_critic_with_a_backbone_of_its_own(folder: str, policy: Any, head: Tensor, tmp_path: Path) -> None:
    other = str(save_tiny_model(tmp_path, "gpt2", seed=7, initializer_range=0.1))
    found = step(made(folder, head, **{"value.model": other}), prompts(ROWS), policy)
    naive = Naive(copy.deepcopy(policy), head, naive_model(other))
    parts = naive_loss(naive, naive_fixed(naive, naive_model(folder)), list(range(ROWS * GROUP)))
    compare(found, naive, parts["loss"])
    assert_gradient(found.gradient, naive.own.transformer, prefix="critic.model.transformer.")


@pytest.mark.parametrize("own", [False, True])
def test_the_critic_warms_up_alone(own: bool, folder: str, policy: Any, head: Tensor) -> None:
    """The policy stays as it is, a shared backbone too; the head learns as it would."""
    given: dict[str, Any] = {"value.model": folder} if own else {}
    found = step(made(folder, head, **{"value.warmup_iterations": 1}, **given), prompts(ROWS), policy)
    assert all(float(g.norm()) == 0 for name, g in found.gradient.items() if name.startswith("model."))
    without = step(made(folder, head, **given), prompts(ROWS), policy)
    names = [name for name in found.gradient if name.startswith("critic.")]
    assert len(names) > 10 if own else names == ["critic.head.weight"]
    for name in names:
        assert torch.allclose(found.gradient[name], without.gradient[name], rtol=1e-9, atol=1e-12)


def test_critic_from_a_reward_model(folder: str, tmp_path: Path) -> None:
    rewarder = RewardModule(folder, head="mlp")
    rewarder.configure_model()
    with torch.no_grad():
        rewarder.model.get_input_embeddings().weight.add_(0.1)
    rewarder.save_pretrained(str(tmp_path / "rm"))
    module = FixedPPO(folder, **options(value={"model": str(tmp_path / "rm")}))
    module.configure_model()
    assert module.critic is not None
    assert all(torch.equal(p, rewarder.head.state_dict()[n]) for n, p in module.critic.head.state_dict().items())
    embeddings = module.critic.model.get_input_embeddings().weight
    assert torch.equal(embeddings, rewarder.model.get_input_embeddings().weight)
    assert not torch.equal(embeddings, module.model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_values_start_as_the_rewards_of_an_ensemble(kind: Any, folder: str, tmp_path: Path) -> None:
    """Several members and attributes: the value at the last token is the reward model's reward."""
    names = {"attributes": ["a", "b"], "attribute_weights": [0.3, 0.7], "num_attributes": 2}
    rewarder = RewardModule(folder, head=kind, num_models=3, **names)
    rewarder.configure_model()
    rewarder.reward_model.means.update(torch.randn(4, 2, 3, 2))
    rewarder.save_pretrained(str(tmp_path / "rm"))
    module = FixedPPO(folder, **options(value={"model": str(tmp_path / "rm")}))
    module.configure_model()
    assert module.critic is not None
    tokens = rewarder.tokenizer("1+1=2")["input_ids"]
    with torch.no_grad():
        hidden = module.critic.model.transformer(input_ids=torch.tensor([[*tokens, EOS_ID]])).last_hidden_state[0]
        values = module.critic.values(hidden)
    assert float(values[-1]) == pytest.approx(rewarder.score(["1+1="], ["2"])[0], abs=1e-5)


def test_what_no_critic_can_start_from(folder: str, tmp_path: Path) -> None:
    ProcessRewardModule(folder).save_pretrained(str(tmp_path / "prm"))
    RewardModule(folder, num_models=2, ensemble="adapters", lora={"r": 2}).save_pretrained(str(tmp_path / "rm"))
    for name, message in {
        "prm": "holds a process_reward model: give a reward model, or a language model",
        "rm": "is an ensemble of 2 adapters, which no critic can be: give a reward model with ensemble='heads'",
    }.items():
        module = FixedPPO(folder, **options(value={"model": str(tmp_path / name)}))
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            module.configure_model()
        assert "\n" not in str(error.value)


def test_learning_rate_of_the_critic(folder: str) -> None:
    # Without decay: with it, norms and biases are in groups of their own (tests/faults/test_b9_suspected.py).
    plain = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    module = FixedPPO(folder, **options(value={"lr_ratio": 10.0}, optimizer=plain))
    module.configure_model()
    optimizer: Any = module.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, pytest.approx(1e-2)]
    assert module.critic is not None
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in module.critic.parameters()]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


def test_adaptive_weight_of_the_divergence(folder: str, policy: Any, head: Tensor) -> None:
    """Ziegler et al.: coef (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon), after each iteration."""
    module = made(folder, head, kl={"target": 0.01, "horizon": 40})
    found = step(module, prompts(ROWS), policy)
    kl = found.metrics["train/objective/kl"]
    assert kl / 0.01 - 1 > 0.2, "the case would not show the clipping"
    assert found.metrics["train/kl_coef"] == pytest.approx(KL_COEF)
    assert module.controller.coef == pytest.approx(KL_COEF * (1 + 0.2 * ROWS * GROUP / 40))


def test_no_reference_without_a_penalty(folder: str) -> None:
    module = FixedPPO(folder, **options(kl_coef=0.0))
    module.configure_model()
    assert not module.has_reference
    metrics = step(module, prompts(2)).metrics
    assert "train/objective/kl" not in metrics
    asked = FixedPPO(folder, **options(kl_coef=0.0, reference="frozen"))
    assert "train/objective/kl" in step(asked, prompts(2)).metrics


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"gae.gamma": 1.1}, "gae.gamma=1.1 is outside [0, 1]"),
    ({"gae.lam": -0.1}, "gae.lam=-0.1 is outside [0, 1]"),
    ({"value.cliprange": 0.0}, "value.cliprange is 0.0; it must be above 0"),
    ({"loss.epsilon": 0.0}, "epsilon=0.0 is outside (0, 1)"),
    ({"value.coef": -1.0}, "value.coef is -1.0; it must be at least 0"),
    ({"kl_coef": -0.1}, "kl_coef=-0.1 is not a finite number of at least 0"),
    ({"kl.target": 0.0}, "kl.target is 0.0; it must be above 0"),
    ({"kl.estimator": "k2"}, "kl.estimator is 'k2'; it must be one of k1, k3"),
    ({"value.head": "deep"}, "value.head is 'deep'; it must be one of linear, mlp"),
    ({"value.lr_ratio": 0.0}, "value.lr_ratio is 0.0; it must be above 0"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0; it must be at least 0"),
    ({"num_mini_batches": 0}, "num_mini_batches is 0; it must be a whole number of at least 1"),
    ({"num_generations": 0}, "num_generations is 0; it must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("given", "message"), BAD_OPTIONS, ids=[next(iter(given)) for given, _ in BAD_OPTIONS])
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        PPOModule("nowhere", **options(**given))
    assert "\n" not in str(error.value)


def test_reward_lands_on_the_last_token(folder: str, head: Tensor) -> None:
    """Without discount, baseline and divergence, every token's advantage is what comes after it: the reward."""
    module = made(folder, 0 * head, kl_coef=0.0, gae=GAE(gamma=1.0, lam=1.0, whiten_advantages=False))
    kept: list[Example] = []
    optimize = module.optimize
    module.optimize = lambda examples: (kept.extend(examples), optimize(examples))[1]  # type: ignore
    step(module, prompts(ROWS))
    expected = [[sample.reward] * len(sample.tokens) for sample in samples()]
    assert [tree.fields["advantages"].tolist() for tree in kept] == [
        [value for values in expected[n : n + GROUP] for value in values] for n in range(0, len(expected), GROUP)
    ]
    assert math.isclose(float(kept[0].fields["returns"][0]), expected[0][0])


def test_nothing_is_logged_of_completions_where_none_could_be_scored(folder: str, head: Tensor) -> None:
    """Their mean score is no 0."""

    def nothing(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    module = made(folder, head, rewards=[nothing, nothing], kl={"target": 0.01})
    found = step(module, prompts(ROWS)).metrics
    assert found["train/rewards/nothing/scored"] == 0
    assert not {name for name in found if "objective" in name or name in ("train/kl", "train/explained_variance")}
    assert module.controller.coef == KL_COEF
