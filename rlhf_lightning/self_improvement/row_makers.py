"""Rows of scored samples: demonstrations, preference pairs, unpaired rows; pure functions, with provenance.

Every row has a column ``provenance`` with the prompt's row, the hash of the model, and seed and score of its samples.
A sample that was truncated, is empty or has no score is in no row but those of ``scored_rows``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..data.formats import OF_ANSWERS
from ..inference.reasoning_rows import REASONING, Reasoning, with_reasoning
from ..utils.validation import check_choice, check_count, check_not_negative
from .samples import Sample, ScoredPrompt
from .templates import asked_like, fill, last_words

Row = dict[str, Any]
PAIRINGS = ("best_worst", "all")
# Columns that rows define themselves, or that would be read as if they were about the samples: those of a prompt are
# left out.
_OWN = ("prompt", *OF_ANSWERS, "score", "ended", "provenance")


def demonstrations(
    prompts: Sequence[ScoredPrompt],
    *,
    threshold: float | None = None,
    keep: int | None = 1,
    reasoning: Reasoning = "stripped",
) -> list[Row]:
    """Makes rows for SFT of the best samples of each prompt: rejection sampling.

    RAFT (Dong et al., 2023, arXiv:2304.06767) keeps the best sample of every prompt: the defaults. ReST-EM (Singh et
    al., 2023, arXiv:2312.06585) and STaR (Zelikman et al., 2022, arXiv:2203.14465) keep right ones: a threshold, with
    ``keep=10`` and ``keep=1``.

    Args:
        prompts: with their samples.
        threshold: least score of a sample that is kept; by default any.
        keep: largest number of different samples of a prompt, at least 1; ``None`` for all.
        reasoning: whether the thought before a sample is learned (``kept``), part of the prompt (``masked``) or left
            out; with the first two, samples whose thought the model has not closed make no row.

    Returns:
        Rows with ``prompt``, ``completion``, the prompt's other columns and ``provenance``, in the order of the
        prompts; of a prompt, the best first, and of equals the first drawn.

    Example:
        >>> drawn = (Sample("#4", 1.0), Sample("#5", 0.0), Sample("2+2=4 #4", 1.0))
        >>> [row["completion"] for row in demonstrations([ScoredPrompt("2+2=?", drawn)], threshold=0.5, keep=None)]
        ['#4', '2+2=4 #4']
    """
    if keep is not None:
        check_count("keep", keep, "1 keeps the best, null all")
    check_choice("reasoning", reasoning, REASONING)
    rows = []
    for scored in prompts:
        good = [s for s in _distinct(scored) if threshold is None or _score(s) >= threshold]
        good = [sample for sample in good if sample.passage or reasoning == "stripped"]
        # Sorting is stable: the first of equals stays first.
        for sample in sorted(good, key=_score, reverse=True)[:keep]:
            own = {"completion": sample.text}
            if sample.passage:
                own = with_reasoning(scored.prompt, sample.passage, sample.text, reasoning)
            rows.append(_row(scored, own, sample.provenance))
    return rows


def preference_pairs(
    prompts: Sequence[ScoredPrompt],
    *,
    margin: float = 0.0,
    pairing: Literal["best_worst", "all"] = "best_worst",
) -> list[Row]:
    """Makes preference pairs of samples with different scores: the rows of iterative DPO.

    Scores of a verifier give the pairs of Iterative Reasoning Preference Optimization (Pang et al., 2024,
    arXiv:2404.19733), those of the policy as its own judge the pairs of Self-Rewarding Language Models (Yuan et al.,
    2024, arXiv:2401.10020).

    Args:
        prompts: with their samples.
        margin: the scores of a pair differ by more than this, at least 0.
        pairing: the best with the worst of each prompt, the first drawn of equals; or ``all`` pairs that differ.

    Returns:
        Rows with ``prompt``, ``chosen``, ``rejected``, the prompt's other columns and ``provenance``.

    Example:
        >>> drawn = (Sample("#5", 0.0), Sample("#4", 1.0), Sample("#6", 0.0))
        >>> [(row["chosen"], row["rejected"]) for row in preference_pairs([ScoredPrompt("2+2=?", drawn)])]
        [('#4', '#5')]
    """
    check_choice("pairing", pairing, PAIRINGS)
    check_not_negative("margin", margin, "0 takes every difference")
    rows = []
    for scored in prompts:
        for chosen, rejected in _extremes(scored) if pairing == "best_worst" else _all_pairs(scored):
            if _score(chosen) - _score(rejected) > margin and chosen.text != rejected.text:
                texts = {"chosen": chosen.text, "rejected": rejected.text}
                both = {"chosen": chosen.provenance, "rejected": rejected.provenance}
                rows.append(_row(scored, texts, both))
    return rows


def unpaired_rows(prompts: Sequence[ScoredPrompt], *, threshold: float) -> list[Row]:
    """Makes rows for KTO: each different sample, with a label that tells whether its score reaches the threshold.

    Example:
        >>> drawn = (Sample("#4", 1.0), Sample("#5", 0.0))
        >>> [row["label"] for row in unpaired_rows([ScoredPrompt("2+2=?", drawn)], threshold=0.5)]
        [True, False]
    """
    return [
        _row(scored, {"completion": sample.text, "label": _score(sample) >= threshold}, sample.provenance)
        for scored in prompts
        for sample in _distinct(scored)
    ]


def spin_pairs(prompts: Sequence[ScoredPrompt], *, column: str = "completion") -> list[Row]:
    r"""Makes the pairs of SPIN: demonstrations against the model's own samples.

    Paper: Self-Play Fine-Tuning (Chen et al., 2024, arXiv:2401.01335). With its logistic loss :math:`\ell`,

    .. math:: \ell\left(\lambda \log \frac{p_\theta(y)}{p_{\theta_t}(y)}
        - \lambda \log \frac{p_\theta(y')}{p_{\theta_t}(y')}\right), \qquad \ell(x) = \log(1 + \exp(-x)),

    a round of SPIN is DPO on these pairs with :math:`\beta = \lambda` and the model that drew the samples as its
    reference. Scores are not read.

    Args:
        prompts: with their samples, and the demonstrations among their columns.
        column: name of the demonstrations' column.

    Returns:
        A row for each different sample that ended and is not the demonstration.

    Raises:
        ValueError: a prompt has no text in that column.

    Example:
        >>> scored = ScoredPrompt("2+2=?", (Sample("#5", None),), {"completion": "2+2=4 #4"})
        >>> [(row["chosen"], row["rejected"]) for row in spin_pairs([scored])]
        [('2+2=4 #4', '#5')]
    """
    rows = []
    for scored in prompts:
        demonstration = scored.columns.get(column)
        if not isinstance(demonstration, str) or not demonstration:
            have = ", ".join(sorted(scored.columns)) or "none"
            raise ValueError(
                f"the prompt {scored.row_id!r} has no text in the column {column!r} (it has {have}), and SPIN compares "
                "samples with demonstrations: name their column, and read prompts from rows that have it"
            )
        seen = {demonstration, ""}
        for sample in scored.samples:
            if sample.ended and sample.text not in seen:
                seen.add(sample.text)
                texts = {"chosen": demonstration, "rejected": sample.text}
                origin = {"chosen": {"column": column}, "rejected": sample.provenance}
                rows.append(_row(scored, texts, origin))
    return rows


def scored_rows(prompts: Sequence[ScoredPrompt]) -> list[Row]:
    """Makes a row of every sample, whatever it is, with ``score`` and whether it ``ended``.

    Example:
        >>> [row["score"] for row in scored_rows([ScoredPrompt("2+2=?", (Sample("#4", 1.0), Sample("", None)))])]
        [1.0, None]
    """
    return [
        _row(scored, {"completion": s.text, "score": s.score, "ended": s.ended}, s.provenance)
        for scored in prompts
        for s in scored.samples
    ]


def hinted_rows(prompts: Sequence[ScoredPrompt], template: str, *, threshold: float) -> list[Row]:
    """Puts a hint into prompts that no sample solved: rationalisation, as in STaR.

    Args:
        prompts: with their samples.
        template: text with the place ``{prompt}`` and those of columns, such as ``{answer}``; of a chat, ``{prompt}``
            is the last user message.
        threshold: score of a sample that solves its prompt.

    Returns:
        The prompts' rows with the hint, and in ``unhinted`` the prompt as it was with its row id and its place among
        the given ones. Their samples become rows of the prompt without it by ``without_hints``.

    Raises:
        ValueError: a place in the template that is no column.

    Example:
        >>> scored = ScoredPrompt("2+2=?", (Sample("#5", 0.0),), {"answer": "4"})
        >>> hinted_rows([scored], "{prompt} (it is {answer})", threshold=0.5)[0]["prompt"]
        '2+2=? (it is 4)'
    """
    if "{prompt}" not in template:
        raise ValueError(f"the template {template!r} has no {{prompt}}: write where it stands")
    unsolved = [(n, p) for n, p in enumerate(prompts) if not any(_score(s) >= threshold for s in p.usable)]
    return [
        dict(p.columns)
        | {"prompt": _hinted(p, template), "unhinted": {"prompt": p.prompt, "row_id": p.row_id, "place": n}}
        for n, p in unsolved
    ]


def without_hints(prompts: Sequence[ScoredPrompt]) -> list[ScoredPrompt]:
    """Puts the samples of ``hinted_rows`` under the prompts that have no hint."""
    found = []
    for scored in prompts:
        columns = dict(scored.columns)
        before = columns.pop("unhinted")
        found.append(ScoredPrompt(before["prompt"], scored.samples, columns, before["row_id"], scored.model))
    return found


def _hinted(scored: ScoredPrompt, template: str) -> Any:
    filled = fill(template, {**scored.columns, "prompt": last_words(scored.prompt)})
    return asked_like(scored.prompt, filled)


def _row(scored: ScoredPrompt, texts: Row, provenance: Row) -> Row:
    others = {name: value for name, value in scored.columns.items() if name not in _OWN}
    return {"prompt": scored.prompt, **texts, **others, "provenance": {**scored.origin, **provenance}}


def _score(sample: Sample) -> float:
    assert sample.score is not None  # of usable samples
    return sample.score


def _distinct(scored: ScoredPrompt) -> list[Sample]:
    """Usable samples, the first of each text."""
    first: dict[str, Sample] = {}
    for sample in scored.usable:
        first.setdefault(sample.text, sample)
    return list(first.values())


def _extremes(scored: ScoredPrompt) -> Iterator[tuple[Sample, Sample]]:
    usable = scored.usable
    if usable:
        yield max(usable, key=_score), min(usable, key=_score)


def _all_pairs(scored: ScoredPrompt) -> Iterator[tuple[Sample, Sample]]:
    distinct = _distinct(scored)
    for one in distinct:
        yield from ((one, other) for other in distinct if _score(one) > _score(other))
