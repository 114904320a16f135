"""Win rates of models on a suite: by stored rewards and scores, by judges in both orders, and never asked twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf_lightning.evaluation import Suite, Task, evaluate
from rlhf_lightning.evaluation.report import Report

from ..helpers import save_tiny_model
from .test_evaluate import GREEDY, RIGHT, ROWS, WRONG, engine, write_rows


def _won(folder: Path, **options: Any) -> Suite:
    return Suite(name="s", tasks=(Task(name="sums", prompts=write_rows(folder), **options),))


def test_models_are_compared_by_the_verifiers_rewards(tmp_path: Path) -> None:
    models = {"first": engine(["#1"], ["#2"], ["#7"], ["#7"]), "second": engine(["#1"], ["#9"], ["#3"], ["#4"])}
    report = evaluate(models, _won(tmp_path, win_rate="reward"))
    (found,) = report.wins
    assert (found.model, found.baseline, found.task) == ("second", "first", "sums")
    # By hand: a tie, a loss and two wins.
    assert (found.rate.wins, found.rate.ties, found.rate.losses, found.rate.value) == (2, 1, 1, 0.625)
    assert found.rate.consistent is None
    line = report.table().splitlines()[-1]
    assert line.startswith("| sums | second | first | 62.5% | ")
    assert "| 2 | 1 | 1 | 0 |" in line
    assert "62.5%" in report.page()


def test_without_win_rate_there_is_none(tmp_path: Path) -> None:
    report = evaluate({"first": engine(*RIGHT), "second": engine(*WRONG)}, _won(tmp_path))
    assert report.wins == ()
    assert "win rate" not in report.table() + report.page()


def test_models_are_compared_by_a_scorers_scores(tmp_path: Path) -> None:
    models = {"first": engine(["#1"], ["#22"], ["#3"], ["#44"]), "second": engine(["#11"], ["#2"], ["#333"], ["#55"])}
    suite = _won(tmp_path, win_rate={"by": "score"}, scorer=f"{__name__}.by_length")
    (found,) = evaluate(models, suite).wins
    assert (found.rate.wins, found.rate.ties, found.rate.losses) == (2, 1, 1)


def by_length(prompts: Any, completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


class LongerJudge:
    """Prefers the longer answer; of equal ones the first."""

    asked: ClassVar[list[str]] = []

    def __call__(self, questions: Any) -> list[float]:
        self.asked.extend(questions)
        pairs = [question.split("\t")[1:] for question in questions]
        return [float(len(first) >= len(second)) for first, second in pairs]


def test_a_judge_compares_in_both_orders_and_is_asked_once(tmp_path: Path) -> None:
    first, second = (str(save_tiny_model(tmp_path / name, "llama", seed=n)) for n, name in enumerate("ab"))
    judge = {"judge": {"class_path": f"{__name__}.LongerJudge"}, "question": "{prompt}\t{first}\t{second}"}
    suite = _won(tmp_path, sampling=GREEDY, win_rate=judge)
    LongerJudge.asked.clear()
    report = evaluate({"a": first, "b": second}, suite, output=tmp_path / "out")
    (found,) = report.wins
    texts = [[prompt.samples[0].text for prompt in result.prompts] for result in report.results]
    asked = [(row["prompt"], b, a) for row, a, b in zip(ROWS, *texts, strict=True) if a != b]
    orders = [f"{prompt}\t{x}\t{y}" for prompt, b, a in asked for x, y in ((b, a), (a, b))]
    assert orders
    assert LongerJudge.asked == orders
    assert found.rate.wins == sum(len(b) > len(a) for _, b, a in asked)
    assert found.rate.losses == sum(len(b) < len(a) for _, b, a in asked)
    assert evaluate({"a": first, "b": second}, suite, output=tmp_path / "out").wins == report.wins
    assert Report.read(tmp_path / "out").wins == report.wins
    assert orders == LongerJudge.asked  # not asked again

    # Another comparison costs no answers, and one of other answers asks again.
    other = _won(tmp_path, sampling=GREEDY, win_rate="reward")
    seconds = [result.seconds for result in report.results]
    again = evaluate({"a": first, "b": second}, other, output=tmp_path / "out")
    assert [result.seconds for result in again.results] == seconds
    assert again.wins[0].rate.consistent is None


def test_a_judge_of_nonsense_is_shown(tmp_path: Path) -> None:
    """In the table, the JSON and the page, each with the reason."""
    suite = _won(tmp_path, win_rate={"judge": {"class_path": f"{__name__}.Babbler"}})
    with pytest.warns(UserWarning, match="0 of 4 prompts have a verdict"):
        report = evaluate({"first": engine(*RIGHT), "second": engine(*WRONG)}, suite, output=tmp_path / "out")
    reason = "0 of 4 prompts have a verdict: a win rate needs at least two"
    assert report.table().splitlines()[-1] == f"| sums | second | first | undecided | {reason} |  |  |  |  |  |  |"
    assert reason in report.page()
    (written,) = json.loads((tmp_path / "out" / "results.json").read_text())["win_rates"]
    assert (written["rate"], written["undecided"]) == (None, reason)
    assert Report.read(tmp_path / "out").wins == report.wins


class Babbler:
    """Answers words."""

    def __call__(self, questions: Any) -> list[Any]:
        return ["maybe"] * len(questions)


@pytest.mark.parametrize(
    ("win_rate", "message"),
    [
        ("rewards", "win_rate.by is 'rewards'"),
        ("score", "win_rate of task 'sums' compares scores: give it a scorer"),
        ({"by": "score", "judge": "j"}, "win_rate.by is 'score', and a judge is given"),
        ({"jugde": "j"}, "win_rate has no key 'jugde'; did you mean 'judge'?"),
        ({"judge": "j", "question": "{prompt}?"}, "the question has no {first}"),
        ({"tie_margin": -1.0}, "tie_margin is -1"),
        (3, "win_rate is 3: write reward, score"),
    ],
)
def test_mistakes_in_win_rates(win_rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Task(name="sums", prompts="p", win_rate=win_rate)


def test_a_win_rate_without_verdicts_leaves_the_report(tmp_path: Path) -> None:
    models = {"first": engine(*RIGHT), "second": engine(*WRONG)}
    suite = Suite(name="s", tasks=(Task(name="sums", prompts=write_rows(tmp_path), limit=1, win_rate="reward"),))
    with pytest.warns(UserWarning, match="win rate of 'second' on task 'sums': 1 of 1 prompts have a verdict"):
        report = evaluate(models, suite, output=tmp_path / "out")
    (found,) = report.wins
    assert (found.rate, found.undecided) == (None, "1 of 1 prompts have a verdict: a win rate needs at least two")
    assert Report.read(tmp_path / "out").result("second", "sums").scores == report.results[1].scores

    # A report of before there were win rates.
    file = tmp_path / "out/results.json"
    written = json.loads(file.read_text())
    del written["win_rates"]
    file.write_text(json.dumps(written))
    assert Report.read(tmp_path / "out").wins == ()
