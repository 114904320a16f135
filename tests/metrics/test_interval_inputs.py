"""Paired tests and estimates at k: tensors and numbers of numpy are taken, values that cannot be are refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.metrics.at_k import expected_best, pass_at_k
from rlhf_lightning.metrics.intervals import mcnemar, paired_bootstrap

A, B = [1.0, 0.5, 0.0, 1.0], [0.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "convert",
    [
        lambda values: torch.tensor(values, dtype=torch.bfloat16),
        lambda values: torch.tensor(values, requires_grad=True),
        np.array,
        tuple,
    ],
    ids=["bf16", "requires_grad", "numpy", "tuple"],
)
def test_scores_may_be_of_any_type(convert: Any) -> None:
    assert paired_bootstrap(convert(A), convert(B)) == paired_bootstrap(A, B)
    right, wrong = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]
    assert mcnemar(convert(right), convert(wrong)) == 0.5  # 2 of 2: twice 1/4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap(1.0, B), "scores_a has the shape (); give one number per prompt"),  # type: ignore[arg-type]
        (lambda: paired_bootstrap(A, (b for b in B)), "scores_b is <generator"),  # type: ignore[arg-type]
        (lambda: paired_bootstrap(A, B[:3]), "scores_a has 4 entries and scores_b 3"),
        (lambda: paired_bootstrap(A, [*B[:3], math.nan]), "scores_b[3] is nan; every score must be finite"),
        (lambda: paired_bootstrap(A, B, num_resamples=1000.5), "num_resamples is 1000.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: paired_bootstrap(A, B, seed=-1), "seed is -1; it must be a whole number of at least 0"),
        (lambda: mcnemar([0.5, 0.2], [0, 1]), "right_a[0] is 0.5; write True or False"),  # type: ignore[list-item]
        (lambda: mcnemar([True, False], [True, math.nan]), "right_b[1] is nan; write True or False"),  # type: ignore[list-item]
        (lambda: mcnemar([True], [True, False]), "right_a has 1 entries and right_b 2"),
        (lambda: expected_best([0.0, math.nan]), "scores[1] is nan; it must be finite"),
        (lambda: expected_best([0.0, 1.0], [1.0]), "scores has 2 entries and values 1"),
        (lambda: expected_best([0.0] * 1100), "there are 1100 samples of a prompt; give at most 1000"),
        (lambda: pass_at_k(4, 1.0, 2), "num_correct is 1.0; it must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_other_input_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy_count() -> None:
    assert pass_at_k(np.int64(4), np.int32(1), np.int64(2)) == 0.5  # type: ignore[arg-type]
