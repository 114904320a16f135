"""Elo against a table worked by hand, opponents' weights against their formulas, prompts against naive definitions."""

from __future__ import annotations

import itertools
import re
from random import Random

import pytest

from rlhf_lightning.self_improvement import (
    Sample,
    ScoredPrompt,
    challenger,
    challenges,
    elo_ratings,
    frontier,
    new_prompts,
)
from rlhf_lightning.self_improvement.challenger import rouge_l
from rlhf_lightning.self_improvement.self_play import league_weights


def test_elo_by_hand():
    """Three games with k = 32, each expectation computed with a calculator.

    1. a beats b, both at 1000: expected 0.5, so +16 and -16: a 1016, b 984.
    2. b draws with c (1000): expected 1 / (1 + 10 ** (16 / 400)) = 0.476990, so b +0.736307: b 984.736307 and
       c 999.263693.
    3. c beats a: expected of c 1 / (1 + 10 ** (16.736307 / 400)) = 0.475933, so c +16.770140.
    """
    found = elo_ratings([("a", "b", 1.0), ("b", "c", 0.5), ("c", "a", 1.0)])
    assert found == pytest.approx({"a": 999.229860, "b": 984.736307, "c": 1016.033833}, abs=2e-5)
    assert sum(found.values()) == pytest.approx(3000.0)


def test_ratings_continue():
    games = [("a", "b", 1.0), ("b", "c", 0.0), ("a", "c", 0.25)]
    whole = elo_ratings(games, k=20, start=1200)
    parts = elo_ratings(games[1:], k=20, start=1200, ratings=elo_ratings(games[:1], k=20, start=1200))
    assert whole == parts


@pytest.mark.parametrize(
    ("game", "message"),
    [(("a", "a", 1.0), "game 0 is of 'a' against itself"), (("a", "b", 1.5), "the score of game 0 is 1.5; it must be")],
)
def test_games_that_there_are_not(game, message):
    with pytest.raises(ValueError, match=message):
        elo_ratings([game])


def test_opponents():
    rates = [0.0, 0.5, 0.75, 1.0]
    assert league_weights(rates, "uniform") == [0.25] * 4
    assert league_weights(rates, "hard") == pytest.approx([1 / 1.3125, 0.25 / 1.3125, 0.0625 / 1.3125, 0.0])
    assert league_weights(rates, "even") == pytest.approx([0.0, 0.25 / 0.4375, 0.1875 / 0.4375, 0.0])
    assert league_weights(rates, "even", floor=0.2) == pytest.approx(
        [0.05, 0.05 + 0.8 * 0.25 / 0.4375, 0.05 + 0.8 * 0.1875 / 0.4375, 0.05]
    )
    assert league_weights([1.0, 1.0], "hard") == [0.5, 0.5]  # nobody is left to beat
    for arguments, message in (
        (([],), "win_rates is empty"),
        (([1.2],), r"win_rates has 1.2; each must be in \[0, 1\]"),
        (([0.5], "hrd"), "kind is 'hrd'; it must be one of uniform, hard, even; did you mean 'hard'"),
    ):
        with pytest.raises(ValueError, match=message):
            league_weights(*arguments)


def longest_common(one: list[str], other: list[str]) -> int:
    """By enumeration of all subsequences."""
    for size in range(len(one), 0, -1):
        for places in itertools.combinations(range(len(one)), size):
            rest = iter(other)
            if all(one[n] in rest for n in places):
                return size
    return 0


def test_overlap_is_that_of_all_subsequences():
    random = Random(0)
    for _ in range(60):
        one, other = ([random.choice("abc") for _ in range(random.randrange(1, 8))] for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(2 * longest_common(one, other) / (len(one) + len(other)))


def test_near_copies_are_dropped():
    known = ["what is the sum of 3 and 4"]
    candidates = ["what is the sum of 5 and 4", " name a river ", "", "name a river", "name a big old lake"]
    assert new_prompts(candidates, known) == ["name a river", "name a big old lake"]
    assert new_prompts(candidates[:1], known, max_overlap=1.0) == candidates[:1]
    with pytest.raises(ValueError, match=r"max_overlap is 0; it must be in \(0, 1\]"):
        new_prompts([], [], max_overlap=0)


def test_near_copies_are_those_of_a_naive_loop():
    draw = Random(0)
    texts = [" ".join(draw.choices("abcdef", k=draw.randrange(9))) for _ in range(120)]
    known, candidates = texts[:20], texts[20:]
    for max_overlap in (0.3, 0.7, 1.0):
        kept: list[str] = []
        for text in candidates:
            others = [*known, *kept]
            if text and all(rouge_l(text.split(), other.split()) < max_overlap for other in others):
                kept.append(text)
        assert new_prompts(candidates, known, max_overlap=max_overlap) == kept


def test_most_texts_are_told_apart_without_a_search(monkeypatch):
    searched = []
    monkeypatch.setattr(challenger, "rouge_l", lambda one, other: searched.append((one, other)) or rouge_l(one, other))
    known = ["add one and two", "name a long river in the south", ""]
    different = ["add one and three", "draw five blue birds"]
    assert new_prompts(different, known, max_overlap=0.8) == different
    assert searched == []
    # Words in another order: only the search tells.
    assert new_prompts(["two and one add"], known, max_overlap=0.8) == ["two and one add"]
    assert len(searched) == 1


def test_requests_have_examples():
    seeds = ["one", "two", "three", "four", "five"]
    found = challenges(seeds, number=6, num_examples=2, template="{examples}\nNext:", seed=1)
    for text in found:
        shown = re.findall(r"Task: (\w+)", text)
        assert len(set(shown)) == 2
        assert set(shown) <= set(seeds)
    assert len(set(found)) > 1
    assert challenges(seeds, number=3, num_examples=2, template="{examples}\nNext:", seed=1) == found[:3]
    with pytest.raises(ValueError, match=r"template has no \{examples\}"):
        challenges(seeds, number=1, template="Next:")


def test_what_is_solved_sometimes_is_kept():
    def scored(name: str, *scores: float | None) -> ScoredPrompt:
        return ScoredPrompt(name, tuple(Sample("x", score) for score in scores))

    prompts = [scored("never", 0.0, 0.0), scored("always", 1.0, 1.0), scored("half", 1.0, 0.0, None), scored("?", None)]
    assert [p.prompt for p in frontier(prompts)] == ["half"]
    assert frontier(prompts, high=0.5) == []
    with pytest.raises(ValueError, match=r"high is 0\.2; it must be above low=0\.5"):
        frontier(prompts, low=0.5, high=0.2)
