"""Diverse verifier tree search: independent greedy searches over steps."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from .beam import assess, check_sizes, estimate
from .engine import Engine
from .step_environment import StepEnvironment
from .step_search import StepSearch
from .strategy import Ask
from .trees import Node


class DVTS(StepSearch):
    r"""Searches ``width`` subtrees, each on its own: the best of ``expand`` steps is taken again and again.

    Beeching, Tunstall and Rush (2024), "Scaling test-time compute with open models". Where a beam is soon filled by
    relatives, subtrees stay apart: none sees the draws or scores of another, and equal steps of two subtrees are two
    nodes. A subtree is done when its best step ends a solution; all solutions that were drawn are candidates.

    Args:
        engine: samples from the policy.
        width: number of subtrees, at least 1.
        expand: steps drawn in each round of a subtree, at least 1.
        lookahead: greedy steps before a partial solution is scored, at least 0.
        options: ``scorer`` and the other options of :class:`StepSearch`.

    Example:
        >>> strategy = DVTS(engine, scorer=ProcessScorer("runs/process_reward/model"), width=8)  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"], seeds=[0])[0].text  # doctest: +SKIP
        '3+14=17\n17+9=26\n#26'
    """

    def __init__(self, engine: Engine, *, width: int = 4, expand: int = 4, lookahead: int = 0, **options: Any) -> None:
        super().__init__(engine, **options)
        check_sizes(width, expand, lookahead)
        self.width, self.expand, self.lookahead = width, expand, lookahead

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Searches for one prompt."""
        heads: list[Node] = [steps.root] * self.width
        while heads and not steps.stopped_by:
            drawn = yield from steps.expand(heads, self.expand, apart=True)
            yield from assess(steps, [child for children in drawn for child in children], self.lookahead)
            best = [max(children, key=estimate) for children in drawn if children]
            heads = [node for node in best if node.finish_reason is None]
