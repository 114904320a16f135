"""Trees of turns brought within a length: every path is measured, and what is left is still one sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lightning.data.lengths import fit_to_length, longest
from rlhf_lightning.sequences import Example, grow_tree, unfold_tree


def path(*tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens; the last one is scored."""
    return np.array(tokens), np.array([0.0] * (len(tokens) - 1) + [1.0], np.float32)


@pytest.mark.parametrize(
    ("policy", "max_length", "expected"),
    [
        ("drop", 7, None),
        ("truncate_end", 7, [[1, 2, 3, 9], [1, 2, 3, 4, 5, 10]]),
        ("truncate_end", 5, [[1, 2, 3, 9]]),
        ("truncate_end", 3, None),
        ("truncate_start", 7, [[2, 3, 9], [2, 3, 4, 5, 10], [2, 3, 4, 5, 6, 7, 8]]),
        ("truncate_start", 5, [[4, 5, 10], [4, 5, 6, 7, 8]]),
        ("truncate_start", 3, [[6, 7, 8]]),
    ],
)
def test_turns_that_fork(policy: Any, max_length: int, expected: list[list[int]] | None) -> None:
    turns = [path(1, 2, 3, 9), path(1, 2, 3, 4, 5, 10), path(1, 2, 3, 4, 5, 6, 7, 8)]
    chat = Example("rows:1", grow_tree([turns]))
    assert longest(chat.root) == 8
    fitted, cut = fit_to_length(chat, max_length, policy)
    assert cut == (expected is not None)
    if fitted is not None:
        (sequence,) = unfold_tree(fitted.root)
        assert [tokens.tolist() for tokens, _ in sequence] == expected
        assert all(weights.tolist() == [0.0] * (len(tokens) - 1) + [1.0] for tokens, weights in sequence)
    else:
        assert expected is None
