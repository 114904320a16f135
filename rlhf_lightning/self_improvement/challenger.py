"""New prompts by a model: asked for by examples, without near copies, and neither solved always nor never."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from ..data.final_answer import answer_key, final_answer
from ..utils.validation import check_count, check_fraction
from .row_makers import Row
from .samples import ScoredPrompt
from .templates import check_places, fill

CHALLENGE = """\
Write one new task like these, and nothing else.

{examples}

Task:"""


def challenges(
    seeds: Sequence[str], *, number: int, num_examples: int = 4, template: str = CHALLENGE, seed: int = 0
) -> list[str]:
    """Makes requests for new prompts, each with examples drawn from known prompts: Self-Instruct.

    Paper: Wang et al., 2023, arXiv:2212.10560.

    Args:
        seeds: prompts to draw examples from.
        number: of requests, at least 1.
        num_examples: in each request, at least 1; all prompts if there are fewer.
        template: with the place ``{examples}``.
        seed: of the draws.

    Raises:
        ValueError: no prompts, a number out of its range, or a template without its place.

    Example:
        >>> challenges(["1+1=?"], number=1, template="{examples} Next:")
        ['Task: 1+1=? Next:']
    """
    check_count("number", number, "one for each new prompt that is wanted")
    check_count("num_examples", num_examples, "4 is usual")
    check_places("template", template, ("examples",))
    if not seeds:
        raise ValueError("seeds is empty: give some prompts as examples")
    found = []
    for place in range(number):
        # One generator for each request: more requests begin with the same ones.
        drawn = Random(f"challenges/{seed}/{place}").sample(list(seeds), min(num_examples, len(seeds)))
        found.append(fill(template, {"examples": "\n\n".join(f"Task: {text}" for text in drawn)}))
    return found


def new_prompts(candidates: Sequence[str], known: Sequence[str], *, max_overlap: float = 0.7) -> list[str]:
    """Keeps candidates that are not empty and not near copies of known prompts or of those kept before them.

    Overlap is ROUGE-L, the F1 score of the longest common subsequence of words, as in Self-Instruct.

    Args:
        candidates: texts of a model.
        known: prompts that there are.
        max_overlap: a candidate with this overlap or more is dropped, in (0, 1].

    Raises:
        ValueError: ``max_overlap`` out of its range.

    Example:
        >>> new_prompts(["add two and two", "add two and three", "name a river"], ["add one and one"])
        ['add two and two', 'name a river']
    """
    if not 0 < max_overlap <= 1:
        raise ValueError(f"max_overlap is {max_overlap}; it must be in (0, 1] (0.7 is usual)")
    others = [_Words(text) for text in known]
    kept = []
    for candidate in candidates:
        own = _Words(candidate)
        if own.words and not any(own.overlaps(other, max_overlap) for other in others):
            kept.append(candidate.strip())
            others.append(own)
    return kept


class _Words:
    """The words of a text, in their order and as a set."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self.known = frozenset(self.words)

    def overlaps(self, other: _Words, max_overlap: float) -> bool:
        """Tells whether the overlap with another text reaches a limit."""
        # A common subsequence has no words but those of both: most pairs need no search for the longest.
        bound = min(sum(word in other.known for word in self.words), len(other.words))
        total = len(self.words) + len(other.words)
        return 2 * bound / total >= max_overlap and rouge_l(self.words, other.words) >= max_overlap


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """Returns ROUGE-L of two texts: the F1 score of their longest common subsequence (Lin, 2004).

    Example:
        >>> round(rouge_l("the cat sat".split(), "the big cat sat down".split()), 4)
        0.75
    """
    if not one or not other:
        return 0.0
    # lengths[n]: of the longest common subsequence of the words of `one` so far and the first n of `other`.
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for n, with_word in enumerate(other, start=1):
            diagonal, before = before, lengths[n]
            lengths[n] = diagonal + 1 if word == with_word else max(lengths[n], lengths[n - 1])
    return 2 * lengths[-1] / (len(one) + len(other))


def frontier(
    prompts: Sequence[ScoredPrompt], *, success: float = 0.5, low: float = 0.0, high: float = 1.0
) -> list[ScoredPrompt]:
    """Keeps prompts that the model solves sometimes: what is always or never solved teaches nothing.

    Args:
        prompts: with their samples.
        success: least score of a sample that solves its prompt.
        low: the pass rate is above this, in [0, 1).
        high: and below this.

    Raises:
        ValueError: an empty range of pass rates.

    Example:
        >>> from rlhf_lightning.self_improvement import Sample
        >>> some = ScoredPrompt("a", (Sample("x", 1.0), Sample("y", 0.0)))
        >>> never = ScoredPrompt("b", (Sample("x", 0.0), Sample("y", 0.0)))
        >>> [scored.prompt for scored in frontier([some, never])]
        ['a']
    """
    check_fraction("low", low, "0 drops what is never solved")
    if not low < high <= 1:
        raise ValueError(f"high is {high}; it must be above low={low} and at most 1, which drops what is always solved")
    rates = [(scored, scored.pass_rate(success)) for scored in prompts]
    return [scored for scored, rate in rates if rate is not None and low < rate < high]


def agreement(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Scores samples by whether they answer as most samples of their prompt do: for prompts without a known answer.

    The label of self-consistency (Wang et al., 2023, arXiv:2203.11171), which R-Zero (Huang et al., 2025,
    arXiv:2508.05004) trains on. Answers are those after a marker (``final_answer``); of equally frequent ones, the
    first drawn counts.

    Args:
        prompts: one for each completion; equal ones are one prompt.
        completions: samples.

    Returns:
        1 for the most frequent answer, 0 for another or none.

    Example:
        >>> agreement(["2+2=?"] * 4, ["#5", "#4", "2+2=4 #4.0", "I do not know"])
        [0.0, 1.0, 1.0, 0.0]
    """
    keys = [answer_key(text) if final_answer(text) is not None else None for text in completions]
    votes: dict[str, Counter[Any]] = {}
    for prompt, key in zip(prompts, keys, strict=True):
        counted = votes.setdefault(repr(prompt), Counter())
        counted.update([] if key is None else [key])
    # The most common of a counter is the first of equals.
    most = {prompt: next(iter(counted.most_common(1)), (None, 0))[0] for prompt, counted in votes.items()}
    return [float(key is not None and key == most[repr(prompt)]) for prompt, key in zip(prompts, keys, strict=True)]


def challenge_rows(prompts: Sequence[ScoredPrompt], *, success: float = 0.5, answered: bool = False) -> list[Row]:
    """Makes rows of new prompts with their pass rates.

    Args:
        prompts: with their samples.
        success: least score of a sample that solves its prompt.
        answered: adds a column ``answer``: the final answer of the first sample that solves the prompt; for samples
            that were scored by ``agreement``.

    Example:
        >>> from rlhf_lightning.self_improvement import Sample
        >>> drawn = (Sample("#5", 0.0), Sample("2+2=4 #4", 1.0))
        >>> challenge_rows([ScoredPrompt("2+2=?", drawn, model="ab")], answered=True)[0]["answer"]
        '4'
    """
    rows = []
    for scored in prompts:
        row: Row = {"prompt": scored.prompt, "pass_rate": scored.pass_rate(success)}
        if answered:
            solved = (s.text for s in scored.samples if s.score is not None and s.score >= success)
            row["answer"] = next(filter(None, map(final_answer, solved)), None)
        rows.append(row | {"provenance": scored.origin})
    return rows
