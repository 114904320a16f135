from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from rlhf_lightning.rewards.specs import build_rewards, plain_specs

HERE = "tests.rewards.test_specs"
EXACT = "rlhf_lightning.rewards.exact_answer"


def scaled(completions: Sequence[str], factor: float = 1.0) -> list[float]:
    return [factor * len(text) for text in completions]


class Counted:
    def __init__(self, letter: str) -> None:
        self.letter = letter

    def __call__(self, completions: Sequence[str]) -> list[float]:
        return [float(text.count(self.letter)) for text in completions]


def test_every_way_to_write_a_reward() -> None:
    rewards = build_rewards(
        [
            scaled,
            EXACT,
            {"class_path": f"{HERE}.Counted", "init_args": {"letter": "b"}, "weight": 0.5, "name": "bees"},
            {"class_path": f"{HERE}.scaled", "init_args": {"factor": 10.0}, "weight": -2},
        ]
    )
    assert rewards.names == ("scaled", "exact_answer", "bees", "scaled_2")
    assert rewards.weights.tolist() == [1.0, 1.0, 0.5, -2.0]
    scores = rewards(["p", "p"], ["#1", "abba"], {"answer": ["1", "2"]})
    assert scores.values.tolist() == [[2.0, 1.0, 0.0, 20.0], [4.0, 0.0, 2.0, 40.0]]


def test_weights_apart() -> None:
    assert build_rewards([scaled, EXACT], [0.25, 4.0]).weights.tolist() == [0.25, 4.0]


def test_limits() -> None:
    rewards = build_rewards([scaled], timeout=12.0, on_bad_value="skip")
    assert (rewards.timeout, rewards.sample_timeout, rewards.on_bad_value) == (12.0, 2.0, "skip")
    assert build_rewards([scaled], timeout=None).sample_timeout is None


def steps(completions: Sequence[str]) -> list[list[float]]:
    return [[float(len(step)) for step in text.split(";") if step] for text in completions]


class Steps:
    step_separator = ";"

    def __call__(self, completions: Sequence[str]) -> list[list[float]]:
        return steps(completions)


def test_a_function_of_steps() -> None:
    rewards = build_rewards([scaled], [3.0], process={"class_path": f"{HERE}.Steps", "weight": 0.5, "name": "scaled_1"})
    assert rewards.names == ("scaled", "scaled_1")
    assert rewards.weights.tolist() == [3.0, 0.5]
    assert rewards.step_separators == [None, ";"]
    scores = rewards(["p"], ["ab;;c"])
    assert scores.values.tolist() == [[5.0, 1.5]]
    assert scores.steps == {"scaled_1": [[2.0, 1.0]]}
    assert build_rewards([], process=steps).step_separators == ["\n"]


def test_plain_values_for_a_checkpoint() -> None:
    spec = {"class_path": EXACT}
    assert plain_specs([scaled, EXACT, spec, partial(scaled, factor=2)]) == [f"{HERE}.scaled", EXACT, spec, "scaled"]
    assert plain_specs([Counted("a")]) == ["Counted"]


BAD: list[tuple[Any, str]] = [
    ([], "rewards is empty; give at least one, such as rlhf_lightning.rewards.exact_answer"),
    (EXACT, f"it must be a list: write ['{EXACT}']"),
    ([{"path": EXACT}], "a reward has the key 'path': allowed are class_path, init_args, weight, name"),
    ([{"weight": 1.0}], "a reward has no class_path"),
    ([{"class_path": f"{HERE}.Counted", "init_args": {"letters": "b"}}], "do not fit it"),
    ([{"class_path": f"{HERE}.Counted"}], "needs arguments: give class_path and init_args"),
    (["nothing.at.all"], "cannot import 'nothing.at.all'"),
    ([3], "reward 3 is a int: give a function or the dotted path of one"),
]


@pytest.mark.parametrize(("rewards", "message"), BAD)
def test_bad_rewards(rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build_rewards(rewards)
    assert "\n" not in str(error.value)


def test_weights_of_another_number() -> None:
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 rewards: give one each"):
        build_rewards([scaled], [1.0, 2.0], process=steps)


def test_weights_in_two_places() -> None:
    with pytest.raises(ValueError, match="both given: write the weights in one place"):
        build_rewards([{"class_path": EXACT, "weight": 2.0}], [1.0])
