"""Grouping texts for scoring: prompts once, within the budget, nothing lost."""

from __future__ import annotations

import pytest

from rlhf_lightning.modules.scoring import grouped
from rlhf_lightning.sequences import Segment


def segments(*lengths: tuple[int, int]) -> list[tuple[Segment, Segment]]:
    """Prompt number (its length) and completion length of each."""
    return [(Segment([prompt] * prompt), Segment([9] * length, [1.0] * length)) for prompt, length in lengths]


@pytest.mark.parametrize("budget", [1, 6, 9, 1000])
def test_every_sequence_is_in_one_tree_of_its_prompt(budget: int) -> None:
    given = segments((2, 3), (4, 1), (2, 2), (2, 4), (4, 5), (3, 1))
    examples, numbers = grouped(given, budget)
    assert sorted(n for group in numbers for n in group) == list(range(6))
    for example, group in zip(examples, numbers, strict=True):
        assert len(group) == 1 or example.root.num_tokens <= budget
        for n, child in zip(group, example.root.children, strict=True):
            assert child is given[n][1]
            assert example.root.tokens.tolist() == given[n][0].tokens.tolist()


def test_a_prompt_is_computed_once_where_it_fits() -> None:
    examples, numbers = grouped(segments((2, 3), (4, 1), (2, 2), (2, 4)), 1000)
    assert numbers == [[0, 2, 3], [1]]
    assert [example.root.num_tokens for example in examples] == [11, 5]
    assert grouped(segments((2, 3), (2, 2), (2, 4)), 7)[1] == [[0, 1], [2]]
    assert grouped([], 10) == ([], [])
