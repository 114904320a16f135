"""Functions that are right, raise, hang, or return what is no reward."""

from __future__ import annotations

import functools
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.rewards import FormatReward, RewardScores, RewardSet, SoftOverlongReward, StepReward, resolve_reward
from rlhf_lightning.rewards._time_limit import CallTimeoutError, call_with_limit

NAN = float("nan")
TEXTS = ["a", "bb", "ccc"]


def lengths(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def returning(value: Any) -> Callable[..., Any]:
    def function(completions: list[str]) -> Any:
        return value

    return function


def score(*functions: Any, columns: dict[str, Any] | None = None, **options: Any) -> RewardScores:
    return RewardSet(functions, **options)(["p"] * len(TEXTS), TEXTS, columns)


def column(scores: RewardScores, n: int = 0) -> list[float]:
    return [float(v) for v in scores.values[:, n]]


class TestScores:
    def test_one_column_per_function_and_nan_for_none(self) -> None:
        scores = score(lengths, returning([None, True, np.float32(0.5)]))
        assert scores.values.shape == (3, 2)
        assert scores.values.dtype == np.float64
        assert column(scores) == [1.0, 2.0, 3.0]
        assert column(scores, 1) == pytest.approx([NAN, 1.0, 0.5], nan_ok=True)
        assert scores.failures == {"lengths": 0, "function": 0}
        assert scores.errors == {}

    @pytest.mark.parametrize(
        "values", [(1, 2, 3), np.arange(1, 4), torch.arange(1, 4), torch.arange(1.0, 4.0), range(1, 4)]
    )
    def test_any_sequence_of_numbers(self, values: Any) -> None:
        assert column(score(returning(values))) == [1.0, 2.0, 3.0]

    def test_names_and_weights(self) -> None:
        functions = [lengths, lengths, FormatReward(), functools.partial(lengths), returning([0, 0, 0])]
        rewards = RewardSet(functions, weights=[1, 0, -1, 2, 0.5])
        assert rewards.names == ("lengths", "lengths_2", "FormatReward", "lengths_3", "function")
        assert rewards.weights.tolist() == [1.0, 0.0, -1.0, 2.0, 0.5]
        assert RewardSet([lengths], names=["n"]).names == ("n",)

    def test_functions_get_what_they_name(self) -> None:
        seen: dict[str, Any] = {}

        def picky(completions: list[str], answer: list[int], level: list[int] | None = None) -> list[float]:
            seen["picky"] = (completions, answer, level)
            return [0.0] * 3

        def greedy(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
            seen["greedy"] = (prompts, columns)
            return [0.0] * 3

        columns = {"answer": [1, 2, 3], "other": ["x", "y", "z"], "completions": ["from", "the", "rows"]}
        score(picky, greedy, columns=columns)
        assert seen["picky"] == (TEXTS, [1, 2, 3], None)
        assert seen["greedy"] == (["p"] * 3, {"answer": [1, 2, 3], "other": ["x", "y", "z"]})

    def test_an_empty_batch(self) -> None:
        scores = RewardSet([lengths])([], [])
        assert scores.values.shape == (0, 1)
        assert scores.failures == {"lengths": 0}


class TestFailures:
    def test_raising_costs_its_own_sample(self, caplog: pytest.LogCaptureFixture) -> None:
        def fragile(completions: list[str], scale: list[float]) -> list[float]:
            if "bb" in completions:
                raise KeyError("bb")
            return [len(text) * s for text, s in zip(completions, scale, strict=True)]

        rewards = RewardSet([fragile, lengths])
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                scores = rewards(["p"] * 3, TEXTS, {"scale": [10.0, 20.0, 30.0]})
                assert column(scores) == pytest.approx([10.0, NAN, 90.0], nan_ok=True)
                assert column(scores, 1) == [1.0, 2.0, 3.0]
                assert scores.failures == {"fragile": 1, "lengths": 0}
                assert scores.errors == {"fragile": "KeyError: 'bb'"}
        assert [record.getMessage() for record in caplog.records] == [
            "reward 'fragile' failed on 1 of 3 samples: KeyError: 'bb'"
        ]

    def test_raising_everywhere_costs_every_sample_and_not_the_run(self) -> None:
        def broken(completions: list[str]) -> list[float]:
            raise SystemExit("two\nlines")

        scores = score(broken)
        assert np.isnan(scores.values).all()
        assert scores.failures == {"broken": 3}
        assert scores.errors == {"broken": "RuntimeError: called sys.exit('two\\nlines')"}
        single = RewardSet([broken])(["p"], ["x"])
        assert single.failures == {"broken": 1}

    @pytest.mark.parametrize("hang", ["loop", "sleep", "stubborn"])
    def test_hanging_costs_its_own_sample(self, hang: str) -> None:
        def stuck(completions: list[str]) -> list[float]:
            for _ in completions if "bb" in completions else ():
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    if hang == "sleep":
                        time.sleep(30)
                    elif hang == "stubborn":
                        try:
                            time.sleep(30)
                        except Exception:  # what a retry loop around a request does
                            continue
            return lengths(completions)

        start = time.monotonic()
        scores = score(stuck, lengths, timeout=0.2, sample_timeout=0.2)
        assert time.monotonic() - start < 3
        assert column(scores) == pytest.approx([1.0, NAN, 3.0], nan_ok=True)
        assert column(scores, 1) == [1.0, 2.0, 3.0]
        assert scores.failures == {"stuck": 1, "lengths": 0}
        assert scores.errors == {"stuck": "CallTimeoutError: took longer than 0.2 s"}

    def test_hanging_on_another_thread(self) -> None:
        release = threading.Event()

        def stuck(completions: list[str]) -> list[float]:
            if "bb" in completions:
                release.wait(30)
            return lengths(completions)

        results: list[RewardScores] = []
        thread = threading.Thread(target=lambda: results.append(score(stuck, timeout=0.2, sample_timeout=0.2)))
        thread.start()
        thread.join(5)
        release.set()
        assert column(results[0]) == pytest.approx([1.0, NAN, 3.0], nan_ok=True)

    def test_nothing_is_called_when_a_column_is_missing(self) -> None:
        calls = []

        def first(completions: list[str]) -> list[float]:
            calls.append(1)
            return [0.0] * len(completions)

        def second(completions: list[str], answer: list[str]) -> list[float]:
            return [0.0] * len(completions)

        with pytest.raises(ValueError, match=r"^reward 'second' needs the column 'answer': the rows have id, level$"):
            score(first, second, columns={"level": [1, 2, 3], "id": [1, 2, 3]})
        with pytest.raises(
            ValueError, match=r"^reward 'SoftOverlongReward' needs the column 'completion_ids': .* none$"
        ):
            score(first, SoftOverlongReward(10, 5))
        assert calls == []


BAD_VALUES = [
    ([1.0, 2.0], "returned 2 values for 3 completions: return one each"),
    ([1.0] * 4, "returned 4 values for 3 completions: return one each"),
    (np.ones((3, 2)), r"returned array\(\[1., 1.\]\) \(ndarray\) for sample 0: return a finite number, or None"),
    ([1.0, NAN, 1.0], r"returned nan \(float\) for sample 1: return a finite number, or None if unscorable"),
    ([1.0, 1.0, math.inf], r"returned inf \(float\) for sample 2"),
    ([1.0, "0.5", 1.0], r"returned '0.5' \(str\) for sample 1"),
    (torch.tensor([1.0, NAN, 1.0]), r"returned tensor\(nan\) \(Tensor\) for sample 1"),
    ([[1.0], [2.0], [3.0]], r"returned \[1.0\] \(list\) for sample 0"),
    ("abc", r"returned 'abc' \(str\): return a list of one number or None per completion"),
    ({"a": 1, "b": 2, "c": 3}, r"returned \{.*\} \(dict\): return a list"),
    (None, r"returned None \(NoneType\): return a list"),
    (1.0, r"returned 1.0 \(float\): return a list"),
]


class TestBadValues:
    @pytest.mark.parametrize(("value", "message"), BAD_VALUES, ids=[str(n) for n in range(len(BAD_VALUES))])
    def test_an_error_of_one_line_that_names_the_function(self, value: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^reward 'function' {message}") as caught:
            score(lengths, returning(value))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("value", "message"), BAD_VALUES, ids=[str(n) for n in range(len(BAD_VALUES))])
    def test_or_a_failure_on_request(self, value: Any, message: str) -> None:
        scores = score(returning(value), on_bad_value="skip")
        assert np.isnan(scores.values).any()
        assert scores.failures["function"] == np.isnan(scores.values).sum()
        assert list(scores.errors) == ["function"]

    def test_a_wrong_count_for_the_batch_is_fixed_by_asking_for_each(self) -> None:
        def dedupes(completions: list[str]) -> list[float]:
            return [float(len(text)) for text in sorted(set(completions))]

        texts = ["a", "bb", "a"]
        scores = RewardSet([dedupes], on_bad_value="skip")(["p"] * 3, texts)
        assert column(scores) == [1.0, 2.0, 1.0]
        with pytest.raises(ValueError, match="returned 2 values for 3 completions"):
            RewardSet([dedupes])(["p"] * 3, texts)


class TestConfiguration:
    def test_dotted_paths(self) -> None:
        scores = score(f"{__name__}.lengths", "rlhf_lightning.rewards.FormatReward")
        assert column(scores) == [1.0, 2.0, 3.0]
        assert scores.names == ("lengths", "FormatReward")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("nowhere.f", "cannot import 'nowhere.f'"),
            ("math.nothing", "module 'math' has nothing called 'nothing'"),
            ("math.pi", "reward 'math.pi' is a float: give a function or the dotted path of one"),
            ("f", "'f' is not a dotted path"),
            ("rlhf_lightning.rewards.SoftOverlongReward", "needs arguments: give class_path and init_args"),
            (3, "reward 3 is a int: give a function"),
        ],
    )
    def test_paths_that_lead_nowhere(self, spec: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_reward(spec)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rewards": []}, "give a list of at least one function"),
            ({"rewards": "math.sqrt"}, "give a list of at least one function"),
            ({"weights": [1.0, 2.0]}, "weights has 2 entries for 1 rewards"),
            ({"weights": [NAN]}, "all must be finite numbers"),
            ({"names": []}, "names has 0 entries for 1 rewards"),
            ({"rewards": [lengths] * 2, "names": ["a", "a"]}, "has one name twice"),
            ({"timeout": 0}, "timeout=0 is not a finite number above 0"),
            ({"sample_timeout": -1.0}, "sample_timeout=-1.0 is not a finite number above 0"),
            ({"on_bad_value": "ignore"}, "unknown on_bad_value 'ignore'"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RewardSet(**{"rewards": [lengths], **options})

    def test_lengths_must_match(self) -> None:
        rewards = RewardSet([lengths])
        with pytest.raises(ValueError, match="'prompts' has 2 values for 3 completions"):
            rewards(["p"] * 2, TEXTS)
        with pytest.raises(ValueError, match="'answer' has 1 values for 3 completions"):
            rewards(["p"] * 3, TEXTS, {"answer": [1]})


class TestTimeLimit:
    def test_result_exception_and_no_limit(self) -> None:
        assert call_with_limit(lambda: 5, 1.0) == 5
        assert call_with_limit(lambda: 5, None) == 5
        with pytest.raises(ZeroDivisionError):
            call_with_limit(lambda: 1 // 0, 1.0)

    def test_an_alarm_of_somebody_else_still_rings(self) -> None:
        rang: list[float] = []
        previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(CallTimeoutError, match=r"took longer than 0.1 s"):
                call_with_limit(lambda: time.sleep(5), 0.1)
            assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
            time.sleep(0.3)
            assert len(rang) == 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def test_no_alarm_is_left(self) -> None:
        call_with_limit(lambda: 5, 0.05)
        time.sleep(0.1)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or signal.getitimer(signal.ITIMER_REAL)[0] > 1


def of_steps(completions: list[str]) -> list[Any]:
    return [[float(len(step)) for step in text.split(";") if step] for text in completions]


class TestSteps:
    def test_values_are_means_and_steps_are_kept(self) -> None:
        scores = RewardSet([StepReward(of_steps, ";"), lengths])(["p"] * 3, ["a;abc", "", "ab;"])
        assert scores.steps == {"of_steps": [[1.0, 3.0], [], [2.0]]}
        assert scores.values[:, 1].tolist() == [5.0, 0.0, 3.0]
        assert scores.values[[0, 2], 0].tolist() == [2.0, 2.0]
        assert math.isnan(scores.values[1, 0])
        assert scores.failures == {"of_steps": 0, "lengths": 0}

    def test_arrays_and_tensors(self) -> None:
        def arrays(completions: list[str]) -> list[Any]:
            return [np.array([0.5, 1.5]), torch.tensor([2.0])]

        scores = RewardSet([StepReward(arrays, ";")])(["p"] * 2, ["a;b", "c"])
        assert scores.steps == {"arrays": [[0.5, 1.5], [2.0]]}

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ([1.0], r"returned \[1.0\] \(list\) for the 2 steps of sample 1"),
            ([1.0, 2.0, 3.0], "for the 2 steps of sample 1: return a list with one finite number per step"),
            ([1.0, math.nan], "for the 2 steps of sample 1"),
            ([1.0, "good"], "for the 2 steps of sample 1"),
            (1.0, r"returned 1.0 \(float\) for the 2 steps of sample 1"),
            ("ab", "for the 2 steps of sample 1"),
        ],
    )
    def test_what_is_no_list_of_rewards(self, value: Any, said: str) -> None:
        def bad(completions: list[str]) -> list[Any]:
            return [[1.0] if text == "x" else value for text in completions]

        rewards = RewardSet([StepReward(bad, ";")])
        with pytest.raises(ValueError, match=said) as error:
            rewards(["p"] * 2, ["x", "a;b"])
        assert "\n" not in str(error.value)
        scores = RewardSet([StepReward(bad, ";")], on_bad_value="skip")(["p"] * 2, ["x", "a;b"])
        assert scores.failures == {"bad": 1}
        assert scores.steps == {"bad": [[1.0], []]}

    def test_a_failure_costs_its_own_sample(self) -> None:
        def fragile(completions: list[str]) -> list[Any]:
            if "x" in completions:
                raise RuntimeError("no x")
            return of_steps(completions)

        scores = RewardSet([StepReward(fragile, ";")])(["p"] * 3, ["a", "x", "b;cc"])
        assert scores.steps == {"fragile": [[1.0], [], [1.0, 2.0]]}
        assert (scores.failures, scores.errors) == ({"fragile": 1}, {"fragile": "RuntimeError: no x"})

    def test_an_exception_in_the_place_of_a_value(self) -> None:
        """The function knows which sample it failed on: it is not called again, and only that one is lost."""
        calls = []

        def judge(completions: list[str]) -> list[Any]:
            calls.append(len(completions))
            return [ValueError("unreadable") if text == "x" else 1.0 for text in completions]

        scores = RewardSet([judge])(["p"] * 3, ["a", "x", "b"])
        assert calls == [3]
        assert scores.values[[0, 2], 0].tolist() == [1.0, 1.0]
        assert (scores.failures, scores.errors) == ({"judge": 1}, {"judge": "ValueError: unreadable"})


def test_a_function_in_a_file_of_the_current_folder_is_found(tmp_path, monkeypatch):
    """An installed command has its own folder on Python's path, and not the one that it is called in."""
    (tmp_path / "rewards_of_my_own.py").write_text(
        "def short(completions): return [-float(len(c)) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert resolve_reward("rewards_of_my_own.short")(["abc"]) == [-3.0]
    with pytest.raises(ValueError, match="module 'rewards_of_my_own' has nothing called 'shrot'"):
        resolve_reward("rewards_of_my_own.shrot")
