"""Solutions step by step: the ground of all searches over steps.

A state is the tokens after the prompt, and an action is a step: what the policy samples up to a separator, wherever its
tokens cut it. Tokens are never encoded again, so a path is exactly what the policy would have sampled at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..utils.messages import one_line
from .budget import Account, Limit
from .completion import Completion, FinishReason, decode, readable
from .sampling import SamplingParams, derive_seed
from .strategy import Ask, Candidate, Query, Sample, SearchResult
from .token_counts import scoring_cost
from .trees import Node, SearchTree

if TYPE_CHECKING:
    from .step_search import StepSearch


@dataclass(frozen=True, eq=False)
class _Draw:
    """A sample to draw: where it starts, its number there, its seed and settings, and how long it may get."""

    node: Node
    number: int
    seed: int
    sampling: SamplingParams
    limit: int


class StepEnvironment:
    """The tree of one query, grown within its budget.

    Methods that ask for samples or scores are coroutines: a search calls them with ``yield from``. They do what the
    budget pays for, and set ``stopped_by`` if that is not all.

    Args:
        search: its options.
        query: the query.
        sampling: settings of its samples.
        account: what it may spend.

    Attributes:
        root: the node at the prompt's end.
        stopped_by: the limit that is used up, or ``None``.
        goal: the solution that the search has chosen; ``None`` to choose by score.
        statistics: further numbers of the search, for its tree.
    """

    def __init__(self, search: StepSearch, query: Query, sampling: SamplingParams, account: Account) -> None:
        self.search, self.query, self.account = search, query, account
        self.root = Node()
        self.stopped_by: Limit | None = None
        self.goal: Node | None = None
        self.statistics: dict[str, float] = {}
        separator = search.step_separator
        self._sampling = sampling
        self._step_sampling = sampling if separator is None else replace(sampling, stop=(*sampling.stop, separator))
        self._ends = search.end_token_ids | set(sampling.stop_token_ids)
        positions = search.num_positions()
        room = math.inf if positions is None else positions - len(query.context_ids)
        # Without room for one token, the engine refuses the prompt and says why.
        self._longest = int(max(1, min(sampling.max_new_tokens, room)))
        # The tokens and the text from the prompt's end to each node.
        self._states: dict[Node, tuple[tuple[int, ...], str]] = {self.root: ((), query.lead)}

    # Drawing.

    def expand(
        self, nodes: Sequence[Node], draws: int | Sequence[int], *, apart: bool = False
    ) -> Generator[Ask, Any, list[list[Node]]]:
        """Draws steps that continue nodes, and adds them to the tree.

        Args:
            nodes: nodes that have not ended.
            draws: number of steps to draw from each, or from every one its own number.
            apart: whether a request's steps are merged with each other only, and not with steps that are there.

        Returns:
            For every node the child of each draw, in order; draws of equal steps have the same child. Shorter, or
            empty, where the budget has ended.
        """
        counts = [draws] * len(nodes) if isinstance(draws, int) else list(draws)
        greedy = self._step_sampling.greedy
        waiting: list[_Draw] = []
        owners: list[int] = []
        for place, (node, count) in enumerate(zip(nodes, counts, strict=True)):
            if not self._may_expand():
                break
            self.account.expansions += 1
            numbers = range(node.draws, node.draws + (1 if greedy else count))
            waiting += [self._step(node, number) for number in numbers]
            owners += [place] * len(numbers)
            node.draws += count
        completions = yield from self._draw(waiting)

        # In the order of draws, whatever rounds they came in.
        drawn: list[list[Node]] = [[] for _ in nodes]
        for place, draw, completion in zip(owners, waiting, completions, strict=False):
            repeats = counts[place] if greedy else 1
            among = drawn[place] if apart else draw.node.children
            drawn[place] += [self._add(draw, completion, among, repeats)] * repeats
        for node in dict.fromkeys(nodes):
            set_priors(node.children)
        return drawn

    def roll_out(self, nodes: Sequence[Node], draws: int) -> Generator[Ask, Any, list[list[Node]]]:
        """Completes nodes, in one piece each time, and keeps the results as their rollouts.

        Args:
            nodes: different nodes that have not ended.
            draws: completions of each; a greedy one is drawn once.

        Returns:
            For every node its new rollouts; fewer where the budget has ended.
        """
        waiting: list[_Draw] = []
        owners: list[int] = []
        for place, node in enumerate(nodes):
            for number in range(len(node.rollouts), len(node.rollouts) + (1 if self._sampling.greedy else draws)):
                seed = derive_seed(self.query.seed, "rollout", *node.path, number)
                waiting.append(_Draw(node, number, seed, self._settings(node, self._sampling), self._rest(node)))
                owners.append(place)
        completions = yield from self._draw(waiting)
        drawn: list[list[Node]] = [[] for _ in nodes]
        for place, draw, completion in zip(owners, waiting, completions, strict=False):
            rollout = self._child(draw, completion)
            rollout.rollout, rollout.path = True, draw.node.path
            draw.node.rollouts.append(rollout)
            drawn[place].append(rollout)
        return drawn

    def look_ahead(self, nodes: Sequence[Node], steps: int) -> Generator[Ask, Any, list[Node]]:
        """Continues nodes by their most likely tokens, outside of the tree.

        Args:
            nodes: nodes that have not ended.
            steps: number of steps; fewer where a solution or the budget ends.

        Returns:
            For every node the last of its steps ahead, or the node itself where nothing was drawn.
        """
        ahead = list(nodes)
        greedy = replace(self._step_sampling, temperature=0.0)
        for _ in range(steps):
            places = [place for place, node in enumerate(ahead) if node.finish_reason is None]
            waiting = [
                _Draw(node, 0, 0, self._settings(node, greedy), self._step_limit(node))
                for node in map(ahead.__getitem__, places)
            ]
            completions = yield from self._draw(waiting)
            for place, draw, completion in zip(places, waiting, completions, strict=False):
                ahead[place] = self._child(draw, completion)
        return ahead

    def _draw(self, waiting: Sequence[_Draw]) -> Generator[Ask, Any, list[Completion]]:
        """Draws samples in their order, in as few rounds as the tokens left allow; fewer if they end."""
        found: list[Completion] = []
        while len(found) < len(waiting) and not self._out_of_time():
            group = self._affordable(waiting[len(found) :])
            if not group:
                self.stopped_by = "tokens"
                break
            answers: list[list[Completion]] = yield [self._sample(draws) for draws in _alike(group)]
            found += [completion for answer in answers for completion in answer]
            # A step that the budget cut off could later not be told from a whole one.
            last, limit = found[-1], waiting[len(found) - 1].limit
            if group[-1].limit < limit and last.finish_reason == "length":
                self.stopped_by = "tokens"
        return found

    def _affordable(self, waiting: Sequence[_Draw]) -> list[_Draw]:
        """The first draws that the tokens left pay for at their longest; else one that is cut off, if any is left."""
        left = self.account.left("tokens")
        group: list[_Draw] = []
        for draw in waiting:
            if draw.limit > left:
                break
            left -= draw.limit
            group.append(draw)
        return group if group or left < 1 else [replace(waiting[0], limit=int(left))]

    def _sample(self, draws: Sequence[_Draw]) -> Sample:
        """The request for draws that differ in their seeds alone."""
        first = draws[0]
        seeds = tuple(draw.seed for draw in draws)
        return Sample(self.query, self._states[first.node][0], seeds, first.sampling, first.limit)

    def _may_expand(self) -> bool:
        if self.stopped_by is None and self.account.left("expansions") < 1:
            self.stopped_by = "expansions"
        return self.stopped_by is None and not self._out_of_time()

    def _out_of_time(self) -> bool:
        # The first round is made in any case, so that there is a result.
        if self.stopped_by is None and self.account.tokens and self.account.left("seconds") <= 0:
            self.stopped_by = "seconds"
        return self.stopped_by == "seconds"

    # States.

    def _step(self, node: Node, number: int) -> _Draw:
        seed = derive_seed(self.query.seed, *node.path, number)
        return _Draw(node, number, seed, self._settings(node, self._step_sampling), self._step_limit(node))

    def _settings(self, node: Node, sampling: SamplingParams) -> SamplingParams:
        """The settings of a sample from a node: the minimum length is that of the whole solution."""
        if not sampling.min_new_tokens:
            return sampling
        return replace(sampling, min_new_tokens=max(0, sampling.min_new_tokens - len(self._states[node][0])))

    def _rest(self, node: Node) -> int:
        return self._longest - len(self._states[node][0])

    def _step_limit(self, node: Node) -> int:
        return min(self._rest(node), self.search.max_step_tokens or self._longest)

    def _add(self, draw: _Draw, completion: Completion, among: Sequence[Node], times: int) -> Node:
        """Finds or makes the child that a draw gave."""
        tokens = tuple(completion.token_ids)
        child = next((child for child in among if child.token_ids == tokens), None)
        if child is None:
            child = self._child(draw, completion)
            child.path = (*draw.node.path, draw.number)
            child.multiplicity = 0
            draw.node.children.append(child)
        child.multiplicity += times
        return child

    def _child(self, draw: _Draw, completion: Completion) -> Node:
        """Makes a node that continues that of a draw, without adding it there."""
        if completion.text and not completion.token_ids:
            raise ValueError(
                f"{type(self.search.engine).__name__} returns the text {one_line(completion.text, 40)!r} without its "
                "tokens, which the next step continues: use a LocalEngine, or a server that returns them, such as vLLM"
            )
        before, text_before = self._states[draw.node]
        tokens = (*before, *completion.token_ids)
        text = self.query.lead + decode(self.search.tokenizer, tokens)
        finish_reason = self._finish(tokens, text, completion, draw)
        own = tuple(completion.token_ids)
        child = Node(own, text[len(text_before) :], tuple(completion.logprobs), finish_reason, parent=draw.node)
        self._states[child] = tokens, text
        return child

    def _finish(self, tokens: tuple[int, ...], text: str, completion: Completion, draw: _Draw) -> FinishReason | None:
        """Tells whether a solution has ended, or was cut off for good."""
        stopped = completion.finish_reason == "stop"
        if stopped and tokens and tokens[-1] in self._ends:
            return "stop"
        # Servers may leave the end token out, or know of others: what stopped without a separator has ended.
        separator = self.search.step_separator
        own = decode(self.search.tokenizer, completion.token_ids)
        if stopped and (separator is None or separator not in draw.sampling.stop or separator not in own):
            return "stop"
        # A stop string may have begun in an earlier step.
        if any(stop in text for stop in self._sampling.stop):
            return "stop"
        pattern = self.search.answer_pattern
        if pattern is not None and (stopped or self.search.step_separator is None) and pattern.search(text):
            return "stop"
        # Fewer tokens than asked for, without an end: the engine has no room for more.
        if len(tokens) >= self._longest or (not stopped and len(completion.token_ids) < draw.limit):
            return "length"
        return None

    # Scores and results.

    def candidate(self, node: Node) -> Candidate:
        """Returns the solution up to a node, its text cut before a stop string."""
        tokens, text = self._states[node]
        found = [at for stop in self._sampling.stop if (at := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
        return Candidate(self.query, tokens, text, node.all_logprobs(), node.finish_reason, node.score)

    def score(self, nodes: Sequence[Node]) -> Generator[Ask, Any, None]:
        """Scores those nodes that have no score, in their order, as far as the scorer's tokens reach."""
        left = self.account.left("scorer_tokens")
        fresh: list[Node] = []
        candidates: list[Candidate] = []
        for node in dict.fromkeys(nodes):
            if node.score is not None:
                continue
            candidate = self.candidate(node)
            left -= 0 if left == math.inf else scoring_cost(self.search.scorer, candidate)
            if left < 0:
                self.stopped_by = self.stopped_by or "scorer_tokens"
                break
            fresh.append(node)
            candidates.append(candidate)
        if candidates:
            values: list[float] = yield candidates
            for node, value in zip(fresh, values, strict=True):
                node.score = value
                if not self.search.simulates:
                    node.value = value

    def result(self) -> SearchResult:
        """Returns the result: solutions that have ended or were cut off, or else the partial ones, and the tree."""
        query = self.query
        prompt = query.prompt if isinstance(query.prompt, str) else decode(self.search.tokenizer, query.token_ids)
        name = type(self.search).__name__
        tree = SearchTree(self.root, readable(prompt), query.token_ids, name, query.seed, self.statistics)
        nodes = [node for node in tree.nodes() if node.finish_reason is not None] or list(tree.leaves())
        best = self.goal if self.goal is not None else max(nodes, key=_merit)
        for node in best.line:
            node.chosen = True
        if not self.search.simulates:
            for node in tree.nodes():
                node.visits = node.multiplicity if node.parent is not None else node.draws
        candidates = [replace(c, finish_reason=c.finish_reason or "length") for c in map(self.candidate, nodes)]
        account = self.account
        return SearchResult(
            candidates,
            nodes.index(best),
            tokens=account.tokens,
            scorer_tokens=account.scorer_tokens,
            expansions=account.expansions,
            stopped_by=self.stopped_by,
            tree=tree,
        )


