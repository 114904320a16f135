"""Monte-Carlo tree search over steps."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

from ..utils.validation import check_choice, check_count, check_fraction, check_positive
from .engine import Engine
from .step_environment import StepEnvironment
from .step_search import StepSearch
from .strategy import Ask
from .trees import Node


class MCTS(StepSearch):
    r"""Simulates again and again which step to try next, where values are high or little is known.

    A simulation goes down from the prompt by the rule below until it reaches a node that was not visited before. A
    node on the way that was visited once, or that ``widening`` allows more steps, is expanded first. The new node is
    evaluated, and its value counts in the means ``Q`` of all nodes above it; a solution that has ended is evaluated
    once, and counted whenever a simulation reaches it again.

    - ``puct`` (Silver et al., 2017; Schrittwieser et al., 2020), with the policy's prior ``P``, ``n`` visits of the
      node and ``N`` of its parent: ``Q + P * sqrt(N) / (1 + n) * (log((N + c2 + 1) / c2) + c1)``. A node that was not
      visited has its parent's ``Q``.
    - ``uct`` (Kocsis and Szepesvari, 2006): ``Q + exploration * sqrt(log(N) / n)``; nodes that were not visited come
      first, the likeliest before others.

    In both, ``Q`` is scaled to [0, 1] between the lowest and the highest value of the search, so that any scorer can be
    used; a value of minus infinity counts as the lowest. The value of a partial solution is ``(1 - rollout_weight)``
    times its score plus ``rollout_weight`` times the mean score of ``rollouts`` completions of it, which are candidates
    of the result, too. Scorers that cannot judge partial solutions need ``rollout_weight=1``.

    Several ``leaves`` share a round: simulations in progress count as visits with the lowest value, a virtual loss, so
    that the next one goes elsewhere. Rounds are shared with the searches of other prompts in any case.

    Args:
        engine: samples from the policy.
        simulations: number of simulations, at least 1.
        actions: steps drawn from a node, at least 1.
        rule: ``puct`` or ``uct``.
        c1: weight of exploration in ``puct``, above 0.
        c2: visits from which on exploration grows, above 0.
        exploration: weight of exploration in ``uct``, above 0.
        widening: progressive widening ``(k, alpha)``: of a node with ``N`` visits at most ``k * N**alpha`` steps are
            drawn, rounded up, and never more than ``actions``; ``None`` draws them all at once.
        rollouts: completions drawn to evaluate a partial solution.
        rollout_weight: their share of its value, in [0, 1]; above 0 only with rollouts.
        discount: factor of a value for each step between where it was found and where it counts, in (0, 1].
        leaves: simulations that share a round, at least 1.
        choose: ``score`` chooses the solution with the highest score; ``visits`` the best of those below the node that
            is reached by following the most visited steps.
        options: ``scorer``, ``value`` and the other options of :class:`StepSearch`.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> scorer = ProcessScorer("runs/process_reward/model", aggregation="min")  # doctest: +SKIP
        >>> strategy = MCTS(engine, scorer=scorer, simulations=32, budget=Budget(tokens=4096))  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"], seeds=[0])[0].tree.save("tree.html")  # doctest: +SKIP
    """

    simulates = True

    def __init__(
        self,
        engine: Engine,
        *,
        simulations: int = 32,
        actions: int = 4,
        rule: Literal["puct", "uct"] = "puct",
        c1: float = 1.25,
        c2: float = 19652.0,
        exploration: float = 1.0,
        widening: Sequence[float] | None = None,
        rollouts: int = 0,
        rollout_weight: float = 0.0,
        discount: float = 1.0,
        leaves: int = 1,
        choose: Literal["score", "visits"] = "score",
        **options: Any,
    ) -> None:
        super().__init__(engine, **options)
        check_count("simulations", simulations, "32 is usual")
        check_count("actions", actions, "4 is usual")
        check_count("leaves", leaves, "1 is one simulation at a time")
        check_choice("rule", rule, ("puct", "uct"))
        check_choice("choose", choose, ("score", "visits"))

        # Weights of exploration: c1 and c2 are read by puct alone, exploration by uct alone, and all are checked.
        for name, value in (("c1", c1), ("c2", c2), ("exploration", exploration), ("discount", discount)):
            check_positive(
                name, value, "1 is usual" if name in ("exploration", "discount") else "1.25 and 19652 are usual"
            )
        if discount > 1:
            raise ValueError(f"discount is {discount!r}; it must be at most 1 (1 is no discount)")

        # Progressive widening needs both numbers: the children allowed at the first visit, and how fast they grow.
        if widening is not None:
            if len(widening) != 2:
                raise ValueError(f"widening is {widening!r}; it must be two numbers, k and alpha, such as (2, 0.5)")
            check_positive("widening[0]", widening[0], "2 is usual")
            check_fraction("widening[1]", widening[1], "0.5 is usual")

        # A weight without rollouts, or rollouts without a weight, would have no effect.
        if rollouts:
            check_count("rollouts", rollouts, "0 is off")
        if not 0 <= rollout_weight <= 1 or (rollout_weight > 0) != (rollouts > 0):
            raise ValueError(
                f"rollout_weight is {rollout_weight!r} with rollouts={rollouts}; it must be in (0, 1] with rollouts, "
                "and 0 without"
            )

        self.simulations, self.actions, self.leaves, self.choose = simulations, actions, leaves, choose
        self.rule, self.c1, self.c2, self.exploration = rule, c1, c2, exploration
        self.widening = None if widening is None else (float(widening[0]), float(widening[1]))
        self.rollouts, self.rollout_weight, self.discount = rollouts, rollout_weight, discount

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Searches for one prompt."""
        yield from _Simulator(self, steps).run()


