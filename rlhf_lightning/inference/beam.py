"""Beam search over steps."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from ..utils.validation import check_count
from .engine import Engine
from .step_environment import StepEnvironment
from .step_search import StepSearch
from .strategy import Ask
from .trees import Node


def estimate(node: Node) -> float:
    """Returns the search's estimate of a node; the lowest one before there is any."""
    return -math.inf if node.value is None else node.value


def check_sizes(width: int, expand: int, lookahead: int) -> None:
    """Raises unless a search can have these sizes."""
    check_count("width", width, "4 is usual")
    check_count("expand", expand, "4 is usual")
    if lookahead:
        check_count("lookahead", lookahead, "0 scores the step itself")


def assess(steps: StepEnvironment, nodes: Sequence[Node], lookahead: int) -> Generator[Ask, Any, None]:
    """Scores nodes, or where the next steps from them lead."""
    partial = [node for node in nodes if node.finish_reason is None] if lookahead else []
    ahead = dict(zip(partial, (yield from steps.look_ahead(partial, lookahead)), strict=True))
    yield from steps.score([ahead.get(node, node) for node in nodes])
    for node, end in ahead.items():
        node.value = end.value


class BeamSearch(StepSearch):
    r"""Continues the best partial solutions, a step at a time.

    Snell et al. (2024), "Scaling LLM Test-Time Compute Optimally". Each round draws ``expand`` steps from every partial
    solution in the beam (``width * expand`` from the prompt), scores all, and keeps the ``width`` best. A solution that
    has ended keeps its place in the beam until ``width`` others are better; the search is done when all in the beam
    have ended. Solutions that leave the beam remain candidates of the result.

    ``width=1`` is step-wise reranking: the best of ``expand`` steps is taken again and again.

    With ``lookahead``, every partial solution is continued greedily for that many steps, and the score of where this
    leads counts in its place. The tokens of these steps count as tokens of the policy.

    Args:
        engine: samples from the policy.
        width: partial solutions that are kept, at least 1.
        expand: steps drawn from each, at least 1.
        lookahead: greedy steps before a partial solution is scored, at least 0.
        options: ``scorer`` and the other options of :class:`StepSearch`.

    Example:
        >>> strategy = BeamSearch(engine, scorer=ProcessScorer("runs/process_reward/model"))  # doctest: +SKIP
        >>> strategy.search(["3+14+9=?\n"], seeds=[0])[0].text  # doctest: +SKIP
        '3+14=17\n17+9=26\n#26'
    """

    def __init__(self, engine: Engine, *, width: int = 4, expand: int = 4, lookahead: int = 0, **options: Any) -> None:
        super().__init__(engine, **options)
        check_sizes(width, expand, lookahead)
        self.width, self.expand, self.lookahead = width, expand, lookahead

    def explore(self, steps: StepEnvironment) -> Generator[Ask, Any, None]:
        """Searches for one prompt."""
        beam, count = [steps.root], self.width * self.expand
        while not steps.stopped_by:
            continued = [node for node in beam if node.finish_reason is None]
            if not continued:
                break
            drawn = yield from steps.expand(continued, count)
            fresh = list(dict.fromkeys(child for children in drawn for child in children))
            yield from assess(steps, fresh, self.lookahead)

            # A stable sort: of equal scores, the earlier one stays.
            ended = [node for node in beam if node.finish_reason is not None]
            beam = sorted((*ended, *fresh), key=estimate, reverse=True)[: self.width]
            count = self.expand
