"""Grouping texts for scoring: prompts once, within the budget, nothing lost."""

from __future__ import annotations

import pytest

from rlhf_lightning.models.scoring import grouped
from rlhf_lightning.sequences import Segment


def trees(*lengths: tuple[int, int]) -> list[Segment]:
    """Prompt number (its length) and completion length of each."""
    return [Segment([prompt] * prompt, children=(Segment([9] * length, [1.0] * length),)) for prompt, length in lengths]


@pytest.mark.parametrize("budget", [1, 6, 9, 1000])
def test_every_sequence_is_in_one_tree_of_its_prompt(budget: int) -> None:
    given = trees((2, 3), (4, 1), (2, 2), (2, 4), (4, 5), (3, 1))
    examples, numbers = grouped(given, budget)
    assert sorted(n for group in numbers for n in group) == list(range(6))
    for example, group in zip(examples, numbers, strict=True):
        assert len(group) == 1 or example.root.num_tokens <= budget
        for n, child in zip(group, example.root.children, strict=True):
            assert child is given[n].children[0]
            assert example.root.tokens.tolist() == given[n].tokens.tolist()


def test_a_prompt_is_computed_once_where_it_fits() -> None:
    examples, numbers = grouped(trees((2, 3), (4, 1), (2, 2), (2, 4)), 1000)
    assert numbers == [[0, 2, 3], [1]]
    assert [example.root.num_tokens for example in examples] == [11, 5]
    assert grouped(trees((2, 3), (2, 2), (2, 4)), 7)[1] == [[0, 1], [2]]
    assert grouped([], 10) == ([], [])


def test_an_answer_of_several_paths_stays_alone() -> None:
    forked = Segment([2, 2], children=(Segment([9], [1.0], continued=True), Segment([8, 9], [0.0, 1.0])))
    examples, numbers = grouped([*trees((2, 3)), forked, *trees((2, 2))], 1000)
    assert numbers == [[0, 2], [1]]
    assert [len(list(example.root.sequences())) for example in examples] == [2, 1]