class _Simulator:
    """The simulations of one search.

    Args:
        search: its options.
        steps: its tree.
    """

    def __init__(self, search: MCTS, steps: StepEnvironment) -> None:
        self.search, self.steps = search, steps
        self.lowest, self.highest = math.inf, -math.inf
        # Simulations in progress through each node.
        self.pending: dict[Node, int] = {}
        # The value of each ended or evaluated leaf.
        self.values: dict[Node, float] = {}

    def run(self) -> Generator[Ask, Any, None]:
        """Simulates until the number is reached or the budget has ended."""
        done = 0
        while done < self.search.simulations and not self.steps.stopped_by:
            leaves = yield from self._reach(min(self.search.leaves, self.search.simulations - done))
            yield from self._evaluate([leaf for leaf in leaves if leaf not in self.values])
            # Only what was evaluated counts; the rest met the end of the budget.
            self.pending.clear()
            for leaf in leaves:
                if leaf in self.values:
                    self._back_up(leaf)
                    done += 1
        # Solutions that no simulation has reached are paid for: any of them may be the best.
        yield from self.steps.score([node for node in self.steps.root.subtree() if node.finish_reason == "stop"])
        self.steps.statistics["simulations"] = done
        if self.search.choose == "visits":
            self.steps.goal = self._most_visited()

    # Down the tree.

    def _reach(self, number: int) -> Generator[Ask, Any, list[Node]]:
        """Sends simulations down the tree, all together; returns the leaves that they reach."""
        leaves: list[Node] = []
        sent: list[Node] = []
        for _ in range(number):
            node = self._descend(self.steps.root)
            # A node that another simulation is about to expand or to evaluate has nothing to choose from yet.
            if node in sent:
                break
            self._mark(node)
            sent.append(node)
        while sent:
            waiting = [node for node in sent if self._wanted(node)]
            leaves += [node for node in sent if node not in waiting]
            drawn = yield from self.steps.expand(waiting, [self._wanted(node) for node in waiting])
            # Further down from each, past steps that were there before; nothing was drawn if the budget has ended.
            sent = []
            for node, children in zip(waiting, drawn, strict=True):
                if children and (end := self._descend(node)) not in (*sent, *leaves):
                    self._mark(end, node)
                    sent.append(end)
        return leaves

    def _descend(self, node: Node) -> Node:
        """Follows the rule from a node to one that must be expanded or evaluated, or has ended."""
        while node.children and not self._wanted(node):
            node = max(node.children, key=self._urgency)
        return node

    def _wanted(self, node: Node) -> int:
        """Number of steps to draw from a node before the simulation continues."""
        if node.finish_reason is not None or (node.parent is not None and not node.visits):
            return 0
        if self.search.widening is None:
            return 0 if node.draws else self.search.actions
        k, alpha = self.search.widening
        allowed = math.ceil(k * max(1, node.visits) ** alpha)
        return int(max(0, min(self.search.actions, allowed) - node.draws))

    def _urgency(self, node: Node) -> tuple[float, float]:
        """The rule; of equal values, the likelier step is taken, and then the earlier one."""
        search, parent = self.search, node.parent
        assert parent is not None
        above = max(1, parent.visits + self.pending.get(parent, 0))
        n = node.visits + self.pending.get(node, 0)
        if search.rule == "uct":
            bonus = search.exploration * math.sqrt(math.log(above) / n) if n else math.inf
            return self._quality(node) + bonus, node.prior
        growth = math.log((above + search.c2 + 1) / search.c2) + search.c1
        quality = self._quality(node if n else parent)
        return quality + node.prior * math.sqrt(above) / (1 + n) * growth, node.prior

    def _quality(self, node: Node) -> float:
        """The node's mean value between the lowest and the highest of the search, in [0, 1]."""
        n, pending = node.visits, self.pending.get(node, 0)
        if node.value is None or self.highest <= self.lowest:
            return 0.0
        return n / (n + pending) * (node.value - self.lowest) / (self.highest - self.lowest)

    def _mark(self, node: Node, above: Node | None = None) -> None:
        """Counts a simulation in progress through a node and those over it, up to one where it is counted already."""
        while node is not above:
            self.pending[node] = self.pending.get(node, 0) + 1
            if node.parent is None:
                break
            node = node.parent

    # Values.

    def _evaluate(self, leaves: Sequence[Node]) -> Generator[Ask, Any, None]:
        """Finds the values of leaves, as far as the budget reaches."""
        search, steps = self.search, self.steps
        partial = [leaf for leaf in leaves if leaf.finish_reason is None]
        rollouts: dict[Node, list[Node]] = {}
        if search.rollouts:
            rollouts = dict(zip(partial, (yield from steps.roll_out(partial, search.rollouts)), strict=True))
        judged = leaves if search.rollout_weight < 1 else [leaf for leaf in leaves if leaf.finish_reason is not None]
        yield from steps.score([*judged, *(rollout for drawn in rollouts.values() for rollout in drawn)])
        for leaf in leaves:
            # Of rollouts that the budget no longer paid for, the others speak.
            ends = [node.score for node in rollouts.get(leaf, []) if node.score is not None]
            parts = [(search.rollout_weight, sum(ends) / len(ends))] if ends else []
            if leaf.score is not None:
                parts.append((1 - search.rollout_weight * bool(ends), leaf.score))
            if parts:
                self._found(leaf, sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts))

    def _found(self, leaf: Node, value: float) -> None:
        if math.isfinite(value):
            self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        self.values[leaf] = value

    def _back_up(self, leaf: Node) -> None:
        """Counts a leaf's value in the means of all nodes above it."""
        value = self.values[leaf]
        if not math.isfinite(value):
            value = self.lowest if math.isfinite(self.lowest) else 0.0
        node: Node | None = leaf
        while node is not None:
            node.visits += 1
            node.value = value if node.value is None else node.value + (value - node.value) / node.visits
            value, node = value * self.search.discount, node.parent

    def _most_visited(self) -> Node | None:
        """The best solution below the node at the end of the most visited steps that lead to one; ``None`` without."""
        node = self.steps.root
        while node.children:
            node = max(node.children, key=lambda child: (child.visits, child.prior))
        for above in reversed(node.line):
            ended = [n for n in above.subtree() if n.finish_reason == "stop" and n.score is not None]
            if ended:
                return max(ended, key=lambda n: n.score or 0.0)
        return None
