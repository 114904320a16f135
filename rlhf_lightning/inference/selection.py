"""Selection among whole solutions: best-of-n, votes, and votes that stop when they are decided."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..data.final_answer import answer_key
from ..utils.imports import load_attribute
from ..utils.validation import check_choice, check_count
from .budget import Account, Budget
from .completion import Completion
from .engine import Engine
from .sampling import SamplingParams, derive_seed
from .strategy import Candidate, Query, Sample, Scorer, Search, SearchResult, Strategy
from .token_counts import scoring_cost

AnswerOf = Callable[[str], Hashable | None]


class Selection(Strategy):
    """Base of the strategies that draw whole solutions and choose among them.

    Args:
        engine: samples from the policy.
        n: number of solutions, at least 1.
        scorer: scores them.
        answer: returns the answer of a solution's text, equal for equal answers, or ``None``; or its dotted path. By
            default ``data.final_answer.answer_key``: the text after the last marker, such as ``#`` or ``boxed``, else
            the last number, else the whole text.
        sampling: settings of the policy's samples.
        budget: limits per prompt; ``expansions`` counts solutions.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        n: int = 16,
        scorer: Scorer | None = None,
        answer: AnswerOf | str | None = None,
        sampling: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> None:
        check_count("n", n, "16 is usual")
        super().__init__(engine, scorer=scorer, sampling=sampling, budget=budget)
        self.n = n
        found = answer_key if answer is None else load_attribute(answer) if isinstance(answer, str) else answer
        self.answer: AnswerOf = found

    def draw(
        self, query: Query, sampling: SamplingParams, account: Account, numbers: Sequence[int]
    ) -> Generator[Any, Any, list[Candidate]]:
        """Draws numbered solutions within the budget; fewer, or a truncated first one, where it ends.

        Args:
            query: the query.
            sampling: the settings.
            account: what may be spent.
            numbers: of the solutions, from 0 in all rounds: each has a seed of its own.
        """
        drawn: list[Candidate] = []
        while len(drawn) < len(numbers) and account.left("seconds") > 0:
            # As many as are paid for at their full length; what they leave pays for the next round.
            count = int(min(len(numbers) - len(drawn), account.left("expansions")))
            count = int(min(count, account.left("tokens") // sampling.max_new_tokens))
            params = sampling
            if count < 1:
                rest = account.left("tokens")
                # Cut off, it has no answer: only a result that would have nothing else needs it.
                if drawn or numbers[0] > 0 or account.left("expansions") < 1 or rest < 1:
                    break
                count, least = 1, min(sampling.min_new_tokens, int(rest))
                params = replace(sampling, max_new_tokens=int(rest), min_new_tokens=least)
            seeds = tuple(derive_seed(query.seed, n) for n in numbers[len(drawn) : len(drawn) + count])
            completions: list[list[Completion]] = yield [Sample(query, (), seeds, params)]
            account.expansions += count
            drawn += [Candidate.of(query, completion) for completion in completions[0]]
        return drawn

    def scored(self, candidates: Sequence[Candidate], account: Account) -> Generator[Any, Any, list[Candidate]]:
        """Scores candidates in order, as many as the budget of scorer tokens pays for; the others have no score."""
        left, count = account.left("scorer_tokens"), 0
        for candidate in candidates:
            left -= 0 if left == math.inf else scoring_cost(self.scorer, candidate)
            if left < 0:
                break
            count += 1
        values: list[float] = (yield list(candidates[:count])) if count else []
        return [c.scored(v) for c, v in zip(candidates, values, strict=False)] + list(candidates[count:])

    def voted(self, candidates: Sequence[Candidate], account: Account) -> SearchResult:
        """Chooses the first candidate with the most frequent answer; scores are shares of the votes."""
        keys = [self.answer(candidate.text) for candidate in candidates]
        votes = Counter(key for key in keys if key is not None)
        shares = [0.0 if key is None else votes[key] / len(keys) for key in keys]
        scored = [candidate.scored(share) for candidate, share in zip(candidates, shares, strict=True)]
        chosen = keys.index(votes.most_common(1)[0][0]) if votes else 0
        return result_of(scored, chosen, account)


class BestOfN(Selection):
    """Draws n solutions and returns the one with the highest score.

    With ``weighted``, the scores of solutions with equal answers are added, and the best solution of the answer with
    the highest sum is returned (weighted best-of-n; scores should not be negative, such as probabilities). Of equal
    scores the first wins.

    Args:
        engine: samples from the policy.
        scorer: scores whole solutions.
        n: number of solutions, at least 1.
        weighted: add the scores of equal answers.
        answer: how answers are read; see ``Selection``.
        sampling: settings of the policy's samples.
        budget: limits per prompt.

    Example::

        results = BestOfN(engine, scorer=RewardScorer("runs/reward/model"), n=16).search(["3+14+9=?"], seeds=[0])
        print(results[0].text, results[0].score)
    """

    def __init__(self, engine: Engine, *, scorer: Scorer, n: int = 16, weighted: bool = False, **options: Any) -> None:
        super().__init__(engine, n=n, scorer=scorer, **options)
        self.weighted = weighted

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        drawn = yield from self.draw(query, sampling, account, range(self.n))
        candidates = yield from self.scored(drawn, account)
        return result_of(candidates, self._best(candidates), account)

    def _best(self, candidates: Sequence[Candidate]) -> int:
        places = [place for place, candidate in enumerate(candidates) if candidate.score is not None]
        if not places:
            return 0  # nothing could be scored within the budget
        if self.weighted:
            totals: dict[Hashable, float] = {}
            keys = {place: self._key(candidates[place], place) for place in places}
            for place in places:
                totals[keys[place]] = totals.get(keys[place], 0.0) + (candidates[place].score or 0.0)
            best = max(totals, key=lambda key: totals[key])
            places = [place for place in places if keys[place] == best]
        return max(places, key=lambda place: candidates[place].score or 0.0)

    def _key(self, candidate: Candidate, place: int) -> Hashable:
        key = self.answer(candidate.text)
        return ("no answer", place) if key is None else key


class MajorityVote(Selection):
    """Draws n solutions and returns the first of those with the most frequent answer.

    Self-consistency (Wang et al., 2022, arXiv:2203.11171). The score of a solution is the share of the solutions that
    have its answer; those without an answer do not vote. Of answers with equally many votes, the one that was drawn
    first wins.

    Args:
        engine: samples from the policy.
        n: number of solutions, at least 1.
        answer: how answers are read; see ``Selection``.
        sampling: settings of the policy's samples.
        budget: limits per prompt.

    Example::

        MajorityVote(engine, n=9).search(["3+14+9=?"], seeds=[0])[0].text
    """

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        candidates = yield from self.draw(query, sampling, account, range(self.n))
        return self.voted(candidates, account)


class SelfConsistency(Selection):
    r"""Votes in rounds, and stops as soon as the vote is decided.

    Adaptive-Consistency (Aggarwal et al., 2023, arXiv:2305.11860): with :math:`v_1` and :math:`v_2` votes for the two
    leading answers and a uniform prior, the probability that the first is the more frequent one is
    :math:`P(p > 1/2) = \sum_{j \le v_1} \binom{v_1 + v_2 + 1}{j} / 2^{v_1 + v_2 + 1}`, and drawing stops when it
    exceeds ``confidence``. With ``rule="share"``, it stops when the leading answer has that share of at least
    ``2 * round_size`` votes.

    Args:
        engine: samples from the policy.
        n: maximum number of solutions, at least 1.
        round_size: solutions drawn at once, at least 1.
        confidence: in (0.5, 1).
        rule: ``beta`` or ``share``.
        answer: how answers are read; see ``Selection``.
        sampling: settings of the policy's samples.
        budget: limits per prompt.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        n: int = 40,
        round_size: int = 4,
        confidence: float = 0.95,
        rule: Literal["beta", "share"] = "beta",
        **options: Any,
    ) -> None:
        super().__init__(engine, n=n, **options)
        check_count("round_size", round_size, "4 is usual")
        check_choice("rule", rule, ("beta", "share"))
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; it must be in (0.5, 1) (0.95 is usual)")
        self.round_size, self.confidence, self.rule = round_size, confidence, rule

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        """Begins the search for one prompt."""
        candidates: list[Candidate] = []
        while len(candidates) < self.n:
            numbers = range(len(candidates), min(self.n, len(candidates) + self.round_size))
            drawn = yield from self.draw(query, sampling, account, numbers)
            candidates += drawn
            if len(drawn) < len(numbers) or self._decided(candidates):
                break
        return self.voted(candidates, account)

    def _decided(self, candidates: Sequence[Candidate]) -> bool:
        keys = [self.answer(candidate.text) for candidate in candidates]
        leading = [count for _, count in Counter(key for key in keys if key is not None).most_common(2)] + [0, 0]
        if self.rule == "share":
            return len(keys) >= 2 * self.round_size and leading[0] / len(keys) >= self.confidence
        return probability_of_lead(leading[0], leading[1]) > self.confidence


def result_of(candidates: Sequence[Candidate], chosen: int, account: Account) -> SearchResult:
    """Makes the result of a selection.

    Raises:
        ValueError: the budget does not pay for a single token.
    """
    if not candidates:
        raise ValueError(
            f"the budget {account.budget} was used up before a solution was drawn: raise its {account.exhausted()}"
        )
    return SearchResult(
        list(candidates),
        chosen,
        tokens=account.tokens,
        scorer_tokens=account.scorer_tokens,
        expansions=account.expansions,
        stopped_by=account.exhausted(),
    )


def probability_of_lead(first: int, second: int) -> float:
    """Returns the probability that an answer with ``first`` votes is more frequent than one with ``second``.

    Example:
        >>> probability_of_lead(0, 0), round(probability_of_lead(3, 0), 4)
        (0.5, 0.9375)
    """
    trials = first + second + 1
    return float(sum(math.comb(trials, j) for j in range(first + 1)) / 2**trials)


def best_of_n_kl(n: int, probabilities: Sequence[float] | None = None) -> float:
    r"""Returns the KL divergence of best-of-n from the policy, in nats.

    Without ``probabilities`` that for scores without ties, :math:`\log n - (n - 1) / n`, which bounds all others
    (Beirami et al., 2024, arXiv:2401.01879). With the probabilities of the policy's outcomes in ascending order of
    their scores, it is exact: :math:`q_i = c_i^n - (c_i - p_i)^n` with the cumulative sums c.

    Example:
        >>> round(best_of_n_kl(4), 4), round(best_of_n_kl(4, [0.5, 0.5]), 4)
        (0.6363, 0.4594)
    """
    check_count("n", n, "1 is the policy itself")
    if probabilities is None:
        return math.log(n) - (n - 1) / n
    total, kl = 0.0, 0.0
    for p in probabilities:
        q = (total + p) ** n - total**n
        total += p
        if q > 0:
            kl += q * math.log(q / p)
    return kl
