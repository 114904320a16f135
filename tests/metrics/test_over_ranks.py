"""Metrics of sums and counts: values against scipy, sacrebleu, numpy and enumeration, however rows are split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_lightning import metrics as M
from rlhf_lightning.metrics.over_ranks import RankMetric

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: no oracle")
ROWS = 10
_draw = np.random.default_rng(0)
SHARES = np.round(_draw.random(ROWS) * 4) / 4
RIGHT = (_draw.random((ROWS, 5)) < 0.4).astype(float)
ANSWERS = [[[None, "1", "2", "3"][n] for n in row] for row in _draw.integers(0, 4, (ROWS, 5))]
SCORES = _draw.integers(0, 4, (ROWS, 5)).astype(float)
LOGITS, OTHERS = torch.tensor(_draw.normal(size=(2, ROWS, 7)) * 2)
TARGETS = torch.tensor(_draw.integers(0, 7, ROWS))
CHOSEN, REJECTED = _draw.normal(size=(2, ROWS))
CONFIDENCE = _draw.random(ROWS)
ERRORS = torch.tensor(_draw.integers(-1, 3, (2, ROWS)))
TEXTS = [" ".join(_draw.choice(["the", "cat", "sat", "on", "Mat"], 6)) for _ in range(ROWS)]
LENGTHS = _draw.integers(1, 50, ROWS)


def subsets(worth: Callable[[int, tuple[int, ...]], float]) -> dict[int, float]:
    """The mean over prompts and subsets of k of five samples, for each k."""
    return {k: fmean(worth(p, c) for p in range(ROWS) for c in combinations(range(5), k)) for k in (1, 2, 4, 5)}


def majority(prompt: int, chosen: tuple[int, ...]) -> float:
    votes = Counter(ANSWERS[prompt][n] for n in chosen if ANSWERS[prompt][n] is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    values = {a: fmean(RIGHT[prompt][n] for n in range(5) if ANSWERS[prompt][n] == a) for a in winners if a is not None}
    return fmean(values.values()) if winners else 0.0


def best(prompt: int, chosen: tuple[int, ...]) -> float:
    most = max(SCORES[prompt][n] for n in chosen)
    return fmean(RIGHT[prompt][n] for n in chosen if SCORES[prompt][n] == most)


def accuracy() -> dict[str, float]:
    # Wilson's of as many trials as have the variance of the mean, of these shares and of two with the largest spread.
    mean, count = SHARES.mean(), len(SHARES)
    widest, z = mean * (1 - mean), stats.norm.ppf(0.975)
    trials = count * widest / ((SHARES.var() * count + 2 * widest) / (count + 2))
    ends = np.roots([trials + z * z, -(2 * trials * mean + z * z), trials * mean * mean])
    return {"accuracy": mean, "accuracy_low": min(ends), "accuracy_high": max(ends)}


def divergences() -> dict[str, float]:
    p, q = (torch.softmax(x, dim=1).numpy() for x in (LOGITS, OTHERS))
    own, other = (np.log(x[np.arange(ROWS), TARGETS.numpy()]) for x in (p, q))
    return {
        "forward": stats.entropy(p, q, axis=1).mean(),
        "reverse": stats.entropy(q, p, axis=1).mean(),
        "k1": (own - other).mean(),
        "k3": (np.exp(other - own) - 1 - (other - own)).mean(),
        "perplexity": np.exp(-own.mean()),
        "reference_perplexity": np.exp(-other.mean()),
    }


def preferences() -> dict[str, float]:
    margins = CHOSEN - REJECTED
    interval = stats.binomtest(int((margins > 0).sum()), ROWS).proportion_ci(method="wilson")
    return {
        "accuracy": (margins > 0).mean(),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "margin": margins.mean(),
        "margin_std": margins.std(),
    }


def calibration() -> float:
    bins = np.minimum((CONFIDENCE * 4).astype(int), 3)
    hits = RIGHT[:, 0]
    return float(sum(abs(hits[bins == b].sum() - CONFIDENCE[bins == b].sum()) for b in range(4)) / ROWS)


def first_errors() -> dict[str, float]:
    predicted, expected = ERRORS.numpy()
    with_error = (predicted == expected)[expected >= 0].mean()
    without = (predicted == expected)[expected < 0].mean()
    return {
        "f1": float(stats.hmean([with_error, without])) if with_error and without else 0.0,
        "with_error": with_error,
        "without_error": without,
    }


def bigrams() -> float:
    found = [pair for text in TEXTS for pair in pairwise(text.lower().split())]
    return len(set(found)) / len(found)


def repeated() -> float:
    pairs = [list(pairwise(text.lower().split())) for text in TEXTS]
    return fmean(1 - len(set(of)) / len(of) for of in pairs)


def bleu() -> float:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: no self-BLEU")
    groups = [(TEXTS[n], TEXTS[(n + 1) % ROWS]) for n in range(ROWS)]
    found = sacrebleu.BLEU(effective_order=True)
    return fmean(found.sentence_score(a, [b]).score for pair in groups for a, b in (pair, pair[::-1]))


def lengths() -> dict[str, float]:
    values = {"mean": LENGTHS.mean(), "std": LENGTHS.std(), "min": LENGTHS.min(), "max": LENGTHS.max()}
    return {f"length/{name}": value for name, value in values.items()}


def named(prefix: str, values: dict[int, float]) -> dict[str, float]:
    return {f"{prefix}@{k}": value for k, value in values.items()}


# A metric, arguments of its update by row, and its value over all rows.
CASES: dict[str, tuple[Callable[[], RankMetric], tuple[Any, ...], Callable[[], Any]]] = {
    "accuracy": (M.AnswerAccuracy, (SHARES,), accuracy),
    "pass": (
        lambda: M.PassAtK(5),
        (RIGHT.tolist(),),
        lambda: named("pass", subsets(lambda p, c: max(RIGHT[p][n] for n in c))),
    ),
    "majority": (
        lambda: M.MajorityAtK(5),
        (ANSWERS, RIGHT.tolist()),
        lambda: named("maj", subsets(majority)),
    ),
    "best": (
        lambda: M.BestOfNCurve(5),
        (SCORES.tolist(), RIGHT.tolist()),
        lambda: named("best", subsets(best)),
    ),
    "unique": (
        M.UniqueAnswers,
        (ANSWERS,),
        lambda: fmean(len({a for a in row if a}) / sum(a is not None for a in row) for row in ANSWERS),
    ),
    "divergence": (M.TokenDivergence, (LOGITS, OTHERS, TARGETS), divergences),
    "perplexity": (M.Perplexity, (-torch.tensor(CONFIDENCE),), lambda: np.exp(CONFIDENCE.mean())),
    "preferences": (M.PreferenceAccuracy, (CHOSEN, REJECTED), preferences),
    "calibration": (lambda: M.CalibrationError(4), (CONFIDENCE, RIGHT[:, 0]), calibration),
    "first_errors": (M.FirstErrorF1, (ERRORS[0], ERRORS[1]), first_errors),
    "distinct": (lambda: M.DistinctN(2), (TEXTS,), bigrams),
    "self_bleu": (M.SelfBLEU, ([(TEXTS[n], TEXTS[(n + 1) % ROWS]) for n in range(ROWS)],), bleu),
    "lengths": (M.CompletionLengths, (LENGTHS,), lengths),
    "truncated": (M.TruncationShare, (RIGHT[:, 1],), lambda: RIGHT[:, 1].mean()),
    "repetition": (lambda: M.RepetitionShare(2), (TEXTS,), repeated),
}


def values(found: Any) -> dict[str, float]:
    found = found if isinstance(found, dict) else {"value": found}
    assert all(isinstance(value, Tensor) and value.dtype == torch.float64 for value in found.values())
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_oracles_however_rows_are_split(case: str) -> None:
    make, rows, oracle = CASES[case]
    expected = oracle()
    expected = expected if isinstance(expected, dict) else {"value": expected}
    expected = {name: float(value) for name, value in expected.items()}
    whole = make()
    whole.update(*rows)
    assert values(whole.compute()) == pytest.approx(expected, rel=1e-9)

    # Three ranks: one has two batches, one has no rows.
    ranks = [make() for _ in range(3)]
    for rank, start, end in ((0, 0, 1), (0, 1, 4), (2, 4, ROWS)):
        ranks[rank].update(*(column[start:end] for column in rows))
    for rank in (1, 2):
        ranks[0].merge_state(ranks[rank])
    assert values(ranks[0].compute()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_metric_without_rows_is_nan_and_forward_gives_the_batch(case: str) -> None:
    make, rows, _ = CASES[case]
    metric = make()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(np.isnan(value) for value in values(metric.compute()).values())
    metric.update(*(column[:4] for column in rows))
    of_batch, alone = metric(*(column[4:] for column in rows)), make()
    alone.update(*(column[4:] for column in rows))
    assert values(of_batch) == pytest.approx(values(alone.compute()), nan_ok=True)
    whole = make()
    whole.update(*rows)
    assert values(metric.compute()) == pytest.approx(values(whole.compute()))


def test_accuracies_of_right_and_wrong_have_wilsons_interval() -> None:
    metric = M.AnswerAccuracy(level=0.9)
    metric.update(RIGHT[:, 0])
    expected = stats.binomtest(int(RIGHT[:, 0].sum()), ROWS).proportion_ci(0.9, method="wilson")
    found = values(metric.compute())
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((expected.low, expected.high))


def test_what_is_impossible_diverges_only_where_the_other_expects_it() -> None:
    metric = M.TokenDivergence()
    metric.update(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]))
    found = values(metric.compute())
    assert found["forward"] == pytest.approx(np.log(3 / 2))
    assert found["reverse"] == np.inf


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (lambda: M.AnswerAccuracy().update([0.5, 1.5]), "right has 1.5"),
        (lambda: M.AnswerAccuracy(level=95), "level is 95"),
        (lambda: M.PassAtK(4, ks=[5]), "k is 5, and there are 4 samples"),
        (lambda: M.PassAtK(4).update([[1, 0]]), r"right\[0\] has 2 values"),
        (lambda: M.PassAtK(2).update([[1, 0.5]]), "right has 0.5"),
        (lambda: M.MajorityAtK(2).update([["1", "2"]], []), "answers has 1 entries"),
        (lambda: M.PreferenceAccuracy().update([1.0], [float("nan")]), r"rejected\[0\] is nan"),
        (lambda: M.PreferenceAccuracy().update([1.0], [1.0, 2.0]), "chosen has shape"),
        (lambda: M.CalibrationError().update([1.5], [1.0]), "a confidence is 1.5"),
        (lambda: M.CalibrationError(0), "num_bins is 0"),
        (lambda: M.DistinctN(0), "n is 0"),
    ],
)
def test_bad_input(run: Callable[[], Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        run()
