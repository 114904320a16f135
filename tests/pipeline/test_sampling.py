"""Which two of a prompt's answers become a pair, and what a pipeline's figures show."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.callbacks.answers import Answer
from rlhf_lightning.pipeline.figures import points
from rlhf_lightning.pipeline.sampling import ranked_pair, sampling_params
from rlhf_lightning.rollouts import Completion
from rlhf_lightning.sequences import Example, Segment


def answers(*given: tuple[str, float | None, str]) -> list[Answer]:
    example = Example("p:1", Segment(np.array([1])), {"prompt": "1+1=?", "answer": "2", "chosen": "of the source"})
    return [Answer(example, Completion([1], text, [0.0], reason), reward) for text, reward, reason in given]


def test_the_first_best_and_the_first_worst_make_a_pair():
    group = answers(("a", 0.0, "stop"), ("b", 0.5, "stop"), ("c", 1.0, "stop"), ("d", 1.0, "stop"), ("e", 0.0, "stop"))
    assert ranked_pair(group) == {"prompt": "1+1=?", "chosen": "c", "rejected": "a", "answer": "2"}


@pytest.mark.parametrize(
    "group",
    [
        answers(("a", 1.0, "stop"), ("b", 1.0, "stop")),  # equally good
        answers(("a", 1.0, "stop"), ("b", 0.0, "length")),  # cut off: how it would have ended is not known
        answers(("a", 1.0, "stop"), ("b", None, "stop")),  # not judged
        answers(("a", 1.0, "stop"), ("", 0.0, "stop")),  # empty: no token to learn from
        [],
    ],
)
def test_no_pair(group):
    assert ranked_pair(group) is None


def test_sampling_settings_are_checked():
    assert sampling_params({"temperature": 0.7, "max_new_tokens": 5}).temperature == 0.7
    with pytest.raises(ValueError, match="sampling has no key 'temperatur_'; did you mean 'temperature'"):
        sampling_params({"temperatur_": 1.0})
    with pytest.raises(ValueError, match="sampling has no key 'seed'"):
        sampling_params({"seed": 1})


def test_points_count_steps_taken():
    history = [
        {"step": 0, "val/loss": 3.0},
        {"step": 0, "train/loss": 2.0},
        {"step": 1, "train/loss": 1.5},
        {"step": 1, "val/loss": 1.0},
        {"step": 3, "val/loss": None},
    ]
    assert points(history, "val/loss") == ([0.0, 2.0], [3.0, 1.0])
    assert points(history, "train/loss") == ([0.0, 1.0], [2.0, 1.5])
