"""Scorers of solutions by functions, likelihood and text, and sums of scorers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from ..utils.imports import load_attribute
from ..utils.validation import check_choice
from .strategy import Candidate, Scorer, Scores


class VerifierScorer:
    """Scores solutions by a reward function, such as a check of the answer.

    Args:
        function: a reward function, ``(prompts, completions, **columns) -> numbers``, or its dotted path. It gets the
            columns of ``search(columns=...)`` that its signature names, or all of them if it takes ``**columns``.
        no_verdict: the score where it returns ``None``.

    Example:
        >>> from rlhf_lightning.inference.strategy import Candidate, Query
        >>> longest = VerifierScorer(lambda prompts, completions: [len(text) for text in completions])
        >>> longest.score([Candidate(Query("2+2=", (), 0), (), "four")]).values
        [4.0]
    """

    def __init__(self, function: Callable[..., Any] | str, *, no_verdict: float = 0.0) -> None:
        self.function = load_attribute(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(
                f"function is a {type(self.function).__name__}: give a reward function, or its dotted path"
            )
        self.no_verdict = no_verdict
        self._columns = _column_names(self.function)

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates.

        Raises:
            ValueError: the function returned another number of values.
        """
        if not candidates:
            return Scores([], [])
        names = sorted({name for candidate in candidates for name in candidate.query.columns})
        if self._columns is not None:
            names = [name for name in names if name in self._columns]
        columns = {name: [candidate.query.columns.get(name) for candidate in candidates] for name in names}
        prompts = [candidate.query.prompt for candidate in candidates]
        found = list(self.function(prompts, [candidate.text for candidate in candidates], **columns))
        if len(found) != len(candidates):
            raise ValueError(
                f"the verifier gave {len(found)} values for {len(candidates)} solutions: one each is needed"
            )
        return Scores([self.no_verdict if value is None else float(value) for value in found], [0] * len(found))


class LikelihoodScorer:
    """Scores solutions by the mean log-probability of their tokens under the distribution they were sampled from.

    Without tokens, 0. (Self-certainty, a divergence of whole distributions, needs more than an engine returns.)
    """

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates."""
        means = [sum(c.logprobs) / len(c.logprobs) if c.logprobs else 0.0 for c in candidates]
        return Scores(means, [0] * len(means))


class TextScorer:
    """Scores solutions by a property of their text.

    Args:
        term: ``length``: number of characters; ``repetition``: the share of repeated groups of three words;
            ``format``: 1 where ``pattern`` is found, else 0; ``diversity``: the mean distance to the other solutions of
            the same query in the batch, in [0, 1], from 1 less the ratio of ``difflib.SequenceMatcher``.
        pattern: a regular expression, for ``format``.

    Example:
        >>> WeightedScorer([(LikelihoodScorer(), 1.0), (TextScorer("repetition"), -0.5)])  # doctest: +ELLIPSIS
        <...WeightedScorer object at ...>
    """

    def __init__(
        self, term: Literal["length", "repetition", "format", "diversity"], pattern: str | None = None
    ) -> None:
        check_choice("term", term, ("length", "repetition", "format", "diversity"))
        if (pattern is None) == (term == "format"):
            raise ValueError(f"term {term!r} {'needs a' if term == 'format' else 'takes no'} pattern")
        self.term = term
        self.pattern = None if pattern is None else re.compile(pattern, re.DOTALL)

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates."""
        values = [self._value(candidate, candidates) for candidate in candidates]
        return Scores(values, [0] * len(values))

    def _value(self, candidate: Candidate, candidates: Sequence[Candidate]) -> float:
        text = candidate.text
        if self.term == "length":
            return float(len(text))
        if self.pattern is not None:
            return float(self.pattern.search(text) is not None)
        if self.term == "repetition":
            words = text.split()
            groups = list(zip(words, words[1:], words[2:], strict=False))
            return 1 - len(set(groups)) / len(groups) if groups else 0.0
        others = [other.text for other in candidates if other.query is candidate.query and other is not candidate]
        distances = [1 - SequenceMatcher(None, text, other, autojunk=False).ratio() for other in others]
        return sum(distances) / len(distances) if distances else 0.0


class WeightedScorer:
    """Adds the scores of several scorers with weights.

    Args:
        terms: scorers with their finite weights, at least one.

    Raises:
        ValueError: there is none, or a weight is not finite.
    """

    def __init__(self, terms: Sequence[tuple[Scorer, float]]) -> None:
        self.terms = [(scorer, float(weight)) for scorer, weight in terms]
        if not self.terms or not all(math.isfinite(weight) for _, weight in self.terms):
            raise ValueError(
                f"the weights are {[weight for _, weight in self.terms]}: give at least one scorer, with finite weights"
            )

    def attach(self, engine: Any) -> None:
        """Attaches all scorers to an engine."""
        for scorer, _ in self.terms:
            tell = getattr(scorer, "attach", None)
            if callable(tell):
                tell(engine)

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates."""
        parts = [(scorer.score(candidates), weight) for scorer, weight in self.terms]
        values = [sum(part.values[n] * weight for part, weight in parts) for n in range(len(candidates))]
        return Scores(values, [sum(part.tokens[n] for part, _ in parts) for n in range(len(candidates))])


def _column_names(function: Callable[..., Any]) -> set[str] | None:
    """Returns the names of a function's parameters; ``None`` if it takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
