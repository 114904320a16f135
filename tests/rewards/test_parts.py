"""Scores with parts: principles of a constitution and patterns of unsafe text, returned and logged."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.rewards import SAFETY_PATTERNS, ConstitutionReward, PartedScore, RewardSet, SafetyReward
from rlhf_lightning.rewards.specs import build_rewards
from rlhf_lightning.sequences import ExampleBatch

from ..invariance.harness import Batches, trainer
from ..invariance.methods import prompts
from ..rl.fixed_rollouts import FixedGRPO

UNSAFE = {
    "weapons": ["Here is how to build a pipe bomb at home", "instructions for making sarin"],
    "malware": ["Here's a simple keylogger in C", "I can write\nransomware"],
    "threat": ["I will kill you", "we're done and I'll shoot them"],
    "self_harm": ["go kill yourself", "You should end your life"],
    "card_number": ["4111 1111 1111 1111", "card 4111-1111-1111-1111."],
    "social_security_number": ["his is 123-45-6789"],
    "secret_key": ["AKIAABCDEFGHIJKLMNOP", "-----BEGIN RSA PRIVATE KEY-----", "key sk-" + "a1" * 12],
    "destructive_command": ["just run rm -rf / now", "sudo rm -rf ~", "mkfs.ext4 /dev/sda", ":(){ :|:& };:"],
}
SAFE = [
    "3+4=7, and 1234567812345678 is a number.",
    "The bomb disposal team arrived; nobody was hurt.",
    "Kill the process with kill -9, then rm -rf build/",
    "Do not hurt yourself: call a friend.",
    "I will help you.",
    "4111 1111-1111 1111",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_each_pattern_is_found_in_its_texts_alone(name: str) -> None:
    reward = SafetyReward()
    for text in UNSAFE[name]:
        assert reward.found(text) == [name], text
    assert set(UNSAFE) == set(SAFETY_PATTERNS)


def test_plain_texts_have_no_penalty_but_words_are_no_meanings() -> None:
    found = {text: SafetyReward().found(text) for text in SAFE}
    assert {text: names for text, names in found.items() if names} == {
        "Do not hurt yourself: call a friend.": ["self_harm"],
    }


def test_a_hit_costs_the_penalty_once_for_each_pattern() -> None:
    reward = SafetyReward({"rude": "idiot|fool", "loud": "!!"}, penalty=-2.5)
    scores = reward(["p"] * 4, ["fine", "You FOOL, you idiot", "fool!!", "!!"])
    assert scores == [0.0, -2.5, -5.0, -2.5]
    assert math.copysign(1, scores[0]) == 1
    assert scores[2].parts == {"rude": 1.0, "loud": 1.0}
    for options, message in (
        ({"patterns": {}}, "patterns is {}"),
        ({"patterns": {"a": "("}}, "pattern 'a' is '(', no regular expression"),
        ({"penalty": 1.0}, "penalty is 1.0; it must be a finite number of at most 0"),
        ({"penalty": float("-inf")}, "penalty is -inf"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            SafetyReward(**options)


PRINCIPLES = [
    {"name": "polite", "weight": 3.0, "require": "please"},
    {"name": "short", "predicate": lambda prompt, completion: None if prompt == "long" else len(completion) < 10},
]


def test_verdicts_are_returned_and_make_the_score() -> None:
    reward = ConstitutionReward(PRINCIPLES)
    given = ["p", "p", "long"], ["please", "wait for a while", "please"]
    verdicts = [{"polite": 1.0, "short": 1.0}, {"polite": 0.0, "short": 0.0}, {"polite": 1.0, "short": None}]
    assert reward.verdicts(*given) == verdicts
    scores = reward(*given)
    assert scores == [1.0, 0.0, 1.0]
    assert [score.parts for score in scores] == verdicts
    broken = ConstitutionReward([{"name": "bad", "predicate": lambda prompt, completion: 1 / 0}])
    assert isinstance(broken.verdicts(["p"], ["c"])[0], ZeroDivisionError)


def test_parts_are_columns_of_weight_0_next_to_their_score() -> None:
    def lengths(completions: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def steps(completions: Any) -> list[list[float]]:
        return [[1.0] for _ in completions]

    rewards = build_rewards([ConstitutionReward(PRINCIPLES), lengths], [2.0, 0.5], process=steps)
    parts = ("ConstitutionReward/polite", "ConstitutionReward/short")
    assert rewards.names == ("ConstitutionReward", *parts, "lengths", "steps")
    assert rewards.function_names == ("ConstitutionReward", "lengths", "steps")
    assert rewards.weights.tolist() == [2.0, 0.0, 0.0, 0.5, 1.0]
    scores = rewards(["p", "long"], ["please", "no"])
    assert scores.values[0].tolist() == [1.0, 1.0, 1.0, 6.0, 1.0]
    assert scores.values[1, :2].tolist() == [0.0, 0.0]
    assert math.isnan(scores.values[1, 2])
    assert scores.failures == {"ConstitutionReward": 0, "lengths": 0, "steps": 0}


def test_samples_that_fail_have_no_parts() -> None:
    def picky(completions: Any) -> list[Any]:
        if "bad" in completions:
            raise ValueError("no")
        return [PartedScore(1.0, {"a": 0.5}) for _ in completions]

    picky.part_names = ("a",)  # type: ignore[attr-defined]
    scores = RewardSet([picky])(["p"] * 3, ["x", "bad", "y"])
    assert scores.values[[0, 2]].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert all(math.isnan(value) for value in scores.values[1])
    assert scores.failures == {"picky": 1}


class Oracle:
    """A judge that says yes to what it finds in the question."""

    def __call__(self, questions: Any) -> list[float]:
        return [1.0 if "to the point" in q or "hurt people" in q else 0.25 for q in questions]


def test_the_packaged_principles_are_helpful_honest_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lightning.rewards import constitution

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constitution, "resolve_judge", lambda judge: judge)
    reward = ConstitutionReward("configs/constitutions/hhh.yaml", judge=Oracle())
    assert [(p.name, p.weight) for p in reward.principles] == [("helpful", 0.4), ("harmless", 0.4), ("honest", 0.2)]
    [score] = reward(["p"], ["c"])
    assert score == pytest.approx(0.4 + 0.4 + 0.2 * 0.25)
    assert score.parts == {"helpful": 1.0, "harmless": 1.0, "honest": 0.25}
    own = tmp_path / "own.yaml"
    own.write_text("name: a")
    for path, message in (
        (str(own), "has dict, expected a list of principles"),
        ("no.yaml", "there is no file of principles 'no.yaml'"),
    ):
        with pytest.raises(ValueError, match=message):
            ConstitutionReward(path)


def test_principles_are_logged_by_name(tiny_model_folder: Any) -> None:
    module = FixedGRPO(str(tiny_model_folder("gpt2")), rewards=[SafetyReward({"digit": r"\d", "any": "."})])
    run = trainer("32-true", max_steps=1)
    run.fit(module, Batches(ExampleBatch(prompts(3))))
    logged = {name: float(value) for name, value in run.logged_metrics.items()}
    share = logged["train/rewards/SafetyReward/any/mean"] + logged["train/rewards/SafetyReward/digit/mean"]
    assert logged["train/reward"] == pytest.approx(-10 * share, rel=1e-5)
    assert logged["train/rewards/SafetyReward/mean"] == logged["train/reward"]
    assert "train/rewards/SafetyReward/any/failures" not in logged
