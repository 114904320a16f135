"""Scorers of solutions by functions, judges, likelihood and text, and sums of scorers."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from ..data.messages import as_lines
from ..utils.imports import load_attribute
from ..utils.validation import check_choice
from .strategy import Candidate, Scorer, Scores
from .token_counts import scoring_cost

QUESTION = (
    "Someone was asked:\n{prompt}\n\nThey answered:\n{completion}\n\nIs the answer right so far?\n"
    "Reply with yes or no.\n"
)


class VerifierScorer:
    """Scores solutions by a reward function, such as a check of the answer.

    Args:
        function: a reward function, ``(prompts, completions, **columns) -> numbers``, or its dotted path. It gets the
            columns of ``search(columns=...)`` that its signature names, or all of them if it takes ``**columns``.
        no_verdict: the score where it returns ``None``, or an exception (the first one is shown as a warning).

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
        # Rows may have columns of these names, such as solutions of their own; the candidates are scored.
        given = {name for candidate in candidates for name in candidate.query.columns}
        names = sorted(given - {"prompts", "completions"})
        if self._columns is not None:
            names = [name for name in names if name in self._columns]
        columns = {name: [candidate.query.columns.get(name) for candidate in candidates] for name in names}
        prompts = [candidate.query.prompt for candidate in candidates]
        found = list(self.function(prompts, [candidate.text for candidate in candidates], **columns))
        return _verdicts("verifier", found, candidates, self.no_verdict)

    def cost(self, candidate: Candidate) -> int:
        """Returns 0: no tokens are read."""
        return 0


class JudgeScorer:
    """Scores solutions by a judge, which answers a question about each with a number from 0 (no) to 1 (yes).

    Args:
        judge: a function from questions to as many numbers, such as ``rewards.EngineJudge(RemoteEngine(url))``, which
            asks a server, or ``rewards.ModelJudge(folder)``. An exception in place of a number is no verdict.
        question: the question, with the fields ``prompt`` and ``completion``.
        no_verdict: the score of a solution without a verdict; the first failure is shown as a warning.

    Raises:
        ValueError: the judge cannot be called, or the question has another field.

    Example:
        >>> from rlhf_lightning.inference.strategy import Candidate, Query
        >>> judge = JudgeScorer(lambda questions: [float("4" in text.splitlines()) for text in questions])
        >>> judge.score([Candidate(Query("2+2=", (), 0), (), "4")]).values
        [1.0]
    """

    def __init__(
        self, judge: Callable[[Sequence[str]], Sequence[Any]], *, question: str = QUESTION, no_verdict: float = 0.0
    ) -> None:
        if not callable(judge):
            raise ValueError(
                f"judge is a {type(judge).__name__}: give a function of questions, such as "
                "rlhf_lightning.rewards.EngineJudge(engine)"
            )
        try:
            question.format(prompt="", completion="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"question has the wrong field {error}: its fields are {{prompt}} and {{completion}}"
            ) from error
        self.judge, self.question, self.no_verdict = judge, question, no_verdict

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates.

        Raises:
            ValueError: the judge returned another number of verdicts.
        """
        questions = [
            self.question.format(prompt=_written(candidate.query.prompt), completion=candidate.text)
            for candidate in candidates
        ]
        found = list(self.judge(questions)) if questions else []
        return _verdicts("judge", found, candidates, self.no_verdict)

    def cost(self, candidate: Candidate) -> int:
        """Returns 0: the tokens that a judge reads are not counted."""
        return 0


class LikelihoodScorer:
    """Scores solutions by the mean log-probability of their tokens under the distribution they were sampled from.

    Without tokens, 0. ``SelfCertaintyScorer`` takes the whole distributions into account.

    Example:
        >>> from rlhf_lightning.inference.strategy import Candidate, Query
        >>> sampled = Candidate(Query("2+2=", (), 0), (4, 1), "4", (-0.5, -0.1))
        >>> LikelihoodScorer().score([sampled]).values
        [-0.3]
    """

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates."""
        means = [sum(c.logprobs) / len(c.logprobs) if c.logprobs else 0.0 for c in candidates]
        return Scores(means, [0] * len(means))

    def cost(self, candidate: Candidate) -> int:
        """Returns 0: no tokens are read."""
        return 0


