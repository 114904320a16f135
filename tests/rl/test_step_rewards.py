"""Rewards of steps: which token they land on, and what GRPO and PPO make of them, against loops over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.rl.step_rewards import at_tokens, place_steps, process_advantages, steps_differ
from rlhf_lightning.sequences import Example, Segment

from ..helpers import EOS_ID, char_tokenizer, save_tiny_model

TEXTS = [
    ["12\n345\n6", "1\n2", "77\n\n8\n"],
    ["9", "99\n1", "5\n5\n5"],
    ["4\n4", "4\n4", "4"],
]


def completion(text: str, *, ended: bool = True) -> Completion:
    tokens = [*char_tokenizer()(text)["input_ids"], *([EOS_ID] if ended else [])]
    return Completion(tokens, text, [-1.0] * len(tokens), "stop" if ended else "length")


class Words:
    """A tokenizer whose tokens are the strings of a list."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return "".join(self.tokens[n] for n in token_ids)


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "b", "\n", "c", "\n", "d", ""], [2, 4, 6]),
        (["ab\nc", "\n", "d"], [0, 1, 2]),  # the separator ends within a token
        (["a", "\n\n", "b\n", "c\n", ""], [1, 2, 4]),  # empty steps do not count; the last ends with the completion
        (["a\nb\n", "c"], [0, 0, 1]),  # two steps in one token
        (["one"], [0]),
    ],
)
def test_where_steps_end(tokens: list[str], ends: list[int]) -> None:
    text = "".join(tokens)
    sample = Completion(list(range(len(tokens))), text, [0.0] * len(tokens), "stop")
    rewards = [float(n) for n in range(len(ends))]
    found = place_steps(rewards, sample, "\n", Words(tokens))  # type: ignore[arg-type]
    assert found == list(zip(ends, rewards, strict=True))
    assert place_steps([], sample, "\n", Words(tokens)) == []  # type: ignore[arg-type]


def test_where_steps_end_before_a_stop_string() -> None:
    """The text has lost the stop string; the last step ends with the tokens."""
    sample = Completion([0, 1, 2, 3], "a; b", [0.0] * 4, "stop")
    tokens: Any = Words(["a", "; ", "b", "END"])
    assert place_steps([0.5, 1.0], sample, "; ", tokens) == [(1, 0.5), (3, 1.0)]


def test_which_groups_teach() -> None:
    steps: Any = [[[(0, 1.0)], [(1, 1.0), (2, 1.0)]], [[(0, 1.0)], [(0, 0.5)]], [[], []]]
    assert steps_differ(steps).tolist() == [False, True, False]


def reward_of(text: str) -> list[float]:
    """Of each step: its length, and a half where it begins with a 5."""
    return [len(step) + (0.5 if step[0] == "5" else 0.0) for step in text.split("\n") if step]


def of_steps(completions: Sequence[str]) -> list[list[float] | None]:
    return [reward_of(text) if text != "4" else None for text in completions]


