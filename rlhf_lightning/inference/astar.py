"""A* search over steps."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Any

from ..utils.validation import check_count, check_not_negative
from .budget import Budget
from .engine import Engine
from .step_environment import StepEnvironment
from .step_search import StepSearch
from .strategy import Ask
from .trees import Node

_EXPANSIONS = 200


class AStar(StepSearch):
    r"""Expands the partial solution with the highest bound, until a solution that has ended is the highest.

    Hart, Nilsson and Raphael (1968), for a reward instead of a cost: ``f(n) = g(n) + h(n)``, with ``g = policy_weight *
    log p(n)``, the policy's log-probability of all tokens so far under the sampling distribution, and ``h =
    heuristic_weight * score(n)``; solutions that have ended have the same ``f``, which is what the search maximises.

    If ``f`` of a partial solution is nowhere below that of its continuations, the solution found has the highest ``f``
    of all that the drawn steps can make. This holds by construction

    - for ``heuristic_weight=0`` (uniform cost search for the likeliest solution): a log-probability can only fall;
    - for scores that can only fall from step to step, with any weights: the minimum or the product of probabilities of
      steps (``ProcessScorer`` with ``aggregation`` ``min`` or ``product``).

    Any other score, such as a critic's given as ``value``, is a learned heuristic: the search then finds good solutions
    earlier or later, without a guarantee. A solution that was cut off is no solution; the search continues without it.

    Args:
        engine: samples from the policy; it must report log-probabilities if ``policy_weight`` is above 0.
        actions: steps drawn from a node, at least 1.
        policy_weight: weight of the policy's log-probability, at least 0.
        heuristic_weight: weight of the score, at least 0; with 0 no scorer is needed, and none is asked before the end.
        parallel: nodes expanded per round, the best ones; more than 1 may expand some in vain, with the same result.
        options: ``scorer``, ``value`` and the other options of :class:`StepSearch`; ``budget`` is 200 expansions by
            default, since a search without a limit may expand everything.

    Raises:
        ValueError: an option out of range, or both weights are 0, or a scorer is missing.

    Example:
        >>> strategy = AStar(engine, scorer=ProcessScorer("runs/process_reward/model"))  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"], seeds=[0])[0].expansions  # doctest: +SKIP
        4
    """

    def __init__(
        self,
        engine: Engine,
        *,
        actions: int = 4,
        policy_weight: float = 0.0,
        heuristic_weight: float = 1.0,
        parallel: int = 1,
        budget: Budget | None = None,
        **options: Any,
    ) -> None:
        super().__init__(engine, budget=budget or Budget(expansions=_EXPANSIONS), **options)
        check_count("actions", actions, "4 is usual")
        check_count("parallel", parallel, "1 expands the best node alone")
        check_not_negative("policy_weight", policy_weight, "0 leaves the policy out")
        check_not_negative("heuristic_weight", heuristic_weight, "1 is usual")
        if policy_weight == 0 and heuristic_weight == 0:
            raise ValueError(
                "policy_weight and heuristic_weight are 0: nothing would order the search; give one of them"
            )
        if heuristic_weight > 0 and self.scorer is None:
            raise ValueError(
                f"heuristic_weight is {heuristic_weight!r} without a scorer: give scorer= or value=, or "
                "heuristic_weight=0 and policy_weight=1 for the likeliest solution"
            )
        self.actions, self.parallel = actions, parallel
        self.policy_weight, self.heuristic_weight = float(policy_weight), float(heuristic_weight)

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Searches for one prompt."""
        # Of equal bounds the deeper node comes first, then the earlier one.
        queue: list[tuple[float, int, int, Node]] = [(0.0, 0, 0, steps.root)]
        pushed = 0
        while queue and not steps.stopped_by and steps.goal is None:
            nodes = self._pop(queue, steps)
            if steps.goal is not None:
                break
            drawn = yield from steps.expand(nodes, self.actions)
            fresh = list(dict.fromkeys(child for children in drawn for child in children))
            if self.heuristic_weight:
                yield from steps.score(fresh)
            for child in fresh:
                child.value = self._bound(child)
                if child.value is not None and child.finish_reason != "length":
                    pushed += 1
                    heapq.heappush(queue, (-child.value, -child.depth, pushed, child))
        yield from self._settle(steps)

    def _pop(self, queue: list[tuple[float, int, int, Node]], steps: StepEnvironment) -> list[Node]:
        """Takes the best nodes to expand; sets the goal if the very best has ended."""
        nodes: list[Node] = []
        while queue and len(nodes) < self.parallel:
            if queue[0][-1].finish_reason is not None:
                if not nodes:
                    steps.goal = queue[0][-1]
                break
            nodes.append(heapq.heappop(queue)[-1])
        return nodes

    def _bound(self, node: Node) -> float | None:
        """``f`` of a node; ``None`` if the budget ended before it was scored."""
        g = h = 0.0
        if self.policy_weight:
            logprobs = node.all_logprobs()
            if len(logprobs) != sum(len(step.token_ids) for step in node.line):
                raise ValueError(
                    f"policy_weight is {self.policy_weight!r}, but {type(self.engine).__name__} reports no "
                    "log-probabilities: use an engine that does, or policy_weight=0"
                )
            g = self.policy_weight * sum(logprobs)
        if self.heuristic_weight:
            if node.score is None:
                return None
            h = self.heuristic_weight * node.score
        return g + h

    def _settle(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Chooses the best solution found if the budget ended first, and scores what was not scored on the way."""
        ended = [node for node in steps.root.subtree() if node.finish_reason == "stop" and node.value is not None]
        if steps.goal is None and ended:
            steps.goal = max(ended, key=lambda node: node.value or 0.0)
        if self.scorer is not None and not self.heuristic_weight:
            yield from steps.score(ended)
