"""Answers that are equal, different, not there, or impossible to compute."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_lightning.rewards import MathAnswerReward
from rlhf_lightning.rewards._line_worker import LineWorkerError

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswerReward]:
    reward = MathAnswerReward()
    yield reward
    reward._worker.close()


@pytest.mark.parametrize(
    ("gold", "completion", "want"),
    [
        ("42", r"The answer is \boxed{42}.", 1.0),
        (42, "so it is 42", 1.0),
        ("42", "so it is 41", 0.0),
        ("42", "I do not know", 0.0),
        ("42", "", 0.0),
        ("1/2", r"$\frac{1}{2}$", 1.0),
        (0.5, r"\boxed{\frac{1}{2}}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\sqrt{2}", r"$\sqrt 2$", 1.0),
        (r"\sqrt{2}", r"$\sqrt 3$", 0.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("$x^2+2x+1$", "$(x-1)^2$", 0.0),
        ("(1,2)", r"\boxed{(1,2)}", 1.0),
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", 1.0),
        ("1,000", "1000", 1.0),
        ("3+4=7, 7*2=14\n#### 14", r"\boxed{14}", 1.0),
        ("3+4=7, 7*2=14\n#### 14", r"\boxed{7}", 0.0),
        ("A", r"\boxed{A}", 1.0),
        ("A", r"\boxed{B}", 0.0),
        ("no mathematics", "42", None),
        ("", "42", None),
        (None, "42", None),
    ],
)
def test_verdicts(reward: MathAnswerReward, gold: Any, completion: str, want: float | None) -> None:
    assert reward(["p"], [completion], answer=[gold]) == [want]


def test_only_boxed_answers_on_request() -> None:
    strict = MathAnswerReward(answer_column="gold", boxed_only=True, correct=2.0, wrong=-1.0)
    got = strict(["p"] * 3, ["42", r"\boxed{42}", r"42 or \boxed{41}"], gold=["42"] * 3)
    assert got == [-1.0, 2.0, -1.0]
    strict._worker.close()


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_is_judged_as_ever() -> None:
    reward = MathAnswerReward(timeout=1.0)
    assert reward(["p"], ["1"], answer=["1"]) == [1.0]
    start = time.monotonic()
    completions = [r"\boxed{9^{9^{9}}}", r"\boxed{5}", r"\boxed{6}"]
    assert reward(["p"] * 3, completions, answer=["5"] * 3) == [0.0, 1.0, 0.0]
    assert time.monotonic() - start < 20
    reward._worker.close()


def test_survives_the_death_of_its_process(reward: MathAnswerReward) -> None:
    assert reward(["p"], ["1"], answer=["1"]) == [1.0]
    process = reward._worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert reward(["p"], ["1"], answer=["1"]) == [1.0]


def test_a_copy_has_a_process_of_its_own(reward: MathAnswerReward) -> None:
    assert reward(["p"], ["1"], answer=["1"]) == [1.0]
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(["p"], ["2"], answer=["1"]) == [0.0]
    assert copy._worker._process.pid != reward._worker._process.pid
    copy._worker.close()
    assert reward(["p"], ["1"], answer=["1"]) == [1.0]


def test_a_worker_that_does_not_start_is_an_error_and_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = MathAnswerReward()
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(LineWorkerError, match="does not start"):
        reward(["p"], ["1"], answer=["1"])


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^MathAnswerReward needs the column 'answer': the rows have none$"):
        MathAnswerReward()(["p"], ["1"])
    with pytest.raises(ValueError, match="timeout=0 is not above 0"):
        MathAnswerReward(timeout=0)
    with pytest.raises(ValueError, match="memory_mb=100 is below 512"):
        MathAnswerReward(memory_mb=100)
    monkeypatch.setattr("rlhf_lightning.rewards.math_answer.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package math-verify: pip install math-verify"):
        MathAnswerReward()


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("-5", "#### -$5"),
        ("18", "#### \N{EURO SIGN}18"),
        ("18", "#### $18"),
        ("-1000", "#### -\N{POUND SIGN}1,000"),
        ("\N{EURO SIGN}18", "#### 18"),
        ("so it is\n#### -$5", "#### -5"),
        ("42", r"so \fbox{42}, and not 41"),
    ],
)
def test_amounts_of_money_and_frames(reward: MathAnswerReward, gold: str, completion: str) -> None:
    assert reward(["p"], [completion], answer=[gold]) == [1.0]
    assert reward(["p"], [completion], answer=["77"]) == [0.0]
