"""When a reward function that fails ends the run, and what every rank says then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_lightning.rl import reward_failures
from rlhf_lightning.rl.reward_failures import FailureWatch

NAMES = ("a", "b")
NAN = float("nan")


def rewards(*columns: float) -> Tensor:
    """The same reward of each function for two prompts with three completions."""
    return torch.tensor(columns, dtype=torch.float64).expand(6, len(columns))


def update(watch: FailureWatch, values: Tensor, failed: tuple[float, float]) -> None:
    watch.update(NAMES, values, dict(zip(NAMES, failed, strict=True)), {"b": "RuntimeError: away"})


def test_three_in_a_row_of_one_function() -> None:
    watch = FailureWatch()
    update(watch, rewards(1.0, NAN), (0, 6))
    update(watch, rewards(1.0, NAN), (0, 12))  # groups were replaced, and failed again
    assert watch.consecutive == {"a": 0, "b": 2}
    with pytest.raises(
        ValueError,
        match=r"^reward 'b' failed on every sample of 3 iterations in a row, .*Error: away: fix or remove it",
    ):
        update(watch, rewards(1.0, NAN), (0, 6))


@pytest.mark.parametrize(
    ("values", "failed"),
    [
        (rewards(1.0, 1.0), (0, 0)),
        (rewards(1.0, 1.0), (0, 6)),  # failed ones were replaced
        (rewards(1.0, NAN), (0, 5)),  # it had nothing to say about the sixth
        (rewards(1.0, NAN), (0, 0)),
    ],
)
def test_what_ends_the_row(values: Tensor, failed: tuple[float, float]) -> None:
    watch = FailureWatch()
    for _ in range(3):
        update(watch, rewards(1.0, NAN), (0, 6))
        update(watch, rewards(1.0, NAN), (0, 6))
        update(watch, values, failed)
        assert watch.consecutive == {"a": 0, "b": 0}


def test_an_iteration_without_prompts_says_nothing() -> None:
    watch = FailureWatch()
    for _ in range(5):
        update(watch, rewards(NAN, NAN)[:0], (0, 0))
    assert watch.consecutive == {}


def test_a_rank_without_samples_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are those of all ranks; the message comes from the first that has one."""
    monkeypatch.setattr(
        reward_failures, "gather_objects", lambda errors: [{}, {"a": "KeyError: 7"}, {"a": "other"}, errors]
    )
    watch, said = FailureWatch(), set()
    watch.consecutive = {"a": 2, "b": 0}
    for errors in ({}, {"a": "mine"}):
        watch.consecutive["a"] = 2
        with pytest.raises(ValueError, match="KeyError: 7") as error:
            watch.update(NAMES, rewards(NAN, 1.0), {"a": 6.0, "b": 0.0}, errors)
        said.add(str(error.value))
    assert len(said) == 1
