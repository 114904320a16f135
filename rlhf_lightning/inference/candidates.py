"""Queries, their candidates, and the interface of scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .completion import Completion, FinishReason, Thought


@dataclass(frozen=True)
class Query:
    """One prompt to search for.

    Args:
        prompt: as given: text, token ids or chat messages.
        token_ids: the prompt's tokens; empty if the engine takes texts only.
        seed: of everything random in the search.
        columns: the prompt's other columns, such as ``answer``, for scorers that read them.
        thought: between the prompt and its solutions: the policy reads it, judges of solutions do not.
    """

    prompt: Any
    token_ids: tuple[int, ...]
    seed: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    thought: Thought | None = None

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The tokens before a solution: the prompt's, and those of a thought."""
        return self.token_ids if self.thought is None else (*self.token_ids, *self.thought.token_ids)

    @property
    def lead(self) -> str:
        """The beginning of a solution that the last token of the thought holds already."""
        return "" if self.thought is None else self.thought.lead

    def continued(self, token_ids: Sequence[int] = ()) -> Any:
        """Returns what an engine is asked to continue: tokens, or the text where it does not take any.

        Args:
            token_ids: of a solution so far.
        """
        if self.token_ids:
            return [*self.context_ids, *token_ids]
        return self.prompt if self.thought is None else self.prompt + self.thought.passage + self.thought.lead


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Lists the values of each column of rows, except the prompt; ``None`` where a row lacks it.

    Example:
        >>> columns_of([{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+2=", "level": 1}])
        {'answer': ['4', None], 'level': [None, 1]}
    """
    names = sorted({name for row in rows for name in row} - {"prompt"})
    return {name: [row.get(name) for row in rows] for name in names}


def begun_prompt(prompt: Any, text: str, token_ids: Sequence[int] = ()) -> Any:
    """Returns a prompt after which a text was written already: as its end, or as the words of the assistant.

    Args:
        prompt: text, chat messages or token ids.
        text: what was written.
        token_ids: its tokens, with which a prompt of token ids is continued.

    Example:
        >>> begun_prompt("2+2=", "4"), begun_prompt([{"role": "user", "content": "2+2?"}], "4")[-1]
        ('2+2=4', {'role': 'assistant', 'content': '4'})
    """
    if isinstance(prompt, str):
        return prompt + text
    if not any(isinstance(turn, Mapping) for turn in prompt):
        return [*prompt, *token_ids]
    if not text:
        return prompt
    return [*prompt, {"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Candidate:
    """A whole or partial solution of a query.

    Args:
        query: its query.
        token_ids: the tokens after the prompt; those of a remote engine may be unknown (empty).
        text: these tokens as text, without a thought.
        logprobs: of each token under the sampling distribution.
        finish_reason: ``stop`` if it has ended; ``length`` if it was cut off; ``None`` while it can be continued.
        score: the scorer's; ``None`` before it was scored.
        thought: whose tokens the solution's begin with; those of the query's thought come before them.

    Example:
        >>> Candidate(Query("2+2=", (), 0), (4, 1), "4").text
        '4'
    """

    query: Query
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    score: float | None = None
    thought: Thought | None = None

    @classmethod
    def of(cls, query: Query, completion: Completion) -> Candidate:
        """Makes a candidate of a whole completion."""
        return cls(
            query,
            tuple(completion.token_ids),
            query.lead + completion.text,
            tuple(completion.logprobs),
            completion.finish_reason,
            thought=completion.thought,
        )

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The tokens of the text: those after a thought."""
        return self.token_ids if self.thought is None else self.token_ids[len(self.thought.token_ids) :]

    def scored(self, score: float) -> Candidate:
        """Returns the candidate with a score."""
        return replace(self, score=score)

    def completion(self) -> Completion:
        """Returns it as an engine's result."""
        finish_reason = self.finish_reason or "length"
        return Completion(list(self.token_ids), self.text, list(self.logprobs), finish_reason, thought=self.thought)


@dataclass(frozen=True)
class Scores:
    """Scores of candidates.

    Args:
        values: one per candidate, higher is better.
        tokens: tokens that the scorer read for each; shared tokens are counted once, for the first candidate.

    Example:
        >>> Scores([0.5, 0.25], [12, 3]).values
        [0.5, 0.25]
    """

    values: list[float]
    tokens: list[int]


class Scorer(Protocol):
    """Interface of scorers: reward models, process reward models, verifiers, and combinations of them."""

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores whole and partial solutions of any queries, in one batch."""
        ...
