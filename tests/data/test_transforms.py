"""Transforms for published datasets, on such columns; the datasets themselves are in test_recommended_stack."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.transforms import boxed_answer, chat_prompt, helpsteer2, orca_pair

from ..datamodules.toys import complaint


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "answer": 1}, {"prompt": [said("user", "q")], "answer": 1}),
        ({"prompt": "q", "system": "s"}, {"prompt": [said("system", "s"), said("user", "q")]}),
        ({"prompt": "q", "system": ""}, {"prompt": [said("user", "q")]}),
        ({"prompt": "q", "system": None}, {"prompt": [said("user", "q")]}),
        ({"prompt": [said("user", "q")], "system": "s"}, {"prompt": [said("user", "q")], "system": "s"}),
    ],
)
def test_prompts_become_conversations(columns: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat_prompt(columns) == expected


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"$\boxed{ \frac{1}{\sqrt{2}} }$ is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or rather \boxed {2}", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{a\\}", r"a\\"),
        ("\\boxed{4\n}", "4"),
    ],
)
def test_the_answer_is_in_the_last_box(solution: str, answer: str) -> None:
    assert boxed_answer({"problem": "p", "solution": solution, "messages": []}) == {
        "prompt": [said("user", "p")],
        "answer": answer,
    }


@pytest.mark.parametrize("solution", ["It is 4.", r"\boxed{}", r"\boxed{ }", r"\boxed{4", "", r"\boxed 4"])
def test_without_an_answer_in_a_box_a_problem_is_skipped(solution: str) -> None:
    assert boxed_answer({"problem": "p", "solution": solution}) is None


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("c#", ["c#"]),
        ("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", ["a", "b", "c"]),
        ("a\n\n<extra_id_1>Assistant\n\nb\n\nB\n\n<extra_id_1>User\n\nc", ["a", "b\n\nB", "c"]),
        ("say <extra_id_1>User", ["say <extra_id_1>User"]),
    ],
)
def test_turns_of_helpsteer2(prompt: str, turns: list[str]) -> None:
    row = helpsteer2({"prompt": prompt, "response": "r", "verbosity": 2, "id": 7})
    roles = ("user", "assistant", "user")
    assert row["prompt"] == [said(role, turn) for role, turn in zip(roles, turns, strict=False)]
    assert (row["completion"], row["id"], row["ratings"].pop("verbosity")) == ("r", 7, 2)
    assert row["ratings"] == dict.fromkeys(["helpfulness", "correctness", "coherence", "complexity"])


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (chat_prompt, {"prompts": "q"}, "no column 'prompt' (found: prompts; did you mean 'prompts'?)"),
        (chat_prompt, {"prompt": "q", "system": 3}, "'system' is int (3), expected a string"),
        (chat_prompt, {"prompt": ""}, "the prompt is empty: write something to be answered"),
        (boxed_answer, {"problem": "p"}, "no column 'solution' (found: problem)"),
        (boxed_answer, {"problem": "p", "solution": 4}, "'solution' is int (4), expected a string"),
        (helpsteer2, {"prompt": "p", "completion": "r", "verbosity": 1}, "no column 'response'"),
        (
            helpsteer2,
            {"prompt": "p", "response": "r", "helpful": 1},
            "no rating (found: prompt, response, helpful; did",
        ),
        (orca_pair, {"input": "p", "chosen": "a", "rejected": "b"}, "no column 'status' (found: input, chosen, reject"),
        (
            orca_pair,
            {"input": "p", "chosen": "a", "status": "tie ", "chosen_score": "9", "in_gsm8k_train": False},
            "no column 'rejected' (found: input, chosen, status",
        ),
    ],
)
def test_columns_that_are_not_there(function: Any, columns: dict[str, Any], message: str) -> None:
    assert complaint(function, columns).startswith(message)
