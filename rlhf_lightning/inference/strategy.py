"""Strategies: engines that search. A strategy wraps an engine and a scorer, and is used wherever an engine is.

A search for one prompt is a coroutine (a generator): it yields what it needs next, samples of some states or scores of
some candidates, and receives them. ``Strategy.search`` advances the searches of all prompts together, with one call of
the engine and one of the scorer per round. As every sample has a seed of its own and a search sees its own answers
alone, its result does not depend on the prompts that share the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from ..utils.validation import check_same_length
from .budget import Account, Budget, SearchCounts
from .candidates import Candidate, Query, Scorer, Scores, begun_prompt, columns_of
from .completion import Completion, Thought, decode
from .engine import Engine
from .sample_numbers import new_token_limits, sample_seeds
from .sampling import SamplingParams

__all__ = [
    "Ask",
    "Candidate",
    "NextTokens",
    "Query",
    "Sample",
    "Scorer",
    "Scores",
    "Search",
    "SearchResult",
    "Strategy",
]


@dataclass(frozen=True)
class Sample:
    """A request of a search: continue a state.

    Args:
        query: the query.
        token_ids: the state: tokens after the prompt; empty continues the prompt.
        seeds: one per sample.
        sampling: the settings.
        limit: maximum number of tokens of each sample, where it is below that of the settings.
    """

    query: Query
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingParams
    limit: int | None = None


@dataclass(frozen=True)
class NextTokens:
    """A request of a search: the log-probabilities of all tokens that may follow a state; counts as one token.

    Args:
        query: the query.
        token_ids: the state: tokens after the prompt.
    """

    query: Query
    token_ids: tuple[int, ...]


@dataclass
class SearchResult:
    """The result of a search for one prompt.

    Args:
        candidates: the solutions that it found, at least one.
        chosen: index of the best among them.
        tokens: tokens sampled from the policy.
        scorer_tokens: tokens read by the scorer.
        expansions: nodes expanded, or samples drawn where there is no tree.
        seconds: from the search's begin to its end, shared with the other prompts of its batch.
        stopped_by: the limit that ended it, or ``None``.
        tree: of searches over steps.
    """

    candidates: list[Candidate]
    chosen: int
    tokens: int = 0
    scorer_tokens: int = 0
    expansions: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None
    tree: Any = None

    @property
    def best(self) -> Candidate:
        """The chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def text(self) -> str:
        """Text of the chosen candidate."""
        return self.best.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the chosen candidate."""
        return self.best.token_ids

    @property
    def thought(self) -> Thought | None:
        """The thought before the chosen candidate, of a strategy that thinks."""
        return self.best.thought

    @property
    def score(self) -> float | None:
        """Score of the chosen candidate."""
        return self.best.score


Ask: TypeAlias = Sequence[Sample] | Sequence[NextTokens] | Sequence[Candidate]
# A search yields requests and receives, in their order, completions of each sample, log-probabilities after each state,
# or scores of each candidate.
Search: TypeAlias = Generator[Ask, Any, SearchResult]


class Strategy:
    """Base class of strategies: answers ``search`` with everything that was found, and ``generate`` like an engine.

    A subclass defines ``start``.

    Args:
        engine: samples from the policy; may be a strategy itself.
        scorer: scores candidates; ``None`` for strategies that need none.
        sampling: settings of the policy's samples; by default ``SamplingParams()``.
        budget: limits per prompt.
    """

    needs_token_ids = False
    samples = True  # whether all tokens that it reports are drawn from the policy

    def __init__(
        self,
        engine: Engine,
        *,
        scorer: Scorer | None = None,
        sampling: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.engine = engine
        self.scorer = scorer
        # Scorers that read the policy's tokens compare its tokenizer with their own.
        attach = getattr(scorer, "attach", None)
        if callable(attach):
            attach(engine)
        self.sampling = sampling or SamplingParams()
        self.budget = budget or Budget()
        self._counts = SearchCounts()

    @property
    def tokenizer(self) -> Any:
        """The engine's tokenizer, if it has one."""
        return getattr(self.engine, "tokenizer", None)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The engine's tokens that end an answer."""
        found: frozenset[int] = getattr(self.engine, "end_token_ids", frozenset())
        return found

    def statistics(self) -> dict[str, Any]:
        """Tells what was done since the strategy was made: the engine's statistics, and ``search``: ``SearchCounts``.

        The searches of an engine that is a strategy itself are added to the strategy's own.
        """
        tell = getattr(self.engine, "statistics", None)
        found: dict[str, Any] = dict(tell()) if callable(tell) else {}
        inner = found.get("search", {})
        return found | {"search": {name: value + inner.get(name, 0) for name, value in asdict(self._counts).items()}}

    def longest_prompt(self, sampling: SamplingParams) -> int | None:
        """Number of tokens that a prompt may have so that one more fits; ``None`` if the engine does not say."""
        ask = getattr(self.engine, "longest_prompt", None)
        return None if ask is None else ask(sampling)

    def num_positions(self) -> int | None:
        """Maximum number of tokens of a prompt with its completion; ``None`` if the engine does not say."""
        ask = getattr(self.engine, "num_positions", None)
        return None if ask is None else ask()

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt: a coroutine that keeps to the account's budget."""
        raise TypeError(f"{type(self).__name__} must define start(query, sampling, account)")

    def search(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        *,
        sampling: SamplingParams | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
        watch: Callable[[int, SearchResult], object] | None = None,
    ) -> list[SearchResult]:
        """Searches for the best completion of every prompt.

        Args:
            prompts: texts or token ids, as the engine takes them; with ``encoded`` also chat messages.
            seeds: one per prompt; by default those of ``generate`` for one sample.
            sampling: settings instead of the strategy's own.
            columns: further columns of the prompts, such as ``answer``, for scorers that read them.
            encoded: the prompts' tokens, instead of the engine's own encoding; scorers still get the prompts.
            watch: called with a prompt's number and its result as soon as its search has ended; what it raises ends the
                call.

        Raises:
            ValueError: lists of different length, or a prompt that the engine cannot take.
        """
        params = sampling or self.sampling
        if seeds is None:
            seeds = [seed for [seed] in sample_seeds(None, len(prompts), 1, params)]
        queries = self._queries(prompts, [[seed] for seed in seeds], columns, encoded)
        return self.run([query for [query] in queries], [params] * len(queries), watch)

    def generate(
        self,
        prompts: Sequence[Any],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        """Answers like an engine: each completion is the chosen one of a search of its own.

        Args:
            prompts: texts or token ids, as the engine takes them; with ``encoded`` also chat messages.
            num_samples: searches per prompt.
            sampling: settings instead of the strategy's own.
            seeds: one per prompt and sample; by default as an engine's, from the settings' seed or a drawn one.
            limits: maximum number of new tokens of each prompt, where it is below ``sampling.max_new_tokens``.
            columns: further columns of the prompts, as in ``search``.
            encoded: the prompts' tokens, as in ``search``.
        """
        params = sampling or self.sampling
        seeds = sample_seeds(seeds, len(prompts), num_samples, params)
        queries = self._queries(prompts, seeds, columns, encoded)
        settings = []
        for row, limit in zip(seeds, new_token_limits(limits, len(prompts), params), strict=True):
            least = min(params.min_new_tokens, limit)
            settings += [replace(params, max_new_tokens=limit, min_new_tokens=least)] * len(row)
        results = iter(self.run([query for group in queries for query in group], settings))
        return [[next(results).best.completion() for _ in row] for row in seeds]

    def _queries(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None,
        encoded: Sequence[Sequence[int]] | None,
    ) -> list[list[Query]]:
        """Makes the queries of each prompt, one for each of its seeds."""
        columns = columns or {}
        tokens = [self._encoded(prompt) for prompt in prompts] if encoded is None else [tuple(ids) for ids in encoded]
        # A column may have any name, also one of these.
        lists = {"prompts": prompts, "seeds": seeds, "encoded": tokens} | dict(columns)
        check_same_length(**lists | {"prompts": prompts})
        rows = [{name: values[n] for name, values in columns.items()} for n in range(len(prompts))]
        return [
            [Query(prompt, ids, seed, row) for seed in own]
            for prompt, ids, own, row in zip(prompts, tokens, seeds, rows, strict=True)
        ]

    def _encoded(self, prompt: Any) -> tuple[int, ...]:
        encode = getattr(self.engine, "encode", None)
        if encode is not None:
            return tuple(encode(prompt))
        if self.needs_token_ids:
            raise ValueError(
                f"{type(self).__name__} continues token ids, which {type(self.engine).__name__} cannot make of texts: "
                "use a LocalEngine, or give the engine a tokenizer"
            )
        return ()

    def encode(self, prompt: Any) -> tuple[int, ...]:
        """Returns a prompt's tokens, as the engine reads them."""
        return self._encoded(prompt)

    # Rounds.

    def run(
        self,
        queries: Sequence[Query],
        settings: Sequence[SamplingParams],
        watch: Callable[[int, SearchResult], object] | None = None,
    ) -> list[SearchResult]:
        """Advances the searches of queries, each with its settings, together until every one has its result."""
        accounts = [Account(self.budget) for _ in queries]
        searches = [self.start(*search) for search in zip(queries, settings, accounts, strict=True)]
        results: dict[int, SearchResult] = {}
        answers: dict[int, Any] = dict.fromkeys(range(len(searches)))
        waiting: dict[int, Ask] = {}
        while answers:
            for number, answer in answers.items():
                try:
                    waiting[number] = searches[number].send(answer)
                except StopIteration as end:
                    results[number] = end.value
                    results[number].seconds = accounts[number].seconds
                    self._counts.searches += 1
                    self._counts.expansions += results[number].expansions
                    if watch is not None:
                        watch(number, results[number])
            answers = self._answer(waiting, accounts)
            waiting = {number: ask for number, ask in waiting.items() if number not in answers}
        return [results[number] for number in range(len(queries))]

    def _answer(self, asks: Mapping[int, Ask], accounts: Sequence[Account]) -> dict[int, Any]:
        """Answers requests for scores, if there are any, and else for samples: a call for each setting.

        Samples take many steps: they wait until no search needs anything else, so that most share them.
        """
        kinds: dict[type, dict[int, list[Any]]] = {Candidate: {}, NextTokens: {}, Sample: {}}
        for number, ask in asks.items():
            kinds[type(ask[0]) if ask else Candidate][number] = list(ask)
        first = next((kind for kind in kinds if kinds[kind]), Candidate)
        answer = {Candidate: self._scored, NextTokens: self._followed, Sample: self._sampled}[first]
        return answer(kinds[first], accounts)

    def _sampled(self, asks: Mapping[int, list[Any]], accounts: Sequence[Account]) -> dict[int, Any]:
        """Draws all samples; those of equal settings in one call."""
        answers: dict[int, list[list[Completion]]] = {n: [[] for _ in ask] for n, ask in asks.items()}
        groups: dict[SamplingParams, list[tuple[int, int, Sample]]] = {}
        for number, ask in asks.items():
            for place, sample in enumerate(ask):
                groups.setdefault(sample.sampling, []).append((number, place, sample))
        for params, group in groups.items():
            rows = [(sample, seed) for _, _, sample in group for seed in sample.seeds]
            prompts, further = self._asked([sample for sample, _ in rows])
            if any(sample.limit is not None for sample, _ in rows):
                further["limits"] = [sample.limit or params.max_new_tokens for sample, _ in rows]
            completions = iter(self.engine.generate(prompts, 1, params, seeds=[[seed] for _, seed in rows], **further))
            for number, place, sample in group:
                answers[number][place] = [next(completions)[0] for _ in sample.seeds]
                accounts[number].tokens += sum(c.num_sampled for c in answers[number][place])
        return answers

    def _asked(self, samples: Sequence[Sample]) -> tuple[list[Any], dict[str, Any]]:
        """Returns what the engine continues; of a strategy within, what its scorer reads, and the tokens apart."""
        states = [sample.query.continued(sample.token_ids) for sample in samples]
        if not isinstance(self.engine, Strategy):
            return states, {}
        columns = columns_of([sample.query.columns for sample in samples])
        if not all(sample.query.token_ids for sample in samples):
            return states, {"columns": columns}
        prompts = [begun_prompt(s.query.prompt, decode(self.tokenizer, s.token_ids), s.token_ids) for s in samples]
        return prompts, {"columns": columns, "encoded": states}

    def _followed(self, asks: Mapping[int, list[Any]], accounts: Sequence[Account]) -> dict[int, Any]:
        """Computes the log-probabilities of next tokens, in one call."""
        if not asks:
            return {}
        compute = getattr(self.engine, "next_token_logprobs", None)
        if compute is None:
            raise ValueError(
                f"{type(self).__name__} needs the probabilities of all tokens, which {type(self.engine).__name__} does "
                "not report: use a LocalEngine"
            )
        rows = iter(compute([s.query.continued(s.token_ids) for states in asks.values() for s in states]))
        for number, states in asks.items():
            accounts[number].tokens += len(states)
        return {number: [next(rows) for _ in states] for number, states in asks.items()}

    def _scored(self, asks: Mapping[int, list[Any]], accounts: Sequence[Account]) -> dict[int, Any]:
        """Scores all candidates in one call, in the order of their prompts."""
        if not asks:
            return {}
        if self.scorer is None:
            raise ValueError(f"{type(self).__name__} needs a scorer: give scorer=, such as RewardScorer(folder)")
        order = [(number, candidate) for number, ask in asks.items() for candidate in ask]
        start = time.perf_counter()
        scores = self.scorer.score([candidate for _, candidate in order])
        self._counts.score_seconds += time.perf_counter() - start
        self._counts.scorer_calls += 1
        self._counts.scorer_tokens += sum(scores.tokens)
        answers: dict[int, list[float]] = {number: [] for number in asks}
        for (number, _), value, tokens in zip(order, scores.values, scores.tokens, strict=True):
            if math.isnan(value):
                raise ValueError(
                    f"{type(self.scorer).__name__} scored a solution of prompt {number} with nan: a score must be a "
                    "number; return -inf for solutions that must not be chosen"
                )
            answers[number].append(value)
            accounts[number].scorer_tokens += tokens
        return answers
