"""The base class of searches over steps, and a scorer for whole and partial solutions."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence
from typing import Any

from ..utils.validation import check_count
from .budget import Account, Budget
from .engine import Engine
from .sampling import SamplingParams
from .step_environment import StepEnvironment
from .strategy import Ask, Candidate, Query, Scorer, Scores, Search, Strategy
from .token_counts import scoring_cost


class StepSearch(Strategy):
    r"""Base class of searches over steps. A subclass defines ``explore``.

    A step ends after ``step_separator``, with the tokens that hold it, or after ``max_step_tokens``. If no separator is
    ever sampled, a step is that long, or the whole solution. A solution has ended when a step does with a token that
    ends answers or a stop string of ``sampling``, or when its text matches ``answer_pattern`` at the end of a step; it
    is cut off after ``sampling.max_new_tokens`` tokens in all, or at the end of the model's positions.

    Steps of equal tokens that follow the same state are one node. Its prior is the policy's probability of the step,
    that is of its tokens under the sampling distribution, once for each time that it was drawn, divided by the sum over
    its siblings; of engines that report no probabilities, the share of draws. A greedy step is drawn once.

    Samples that may not fit into ``budget.tokens`` are drawn a few at a time, each with all tokens that it may need in
    reserve, so that none is cut off early and no token too many is drawn; ``max_step_tokens`` lets more of them share a
    round. If the budget ends before a solution does, the result is the best partial one, with the finish reason
    ``length``, and the last step may be cut off within; ``stopped_by`` names the limit.

    Solutions that have ended come before truncated ones, whatever their scores; among them, the highest score
    is chosen unless a search says otherwise.

    Args:
        engine: samples from the policy; it must take and return token ids.
        scorer: scores solutions, higher is better.
        value: scores partial solutions, instead of ``scorer``: a critic next to a verifier, for example.
        step_separator: the string after which a step ends; ``None`` for steps of ``max_step_tokens``.
        max_step_tokens: maximum number of tokens of a step; ``None`` for what is left of the solution.
        answer_pattern: regular expression; a solution whose text it matches anywhere has ended.
        sampling: settings of the policy's samples; ``max_new_tokens`` limits the whole solution.
        budget: limits per prompt. An expansion is one request for steps from one node.

    Raises:
        ValueError: an option out of range.
    """

    needs_token_ids = True
    # Searches that simulate count visits and values themselves.
    simulates = False

    def __init__(
        self,
        engine: Engine,
        *,
        scorer: Scorer | None = None,
        value: Scorer | None = None,
        step_separator: str | None = "\n",
        max_step_tokens: int | None = None,
        answer_pattern: str | None = None,
        sampling: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> None:
        # A step of an engine that thinks would begin with thoughts each time; the other order thinks once.
        if getattr(engine, "thinks", False):
            name, inner = type(self).__name__, type(engine).__name__
            raise ValueError(f"{name} continues steps, and {inner} thinks before each: write {inner}({name}(engine))")
        both = SplitScorer(whole=scorer, partial=value) if scorer is not None and value is not None else scorer or value
        super().__init__(engine, scorer=both, sampling=sampling, budget=budget)

        # Every step must end: at the separator, after some tokens, or at whichever comes first.
        if step_separator == "":
            raise ValueError(
                "step_separator is ''; it must have at least one character, such as a line's end, or be null"
            )
        if step_separator is None and max_step_tokens is None:
            raise ValueError("without step_separator nothing ends a step: give max_step_tokens, such as 16")
        if max_step_tokens is not None:
            check_count("max_step_tokens", max_step_tokens, "leave it out for steps up to the separator")
        self.step_separator = step_separator
        self.max_step_tokens = max_step_tokens

        try:
            self.answer_pattern = None if answer_pattern is None else re.compile(answer_pattern)
        except re.error as error:
            raise ValueError(
                f"answer_pattern is {answer_pattern!r}, which is no regular expression: {error}"
            ) from error

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        steps = StepEnvironment(self, query, sampling, account)
        yield from self.explore(steps)
        return steps.result()

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Grows the tree of one prompt until the search is done or ``steps.stopped_by`` is set."""
        raise TypeError(f"{type(self).__name__} must define explore(steps)")


class SplitScorer:
    """Scores whole solutions with one scorer and partial ones with another.

    Args:
        whole: scores solutions that have ended or were cut off.
        partial: scores the unfinished ones.
    """

    def __init__(self, *, whole: Scorer, partial: Scorer) -> None:
        self.whole, self.partial = whole, partial

    def attach(self, engine: Any) -> None:
        """Attaches both to an engine."""
        for scorer in (self.whole, self.partial):
            tell = getattr(scorer, "attach", None)
            if callable(tell):
                tell(engine)

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores each candidate with its scorer."""
        found = Scores([math.nan] * len(candidates), [0] * len(candidates))
        for unfinished, scorer in ((False, self.whole), (True, self.partial)):
            places = [n for n, candidate in enumerate(candidates) if (candidate.finish_reason is None) == unfinished]
            if places:
                scores = scorer.score([candidates[n] for n in places])
                for n, value, tokens in zip(places, scores.values, scores.tokens, strict=True):
                    found.values[n], found.tokens[n] = value, tokens
        return found

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        return scoring_cost(self.partial if candidate.finish_reason is None else self.whole, candidate)
