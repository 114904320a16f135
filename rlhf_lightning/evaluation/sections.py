"""Scores by section: rows belong to subsets, subsets to sections, and the score is the mean over sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean


def section_scores(
    shares: Iterable[tuple[str, float]],
    sections: Mapping[str, Sequence[str]] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Computes the score of each section: the mean over its rows, with the weights that its subsets are given.

    Paper: RewardBench (Lambert et al., 2024, arXiv:2403.13787), in which the mathematical pairs of the section on
    reasoning count as much as all those of code.

    Args:
        shares: the subset and the score of each row.
        sections: the subsets of each section; by default every subset is a section.
        counts: number of rows that a subset counts as, instead of its own.

    Returns:
        The score by section, without sections that have no rows.

    Example:
        >>> rows = [("math", 1.0), ("math", 0.0), ("python", 1.0), ("easy", 1.0)]
        >>> section_scores(rows, {"reasoning": ["math", "python"], "chat": ["easy"]}, {"math": 1})
        {'reasoning': 0.75, 'chat': 1.0}
    """
    by_subset: dict[str, list[float]] = {}
    for subset, share in shares:
        by_subset.setdefault(subset, []).append(share)
    found = {}
    for name, subsets in (sections or {subset: [subset] for subset in by_subset}).items():
        sizes = {s: (counts or {}).get(s, len(by_subset[s])) for s in subsets if s in by_subset}
        if sizes:
            found[name] = sum(size * fmean(by_subset[s]) for s, size in sizes.items()) / sum(sizes.values())
    return found


def section_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """Names the scores of sections as metrics, and adds their mean as ``score``."""
    if not scores:
        return {}
    return {f"section/{name}": score for name, score in scores.items()} | {"score": fmean(scores.values())}
