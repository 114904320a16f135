"""The ``rounds`` stage: its body again and again, each round accepted by a paired test or rolled back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..inference import derive_seed
from ..self_improvement.gate import Decision
from ..self_improvement.samples import model_hash
from ..utils.files import json_line, json_values, write_atomically
from .config import Before, Pipeline, body_of
from .judging import (
    EVALUATION,
    Judge,
    check_folder,
    check_judging,
    check_passed_on,
    copy_model,
    criteria_of,
    validator_of,
)
from .round_folders import ROUNDS, discard_later, discard_others, discard_unreached, write_models
from .row_files import NoRowsError
from .stages import FitStage, RoundsStage

RECORD = "rounds.jsonl"
_SMALLER = 0.5
# Runs the stages of a round; finished ones are not run again.
RunBody = Callable[[Pipeline], object]


def check_rounds(stage: RoundsStage, folder: Path, awaited: Sequence[str] = ()) -> Pipeline:
    """Checks the options of a stage; returns its first round, in a folder that never exists.

    Args:
        stage: the stage.
        folder: of the stage.
        awaited: folders that other stages will write: what the suite reads from there is not checked.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    check_passed_on("model", stage.model)
    criteria = criteria_of(stage.criteria)
    body = body_of(stage, number=1, earlier=[stage.model], seed=0, run_dir=folder / ROUNDS / "0")
    if stage.suite is None:
        for name in ("criteria", "validators"):
            if getattr(stage, name):
                given = getattr(stage, name)
                raise ValueError(f"{name} is {given!r}, and without a suite every round is accepted: give suite")
        return body
    check_judging(stage.suite, stage.criteria, stage.validators, awaited)
    for name, inner in body.stages.items():
        if criteria.on_reject == "smaller_step" and isinstance(inner, FitStage) and not _rate(inner):
            raise ValueError(
                f"criteria.on_reject is 'smaller_step', and the fit stage {name!r} of the body has no "
                "model.init_args.optimizer.init_args.lr, which it halves: write it there, or on_reject: new_seed"
            )
    return body


def _rate(stage: FitStage) -> Any:
    optimizer = (stage.model.get("init_args") or {}).get("optimizer") or {}
    return (optimizer.get("init_args") or {}).get("lr")


def result_of(stage: RoundsStage, body: Pipeline) -> Path:
    """Returns the folder of the model of a round."""
    last = [name for name, inner in body.stages.items() if "model" in inner.outputs][-1]
    return body.folder(stage.result or last) / "model"


@dataclass
class _Position:
    """The state of a loop between two rounds."""

    models: list[str]  # that were accepted, the start included
    name: str = "start"  # of the one that was accepted last
    step: float = 1.0
    rejected: int = 0  # in succession
    before: Before = field(default_factory=Before)

    @property
    def accepted(self) -> str:
        """The model that was accepted last."""
        return self.models[-1]


def run_rounds(
    stage: RoundsStage, folder: Path, seed: int, dtype: str, run_body: RunBody, say: Callable[[str], None]
) -> dict[str, float]:
    """Runs rounds, and copies the model that was accepted last.

    A round runs in its own folder, ``rounds/<number>``, as a pipeline. Its model is compared with the accepted one on
    the suite; if it is rejected, the next round starts from the accepted export again, with half the learning rates
    (``on_reject: smaller_step``) or other seeds alone. A round of whose samples no row can be made counts as rejected.
    Finished rounds are not run again: a loop that was killed continues, and ends with the same model and record. The
    first model is measured before the first round: criteria that cannot be decided on cost no training. Rounds of an
    earlier, longer run are deleted.

    Args:
        stage: the stage.
        folder: of the stage, which gets ``model``, ``rounds.jsonl`` and ``models.json``, a list of accepted models.
        seed: seeds of rounds are functions of this and their numbers.
        dtype: of the weights in sampling and evaluation.
        run_body: runs the stages of a round.
        say: shown one line per round.

    Returns:
        Numbers of rounds and of accepted ones, and the accuracies of the first and the last accepted model.
    """
    criteria = criteria_of(stage.criteria)
    check_folder("model", stage.model)
    judge = None
    if stage.suite is not None:
        suite_seed, validator = derive_seed(seed, "suite"), validator_of(stage.validators)
        judge = Judge(stage.suite, criteria, folder / EVALUATION, suite_seed, dtype, stage.model, validator=validator)
        judge.begin(stage.model, _Position.name)
    at, records = _Position([stage.model]), []
    for number in range(1, stage.rounds + 1):
        body = body_of(
            stage,
            number=number,
            earlier=at.models,
            seed=derive_seed(seed, "round", number) % 2**31,
            run_dir=folder / ROUNDS / str(number),
            step=at.step,
            before=at.before,
        )
        record = {"round": number, "start": model_hash(at.accepted), "seed": body.seed, "step": at.step}
        outcome = _round(stage, body, judge, at, run_body, f"round {number}")
        records.append(record | outcome)
        write_atomically(folder / RECORD, "".join(map(json_line, records)))
        say(f"round {number}: {outcome['verdict']}: {outcome['reason']}")
        if "model" in outcome:
            at.before = at.before._replace(finished=body.run_dir)
        if outcome["verdict"] == "accept":
            at.before = at.before._replace(accepted=body.run_dir)
            at.models.append(str(result_of(stage, body)))
            at.name = f"round {number}"
            at.rejected = 0
        else:
            at.rejected += 1
            at.step *= _SMALLER if criteria.on_reject == "smaller_step" else 1.0
        if outcome["verdict"] == "stop":
            break
    discard_later(folder, len(records))
    write_models(folder, at.models)
    copy_model(at.accepted, folder / "model")
    return _metrics(records)


def _round(
    stage: RoundsStage, body: Pipeline, judge: Judge | None, at: _Position, run_body: RunBody, name: str
) -> dict[str, Any]:
    """Runs the body of a round, and decides on its model."""
    try:
        run_body(body)
    except NoRowsError as error:
        discard_unreached(body)
        criteria = criteria_of(stage.criteria)
        ends = criteria.on_reject == "stop" or at.rejected + 1 >= criteria.patience
        return {"verdict": "stop" if ends else "reject", "reason": str(error)}
    discard_others(body.run_dir, body.stages)
    candidate = result_of(stage, body)
    outcome: dict[str, Any] = {"model": model_hash(candidate)}
    if judge is None:
        return outcome | {"verdict": "accept", "reason": "there is no suite: every round is accepted"}
    names = at.name, name
    decision, report = judge.decide(at.accepted, str(candidate), at.rejected, names)
    accuracies = {
        what: {found.task.name: found.accuracy.value for found in report.results if found.model == of}
        for what, of in zip(("accepted", "candidate"), names, strict=True)
    }
    return outcome | _plain(decision) | {"accuracy": accuracies}


def _plain(decision: Decision) -> dict[str, Any]:
    return {name: value for name, value in json_values(decision.as_dict()).items() if value is not None}


def _metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    """Summarises a loop: the accuracies are means over tasks."""
    judged = [record for record in records if "accuracy" in record]
    found = {"rounds": float(len(records)), "accepted": float(sum(r["verdict"] == "accept" for r in records))}
    if judged:
        # The last rounds may have had no rows, and so no accuracies.
        first, last = judged[0]["accuracy"], judged[-1]
        ends_with = "candidate" if last["verdict"] == "accept" else "accepted"
        found |= {"accuracy_before": _mean(first["accepted"]), "accuracy": _mean(last["accuracy"][ends_with])}
    return found


def _mean(accuracies: dict[str, float]) -> float:
    return math.fsum(accuracies.values()) / len(accuracies)