def _merit(node: Node) -> tuple[bool, bool, float, float]:
    """Orders solutions: ended ones first, then by score, then by probability."""
    estimate = node.score if node.score is not None else node.value
    return node.finish_reason == "stop", estimate is not None, estimate or 0.0, sum(node.all_logprobs())


def _alike(draws: Sequence[_Draw]) -> Iterator[list[_Draw]]:
    """Splits draws into runs that differ in their seeds alone."""
    run: list[_Draw] = []
    for draw in draws:
        if run and (draw.node is not run[0].node or draw.limit != run[0].limit):
            yield run
            run = []
        run.append(draw)
    if run:
        yield run


def set_priors(siblings: Sequence[Node]) -> None:
    """Sets the prior of siblings: proportional to probability times multiplicity, or to multiplicity alone.

    Example:
        >>> once, twice = Node((1,), logprobs=(-1.0,)), Node((2,), logprobs=(-1.0,), multiplicity=2)
        >>> set_priors([once, twice])
        >>> round(once.prior, 6), round(twice.prior, 6)
        (0.333333, 0.666667)
    """
    known = all(len(node.logprobs) == len(node.token_ids) for node in siblings)
    logs = [math.log(node.multiplicity) + (sum(node.logprobs) if known else 0.0) for node in siblings]
    largest = max(logs, default=0.0)
    weights = [math.exp(value - largest) for value in logs]
    for node, weight in zip(siblings, weights, strict=True):
        node.prior = weight / sum(weights)
