"""Diversity, repetition and length of texts, by hand and against sacrebleu."""

from __future__ import annotations

import math

import pytest

from rlhf_lightning.metrics.texts import distinct_n, length_statistics, repetition, self_bleu, unique_share


def test_distinct_n_by_hand() -> None:
    texts = ["The cat sat", "the cat ran", "a"]
    assert distinct_n(texts, 1) == pytest.approx(5 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)
    assert math.isnan(distinct_n(texts, 4))


def test_repetition_by_hand() -> None:
    assert repetition("x y x y x y", n=2) == pytest.approx(3 / 5)
    assert repetition("x y", n=3) == 0.0


def test_unique_share_and_lengths() -> None:
    assert unique_share([None]) != unique_share([None])
    assert unique_share(["1", None, "1", "2"]) == pytest.approx(2 / 3)
    assert length_statistics([2, 4]) == {"mean": 3.0, "median": 3.0, "std": 1.0, "min": 2.0, "max": 4.0}
    assert length_statistics([]) == {}


def test_self_bleu_is_the_mean_of_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: no self-BLEU")
    texts = ["the cat sat on the mat today", "the cat sat on a red mat", "dogs bark at night in the town"]
    expected = [
        sacrebleu.BLEU(effective_order=True).sentence_score(text, [other for other in texts if other is not text]).score
        for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / 3)
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(100)
    assert self_bleu(texts) < 100


@pytest.mark.parametrize("run", [lambda: distinct_n(["a"], 0), lambda: repetition("a", 0), lambda: self_bleu(["a"])])
def test_bad_input(run: object) -> None:
    assert callable(run)
    with pytest.raises(ValueError, match=r"is 0|of 1 texts"):
        run()
