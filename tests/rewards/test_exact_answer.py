from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.data.final_answer import answer_key, final_answer
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.rewards.exact_answer import exact_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+14=17\n17+9=26\n#26", "26"),
        ("She makes $18.\n#### 18", "18"),
        ("#### 18\nor rather\n#### 19\n", "19"),
        ("so\nA: $1,200 ", "$1,200"),
        (r"thus \boxed{42}.", "42"),
        (r"thus \boxed{\frac{1}{2}} and so on", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"#1 is \boxed{5}", "5"),
        (r"\boxed{5} then #6", "6"),
        (r"cut off: \boxed{4", None),
        ("made in the USA: 5", None),
        ("the answer is 26", None),
        ("#26\n#", None),
        ("#\n26", None),
        ("", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#26", "26", 1.0),
        ("#27", "26", 0.0),
        ("26", "26", 0.0),
        ("", "26", 0.0),
        ("#### 1,000", "1000", 1.0),
        ("#### 1000.0", "1,000", 1.0),
        ("#### 1000", 1000, 1.0),
        ("#### 1000", 1000.0, 1.0),
        ("#### 10,00", "1000", 0.0),
        ("#### $18", 18, 1.0),
        ("#### $18.00.", 18, 1.0),
        (r"\boxed{\$18}", 18, 1.0),
        ("#### -$5", "-5", 1.0),
        ("#### \N{MINUS SIGN}5", -5, 1.0),
        ("#### 5", -5, 0.0),
        ("#### 50%", "50", 1.0),
        ("#### .5", "1/2", 1.0),
        ("#### 2/4", 0.5, 1.0),
        ("#### 1/0", "1/0", 1.0),
        ("#### 1/0", "1", 0.0),
        ("#### 0.1", 0.1, 1.0),
        ("#### 0.30000000000000004", "0.3", 0.0),
        ("#### 9007199254740993", "9007199254740992", 0.0),
        ("#### 1e3", 1000, 1.0),
        ("#### 18 or 19", "18", 0.0),
        ("#### 18 eggs", "18", 0.0),
        ("#### 18  Eggs", "18 eggs", 1.0),
        ("#### $", "$", 1.0),
        ("A: 18", "Janet sells ...\n#### 18", 1.0),
        ("#" + "9" * 5000, "9" * 5000, 1.0),
        ("#" + "9" * 5000, 9, 0.0),
        ("#26", np.int64(26), 1.0),
        ("#26", None, None),
        ("#26", float("nan"), None),
        ("#26", np.float64("nan"), None),
        ("#26", " ", None),
        ("#0", 0, 1.0),
    ],
)
def test_exact_answer(completion, answer, reward):
    assert exact_answer(["?"], [completion], answer=[answer]) == [reward]


def test_exact_answer_is_batched_and_ignores_other_columns():
    rewards = exact_answer(
        prompts=["a", "b", "c"], completions=["#1", "#2", "#3"], answer=["1", None, "4"], source=["x", "y", "z"]
    )
    assert rewards == [1.0, None, 0.0]
    assert exact_answer([], [], answer=[]) == []


def test_exact_answer_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match=r"^2 prompts, 2 completions and 1 answers: give one completion"):
        exact_answer(["a", "b"], ["#1", "#2"], answer=["1"])


def test_exact_answer_agrees_with_the_labels_of_the_sums():
    rows = open_task("sums:unpaired?rows=300&slips=0.3&split=test")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    rewards = exact_answer(columns["prompt"], columns["completion"], answer=columns["answer"], label=columns["label"])
    assert rewards == [float(label) for label in columns["label"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So x is \N{MINUS SIGN}5.", -5),
        ("so x = -5", -5),
        ("the balance is -$5.", -5),
        ("a ratio of 3-5", 5),
        ("10\N{EN DASH}5", 5),
        ("it is 3,000", 3000),
    ],
)
def test_the_last_number_of_a_text_has_its_own_sign(text, expected):
    assert answer_key(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The result is \fbox{42}.", "42"),
        (r"so \boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", r"a\\"),
    ],
)
def test_all_boxes_are_read_to_their_own_brace(text, expected):
    assert final_answer(text) == expected