class TextScorer:
    """Scores solutions by a property of their text.

    Args:
        term: ``length``: number of characters; ``repetition``: the share of repeated groups of three words;
            ``format``: 1 where ``pattern`` is found, else 0; ``diversity``: the mean distance to the other solutions of
            the same query in the batch, in [0, 1], from 1 less the ratio of ``difflib.SequenceMatcher``.
        pattern: a regular expression, for ``format``.

    Example:
        >>> from rlhf_lightning.inference.strategy import Candidate, Query
        >>> TextScorer("repetition").score([Candidate(Query("", (), 0), (), "a b c a b c")]).values
        [0.25]
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

    def cost(self, candidate: Candidate) -> int:
        """Returns 0: no tokens are read."""
        return 0

    def _value(self, candidate: Candidate, candidates: Sequence[Candidate]) -> float:
        # A pattern is there for "format" alone.
        text = candidate.text
        if self.term == "length":
            return float(len(text))
        if self.pattern is not None:
            return float(self.pattern.search(text) is not None)
        if self.term == "repetition":
            words = text.split()
            groups = list(zip(words, words[1:], words[2:], strict=False))
            return 1 - len(set(groups)) / len(groups) if groups else 0.0

        # By identity: solutions with equal text are duplicates, and must lower each other's diversity.
        others = [other.text for other in candidates if other.query is candidate.query and other is not candidate]
        distances = [1 - SequenceMatcher(None, text, other, autojunk=False).ratio() for other in others]
        return sum(distances) / len(distances) if distances else 0.0


class WeightedScorer:
    """Adds the scores of several scorers with weights.

    Args:
        terms: scorers with their finite weights, at least one.

    Raises:
        ValueError: no term is given, or a weight is not finite.

    Example:
        >>> from rlhf_lightning.inference.strategy import Candidate, Query
        >>> scorer = WeightedScorer([(TextScorer("length"), 1.0), (TextScorer("format", "[0-9]"), -0.5)])
        >>> scorer.score([Candidate(Query("2+2=", (), 0), (), "4!")]).values
        [1.5]
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
        values, tokens = [], []
        for n in range(len(candidates)):
            values.append(sum(part.values[n] * weight for part, weight in parts))
            tokens.append(sum(part.tokens[n] for part, _ in parts))
        return Scores(values, tokens)

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        return sum(scoring_cost(scorer, candidate) for scorer, _ in self.terms)


def _verdicts(what: str, found: Sequence[Any], candidates: Sequence[Candidate], no_verdict: float) -> Scores:
    """Turns what a function returned into scores; an exception is no verdict, and the first one is shown."""
    if len(found) != len(candidates):
        raise ValueError(f"the {what} gave {len(found)} values for {len(candidates)} solutions: one each is needed")
    # One warning for a batch: a broken function fails on all of it.
    failed = next((value for value in found if isinstance(value, Exception)), None)
    if failed is not None:
        warnings.warn(f"the {what} has failed on a solution, which gets {no_verdict}: {failed}", stacklevel=4)

    values = [no_verdict if value is None or isinstance(value, Exception) else float(value) for value in found]
    return Scores(values, [0] * len(values))


def _written(prompt: Any) -> str:
    """Returns a prompt as text; chat messages one to a line."""
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(item, Mapping) for item in prompt):
        return as_lines(prompt)
    raise ValueError("a judge reads texts, and the prompt was given as token ids: give its text")


def _column_names(function: Callable[..., Any]) -> set[str] | None:
    """Returns the names of a function's parameters; ``None`` if it takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