def outcome(completions: Sequence[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


class _Texts:
    num_generations: int

    def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        return [[completion(text) for text in TEXTS[int(prompt.row_id[-1])]] for prompt in prompts]


class TextGRPO(_Texts, GRPOModule):
    """GRPO on the completions of TEXTS."""


class TextPPO(_Texts, PPOModule):
    """PPO on the completions of TEXTS."""


PROMPTS = [Example(f"rows:{n}", Segment([5, 6 + n]), {"prompt": "x"}) for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def ends_of(text: str) -> list[int]:
    """The token of each step's end: one token per character, the end of the sequence after them."""
    ends = [n for n, letter in enumerate(text) if letter == "\n" and n and text[n - 1] != "\n"]
    return [*ends[: len(reward_of(text)) - 1], len(text)]


def naive_process(group: list[str], scale: str, everything: list[float]) -> list[list[float]]:
    """Section 4.1.3 of DeepSeekMath, step by step and token by token."""
    rewards = [reward_of(text) if text != "4" else [] for text in group]
    flat = torch.tensor([r for sample in rewards for r in sample], dtype=torch.float64)
    std = {"group": flat.std() + 1e-4, "none": torch.tensor(1.0)}.get(
        scale, torch.tensor(everything).double().std() + 1e-4
    )
    found = []
    for text, sample in zip(group, rewards, strict=True):
        tokens = []
        for token in range(len(text) + 1):
            total = 0.0
            for end, reward in zip(ends_of(text), sample, strict=False):
                if end >= token and flat.max() > flat.min():
                    total += float((reward - flat.mean()) / std)
            tokens.append(total)
        found.append(tokens)
    return found


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("with_outcome", [False, True])
def test_grpo_adds_up_the_steps_that_follow(scale: Any, with_outcome: bool, folder: str) -> None:
    module = TextGRPO(
        folder,
        rewards=[outcome] if with_outcome else [],
        process_reward={"class_path": f"{__name__}.of_steps", "weight": 0.25},
        num_generations=3,
        advantages={"scale_rewards": scale},
    )
    module.configure_model()
    rollouts = module.rollout(PROMPTS)
    assert rollouts.failures == dict.fromkeys(module.rewards.names, 0)
    trees, _ = module.prepare(rollouts)
    everything = [r for group in TEXTS for text in group if text != "4" for r in reward_of(text)]
    scores = torch.tensor([outcome(group) for group in TEXTS]).double()
    for tree, group, score in zip(trees, TEXTS, scores, strict=True):
        own = torch.zeros(3, dtype=torch.float64)
        if with_outcome and float(score.max() - score.min()):
            deviation = {"group": score.std() + 1e-4, "none": 1.0, "batch": scores.std() + 1e-4}[scale]
            own = (score - score.mean()) / deviation
        process = naive_process(group, scale, everything)
        expected = [float(a) + 0.25 * p for a, tokens in zip(own, process, strict=True) for p in tokens]
        assert tree.fields["advantages"].tolist() == pytest.approx(expected, abs=1e-9)
    # Logged values: means over the steps; the reward of completions without that of steps.
    metrics = module._rollout_metrics({**module._rollout_rows(rollouts)})
    means = [sum(reward_of(t)) / len(reward_of(t)) for group in TEXTS for t in group if t != "4"]
    assert float(metrics["rewards/of_steps/mean"]) == pytest.approx(sum(means) / len(means))
    assert float(metrics["rewards/of_steps/scored"]) == pytest.approx(8 / 9)
    assert float(metrics["reward"]) == pytest.approx(
        float(scores.mean()) if with_outcome else 0.25 * sum(means) / len(means)
    )


def test_ppo_puts_rewards_where_steps_end(folder: str) -> None:
    """With values of 0 the advantage is the sum of what follows, discounted by gamma lambda."""
    module = TextPPO(
        folder,
        rewards=[outcome],
        process_reward={"class_path": f"{__name__}.of_steps", "weight": 0.25},
        num_generations=3,
        kl_coef=0.0,
        gae={"gamma": 0.9, "lam": 0.8, "whiten_advantages": False},
    )
    module.configure_model()
    trees, values = module.prepare(module.rollout(PROMPTS))
    totals = []
    for tree, group in zip(trees, TEXTS, strict=True):
        expected: list[float] = []
        for text in group:
            rewards = [0.0] * (len(text) + 1)
            rewards[-1] = outcome([text])[0]
            for end, reward in zip(ends_of(text), reward_of(text) if text != "4" else [], strict=False):
                rewards[end] += 0.25 * reward
            totals.append(sum(rewards))
            for start in range(len(rewards)):
                expected.append(sum(reward * 0.72**n for n, reward in enumerate(rewards[start:])))
        assert tree.fields["advantages"].tolist() == pytest.approx(expected, abs=1e-9)
        assert tree.fields["returns"].tolist() == pytest.approx(expected, abs=1e-9)
    assert float(values["objective/scores"]) == pytest.approx(sum(totals) / 9)


def test_ppo_drops_what_no_reward_could_score(folder: str) -> None:
    module = TextPPO(folder, rewards=[], process_reward=of_steps, num_generations=3, kl_coef=0.0)
    module.configure_model()
    trees, _ = module.prepare(module.rollout(PROMPTS))
    assert [len(tree.root.children) for tree in trees] == [3, 3, 2]


def test_a_rank_without_prompts() -> None:
    none = torch.zeros(0, dtype=torch.long)
    for scale in ("group", "batch", "none"):
        assert process_advantages([], none, none, scale_rewards=scale).shape == (0,)  # type: ignore[arg-type]


def test_part_of_the_completions() -> None:
    """Trees may hold some completions, in any order; the statistics are of all steps."""
    steps: Any = [[[(0, 1.0), (2, 3.0)], [(1, 2.0)]], [[(0, 5.0)], [(0, 7.0), (1, 9.0)]]]
    places, lengths = torch.tensor([3, 0]), torch.tensor([2, 3])
    index = torch.tensor([0, 0, 1, 1, 1])
    assert at_tokens(steps, places, lengths).tolist() == [7.0, 9.0, 1.0, 0.0, 3.0]
    found = process_advantages(steps, places, index, scale_rewards="none")
    assert found.tolist() == [0.0 + 2.0, 2.0, -1.0 + 1.0, 1.0, 1.0]


def test_replaced_groups_take_their_steps_along(folder: str) -> None:
    module = TextGRPO(folder, rewards=[], process_reward=of_steps, num_generations=3)
    module.configure_model()
    rollouts, other = module.rollout(PROMPTS), module.rollout(PROMPTS[1:2])
    rollouts.replace([2], other)
    assert rollouts.steps[2] == other.steps[0] == rollouts.steps[1]
    rollouts.replace([], module.rollout([]))
    assert len(rollouts.steps) == 3
