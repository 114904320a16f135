"""Options of where completions in training come from: samples, strategies that search, or several of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..inference import Candidate, Scores, build_strategy
from ..inference.specs import strategy_class, takes_scorer
from ..inference.strategy import Strategy
from ..utils.option_groups import OptionGroup
from .tree_advantages import TreeAdvantage

RolloutSpec = str | dict[str, Any]

SAMPLES, MIXED = "samples", "mixed"
_MIXTURE: tuple[RolloutSpec, ...] = (SAMPLES, "mcts")
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True)
class SearchRollouts(OptionGroup):
    r"""Options of where completions in training come from.

    A search (``inference``) draws and scores steps; its tree is the training tree, in which each step is computed once.
    Partial solutions that it leaves are completed by one sample each; budgets limit the search and not these samples.
    Without a ``scorer`` of its own it asks the module's rewards, also for partial solutions. All tokens are drawn with
    the module's temperature, filters and maximum length, and with seeds that depend on the row and the iteration.
    Strategies without trees (``BestOfN``) give all their candidates. Validation samples without a search.

    A strategy decides which states are continued, and not which tokens follow them: all that it drew is trained on. One
    that writes tokens itself, or takes the most likely ones, is refused.

    Args:
        rollouts: ``samples``: ``num_generations`` completions of each prompt; a strategy as in
            ``inference.build_strategy``: ``mcts``, ``astar``, ``beam``, a class name, or a mapping with ``class_path``
            and ``init_args``; ``mixed``: samples and ``mcts``; or a list of these, whose completions are one tree.

    Raises:
        ValueError: an option out of range, or a strategy that cannot be trained on.

    Example:
        >>> SearchRollouts(rollouts=["samples", {"class_path": "MCTS", "init_args": {"simulations": 8}}]).searches
        True
    """

    group: ClassVar[str] = "tree"

    rollouts: str | dict[str, Any] | list[Any] | tuple[Any, ...] = SAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("tree.rollouts is empty; write samples, a strategy such as mcts, or a list of these")
        for spec in self.parts:
            _check_plain(spec)
            if spec == SAMPLES:
                continue
            if isinstance(spec, Mapping) and "sampling" in (spec.get("init_args") or {}):
                raise ValueError(
                    f"tree.rollouts gives {spec.get('class_path')} a sampling of its own, but all tokens are drawn "
                    "from the distribution that is trained: use the module's temperature and sampling"
                )
            if isinstance(spec, Mapping) and "engine" in (spec.get("init_args") or {}):
                raise ValueError(
                    f"tree.rollouts gives {spec.get('class_path')} an engine of its own, but it searches with the "
                    "policy: leave engine out"
                )
            # Built once without a model, so that wrong options are found before one is loaded.
            build_rollouts(_without_scorer(spec), None, _Unused())

    @property
    def parts(self) -> list[RolloutSpec]:
        """The sources of completions, in order."""
        given = list(self.rollouts) if isinstance(self.rollouts, list | tuple) else [self.rollouts]
        return [part for spec in given for part in (_MIXTURE if spec == MIXED else [spec])]

    @property
    def searches(self) -> bool:
        """Whether any of them is a search."""
        return any(spec != SAMPLES for spec in self.parts)


@dataclass(frozen=True, kw_only=True)
class TreeRollouts(SearchRollouts, TreeAdvantage):
    r"""Options of where completions of GRPO come from, and of the advantages of branches that they share.

    Args:
        rollouts: see :class:`SearchRollouts`; the completions of a list are compared as one tree.
        comparison: see :class:`TreeAdvantage`, as for the other options.

    Raises:
        ValueError: an option out of range, or a strategy that cannot be trained on.

    Example:
        >>> TreeRollouts(rollouts="mixed", comparison="sibling").parts
        ['samples', 'mcts']
    """

    group: ClassVar[str] = "tree"


def build_rollouts(spec: RolloutSpec, engine: Any, scorer: Any) -> Strategy:
    """Builds a strategy whose draws can be trained on.

    Args:
        spec: one of ``SearchRollouts.parts`` other than ``samples``.
        engine: samples from the policy.
        scorer: taken where the strategy needs one and has none of its own.

    Raises:
        ValueError: the strategy's tokens are not drawn from the policy.
    """
    cls = strategy_class(spec)
    if not issubclass(cls, Strategy) or not cls.samples:
        raise ValueError(
            f"tree.rollouts is {cls.__name__}, whose tokens are not drawn from the policy: use samples, or a "
            "strategy that samples, such as mcts, astar, beam, DVTS, ParticleFilter or BestOfN"
        )
    found: Strategy = build_strategy(spec, engine, scorer=scorer if takes_scorer(spec) else None)
    return found


def _without_scorer(spec: RolloutSpec) -> RolloutSpec:
    if not isinstance(spec, Mapping):
        return spec
    options = {k: v for k, v in (spec.get("init_args") or {}).items() if k not in ("scorer", "value")}
    return {**spec, "init_args": options}


class _Unused:
    """Stands in for a scorer while options are checked."""

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        raise AssertionError("nothing is searched")


def _check_plain(value: Any) -> None:
    """Refuses what a checkpoint cannot hold."""
    if isinstance(value, Mapping):
        for item in value.values():
            _check_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item)
    elif not isinstance(value, _PLAIN) and not (callable(value) and hasattr(value, "__qualname__")):
        raise ValueError(
            f"tree.rollouts holds a {type(value).__name__}, which a checkpoint cannot: write class_path and init_args, "
            "or the folder of a scorer's model"
        )
