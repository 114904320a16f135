"""The right answer counts in whatever Markdown, LaTeX or typography it is written, and nothing else does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.rewards import MathAnswerReward
from rlhf_lightning.rewards.exact_answer import check_verdicts, exact_answer
from rlhf_lightning.self_improvement import Sample, ScoredPrompt, preference_pairs


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # a heading of Markdown after the answer
        ("#### 42\n### Check", "42"),
        ("#### 42\n### Check\n6*7=42", "42"),
        ("#### 42\n#### Check\nfine", "42"),
        ("#### 42\n## Step 2: 41", "42"),
        ("#### 42\n### 1. Verify", "42"),
        ("#### 42\n### **Verify**", "42"),
        ("### Solution\n6*7\n#### 42", "42"),
        ("\\boxed{42}\n### Why", "42"),
        # marks around it
        ("#### **42**", "42"),
        ("#### **42**.", "42"),
        ("#### *42*", "42"),
        ("#### `42`", "42"),
        ("#### $42$", "42"),
        ("#### $$42$$", "42"),
        (r"#### \(42\)", "42"),
        ("#### **$42**", "42"),
        ("#### **Answer: 42**", "42"),
        ("**A:** 42", "42"),
        ("#### x = 42", "42"),
        (r"\boxed{\text{Paris}}", "paris"),
        (r"\boxed{\mathrm{B}}", "B"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\left(1,2\right)}", "(1,2)"),
        (r"\boxed{\dfrac{x}{2}}", r"\frac{x}{2}"),
        ("#### No.", "no"),
        # separators
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1,234"),
        ("#### 1\N{THIN SPACE}234\N{NO-BREAK SPACE}567", 1234567),
        # fractions
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{\dfrac12}", 0.5),
        (r"\boxed{-\frac{3}{4}}", "-0.75"),
        (r"\boxed{\frac{-3}{4}}", "-3/4"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        ("#### 1 1/2", "3/2"),
        ("#### 1\N{FRACTION SLASH}2", 0.5),
        # signs, units, powers
        ("#### \N{MINUS SIGN}5", -5),
        ("#### \N{EN DASH}5", "\N{MINUS SIGN}5"),
        (r"\boxed{\$1{,}234.50}", "1234.5"),
        ("#### 18\N{EURO SIGN}", "\N{EURO SIGN}18"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{3\times10^{8}}", "3e8"),
        (r"\boxed{10^{3}}", 1000),
        (r"\boxed{42\text{ cm}}", "42 cm"),
    ],
)
def test_right_in_other_words(completion: str, answer: Any) -> None:
    assert exact_answer(["?"], [completion], answer=[answer]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 42\n#### 43", "42"),
        ("#### 42\n# 43", "42"),
        ("#### 42\nA: 43", "42"),
        ("#### 42\n#### I do not know", "42"),
        ("#### 42\n### Final answer: 43", "42"),
        ("#### 42\n### Answer\n43", "42"),
        ("#### 5!", "5"),
        (r"\boxed{\frac{1}{2}3}", "1/23"),
        (r"\boxed{\frac123}", "1/23"),
        (r"\boxed{3.5\frac{1}{2}}", "3.51/2"),
        (r"\boxed{42}, no: \boxed{41}", "42"),
        ("#### $5$ or $6$", "5"),
        ("#### **5** or **6**", "5"),
        ("#### 5, 6", "5"),
        ("#### 5 6", "56"),
        ("#### 1 234", "1234"),
        ("#### $5 + 3$", "8"),
        ("#### 2^10", "1024"),
        ("#### 10\N{SUPERSCRIPT TWO}", "102"),
        ("#### x^{10}", "x^1"),
        ("#### y = 3", "x = 3"),
        ("#### 1.234,5", "1234.5"),
        ("#### 1,23", "123"),
        ("#### 42 dollars", "42"),
        (r"\boxed{42\text{ cm}}", "42"),
        ("#### \N{EURO SIGN}18", "$18"),
        ("#### $50", "50%"),
        ("#### 10%", "0.1"),
        ("#### 1/3", "0.333"),
        (r"\boxed{\frac{1}{0}}", "0"),
        ("#### 1 3/2", "2.5"),
        ("#### -5", "5"),
        ("C# 42", "42"),
        ("&#42;", "42"),
        ("# The answer\n42", "42"),
        (r"\boxed{\frac{1}{2}", "0.5"),
        ("#### $" + "9" * 100_000, "42"),
        ("#### " + "*" * 10_000, "42"),
        ("#### " + "{" * 10_000, "42"),
    ],
)
def test_wrong_in_any_words(completion: str, answer: Any) -> None:
    assert exact_answer(["?"], [completion], answer=[answer]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "gold", "want"),
    [
        ("####42", "42", 1.0),
        ("6 * 7\n####42", 42, 1.0),
        ("#### \N{MINUS SIGN}5", "-5", 1.0),
        (r"\boxed{\N{MINUS SIGN}5}".replace(r"\N{MINUS SIGN}", "\N{MINUS SIGN}"), "-5", 1.0),
        ("#### -5", "\N{MINUS SIGN}5", 1.0),
        ("#### **42**", "42", 1.0),
        ("#### 42\n### Check\n6*7=43", "42", 1.0),
        ("41\n#### 42\n#### Check\n41", "42", 1.0),
        (r"#### $\frac{1}{2}$", "0.5", 1.0),
        (r"#### \sqrt{8}", r"2\sqrt{2}", 1.0),
        (r"\boxed{2}", r"2\sqrt{2}", 0.0),
        (r"\boxed{2\sqrt{2}}", r"2\sqrt{2}", 1.0),
        ("#### 41\n42", "42", 0.0),
        ("42\n#### 41", "42", 0.0),
        ("#### 5", "-5", 0.0),
    ],
)
def test_the_same_with_expressions(completion: str, gold: Any, want: float, math_reward: MathAnswerReward) -> None:
    assert math_reward(["?"], [completion], answer=[gold]) == [want]


@pytest.fixture(scope="module")
def math_reward() -> Any:
    pytest.importorskip("math_verify")
    reward = MathAnswerReward()
    yield reward
    reward._worker.close()


def test_verdicts_are_finite_numbers_or_none() -> None:
    given = [1, np.float32(0.5), torch.tensor(2.0), True, math.nan, np.nan, torch.tensor(math.nan), None]
    assert check_verdicts(given, 8) == [1.0, 0.5, 2.0, 1.0, None, None, None, None]
    assert check_verdicts(np.array([1.0, np.nan]), 2) == [1.0, None]
    for bad in ("1.0", math.inf, [1.0], {}):
        with pytest.raises(ValueError, match="for completion 1: return a finite number, or None for no verdict"):
            check_verdicts([0.0, bad], 2)
    with pytest.raises(ValueError, match="1 rewards for 2 completions"):
        check_verdicts([0.0], 2)


def _answer(text: str, reward: float | None) -> Sample:
    return Sample(text, reward)


def ranked_pair(samples: list[Sample]) -> dict[str, Any] | None:
    pairs = preference_pairs([ScoredPrompt("?", tuple(samples))])
    return {name: pairs[0][name] for name in pairs[0] if name != "provenance"} if pairs else None


def test_no_pair_of_a_text_with_itself() -> None:
    [nothing] = check_verdicts([math.nan], 1)
    assert ranked_pair([_answer("a", nothing), _answer("a", nothing)]) is None
    assert ranked_pair([_answer("a", 1.0), _answer("a", 0.0)]) is None
    assert ranked_pair([_answer("a", nothing), _answer("b", 1.0), _answer("c", 0.0)]) == {
        "prompt": "?", "chosen": "b", "rejected": "c",
    }  # fmt: skip
    # Made by hand, without the check.
    assert ranked_pair([_answer("a", math.nan)] * 4) is None
    assert ranked_pair([_answer("a", math.nan), _answer("b", 1.0), _answer("c", 0.0)]) == {
        "prompt": "?", "chosen": "b", "rejected": "c",
    }  # fmt: skip
