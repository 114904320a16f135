"""Compares the test results of stages: each with the one that it started from, prompt by prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from ..evaluation.results import PairedResult, compare_scores
from ..metrics.intervals import Interval, mean_interval, share_interval
from .config import Pipeline
from .row_files import first_lines
from .sample_stage import ANSWERS
from .stages import FitStage, GateStage, MergeStage, RoundsStage


@dataclass(frozen=True)
class Tested:
    """The test result of a stage.

    Attributes:
        stage: its name.
        accuracy: the mean reward of its answers, with its 95 % interval.
        against: the earlier stage that it is compared with; ``None`` where none has answered the same prompts.
        paired: the comparison: the stage's mean less that of the other, and the p-values.
    """

    stage: str
    accuracy: Interval
    against: str | None = None
    paired: PairedResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for the summary."""
        found: dict[str, Any] = {"test_interval": [self.accuracy.low, self.accuracy.high]}
        if self.paired is not None:
            of = self.paired.comparison
            found["test_comparison"] = {
                "against": self.against,
                "prompts": self.paired.prompts,
                "difference": of.difference,
                "low": of.low,
                "high": of.high,
                "p_value": of.p_value,
                "mcnemar": self.paired.mcnemar,
            }
        return found


def compare_tests(pipeline: Pipeline, evaluated: Collection[str]) -> dict[str, Tested]:
    """Compares each stage that has been tested with the one whose model it started from, if that was tested as well.

    Otherwise with the nearest earlier one that was. Answers are paired by the rows of their prompts.

    Args:
        pipeline: the pipeline.
        evaluated: names of the stages that were tested.

    Returns:
        By name, in the order of the pipeline.
    """
    scores = {name: _scores(pipeline.folder(name) / ANSWERS) for name in pipeline.stages if name in evaluated}
    found: dict[str, Tested] = {}
    for name, own in scores.items():
        if not own:
            continue
        accuracy = _mean(list(own.values()))
        start = started_from(pipeline, name)
        against = start if start in found else next(reversed(found), None)
        if against is None or len(own.keys() & scores[against].keys()) < 2:
            found[name] = Tested(name, accuracy)
            continue
        paired = compare_scores(own, scores[against], "test", name, against, seed=pipeline.seed)
        found[name] = Tested(name, accuracy, against, paired)
    return found


def started_from(pipeline: Pipeline, name: str) -> str | None:
    """Returns the stage whose model a stage starts from: trains on, merges onto or must beat; ``None`` without one."""
    stage = pipeline.stages[name]
    places: list[Any] = []
    if isinstance(stage, FitStage):
        places = [(stage.model.get("init_args") or {}).get("model")]
    elif isinstance(stage, GateStage):
        places = [stage.accepted]
    elif isinstance(stage, RoundsStage):
        places = [stage.model]
    elif isinstance(stage, MergeStage):
        places = [stage.base, *stage.models]
    models = {pipeline.folder(other) / "model": other for other in pipeline.stages if other != name}
    return next((models[Path(p)] for p in places if isinstance(p, str) and Path(p) in models), None)


def _scores(answers: Path) -> dict[str, float]:
    """Reads the rewards of answers by the rows of their prompts."""
    lines = first_lines(answers)
    return {line["row"]: float(line["reward"]) for line in lines if line["reward"] is not None}


def _mean(rewards: list[float]) -> Interval:
    if all(0 <= reward <= 1 for reward in rewards):
        return share_interval(len(rewards), fsum(rewards), fsum(reward * reward for reward in rewards))
    return mean_interval(rewards) if len(rewards) > 1 else Interval(rewards[0], rewards[0], rewards[0])
