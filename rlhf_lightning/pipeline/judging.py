"""The ``evaluate`` and ``gate`` stages, and the decision on the model of a round."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.sources import open_source
from ..evaluation import Report, Suite, Task, divergence, evaluate, own_samples
from ..evaluation.answers import longest_prompt, read_prompts
from ..evaluation.checks import check_suite
from ..evaluation.divergence import check_tokens
from ..inference import LocalEngine, SamplingParams
from ..inference.policies import check_single
from ..models import load_tokenizer
from ..self_improvement import AdversarialValidator
from ..self_improvement.gate import CapabilityCriteria, Decision, check_criteria, decide, overruled
from ..utils.files import json_values, read_marker, write_atomically
from ..utils.folders import replace_folder
from ..utils.option_groups import build_group
from .stages import EvaluateStage, GateStage

EVALUATION, DECISION = "evaluation", "decision.json"
# Prompts of a task that the divergence from the start is measured on.
_DRIFT_PROMPTS = 64
Say = Callable[[str], None]


def criteria_of(written: Mapping[str, Any]) -> CapabilityCriteria:
    """Makes the criteria of a gate.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    try:
        return build_group(written, CapabilityCriteria)
    except TypeError as error:
        raise ValueError(str(error)) from error


def check_judging(
    suite: str | Mapping[str, Any], criteria: Mapping[str, Any], validators: Sequence[Any], awaited: Sequence[str] = ()
) -> Suite:
    """Checks what models are judged by, before anything is loaded.

    Args:
        suite: as in ``check_suite``.
        criteria: options of ``CapabilityCriteria``.
        validators: checks of an ``AdversarialValidator``.
        awaited: folders that other stages will write: what is read from there is not checked.

    Returns:
        The suite.

    Raises:
        ValueError: a mistake in one of them, or a criterion that no task of the suite measures.
    """
    wanted, read = criteria_of(criteria), Suite.read(suite)
    validator_of(validators)
    _check_samples(wanted, read)
    answered = [task for task in read.tasks if isinstance(task, Task)]
    measures = {
        "min_unique_answers": any(task.num_samples > 1 and task.votes for task in answered),
        **dict.fromkeys(("min_distinct", "min_length", "max_length"), bool(answered)),
    }
    advice = {"min_unique_answers": "set num_samples above 1, and votes to true"}
    for name, is_measured in measures.items():
        value = getattr(wanted, name)
        if value and not is_measured:
            how = advice.get(name, "add one of prompts that a model answers, or leave it out")
            raise ValueError(f"criteria.{name} is {value}, and no task of the suite {read.name!r} measures it: {how}")
    check_suite(read, awaited)
    for task in answered:
        _check_number(task)
    return read


def _check_number(task: Task) -> None:
    """Refuses a task that is known to have fewer prompts than a paired test needs."""
    try:
        rows = open_source(task.prompts).num_rows
    except (ValueError, OSError):  # another stage writes them
        return
    if rows is not None and min(rows, task.limit or rows) < 2:
        raise ValueError(
            f"task {task.name!r} has {min(rows, task.limit or rows)} prompt, and a paired test needs at least two: "
            "give more, or raise limit"
        )


def _check_samples(criteria: CapabilityCriteria, suite: Suite) -> None:
    if any(isinstance(task, Task) for task in suite.tasks):
        return
    for name in ("max_token_ms", "max_kl"):
        if (limit := getattr(criteria, name)) is not None:
            raise ValueError(
                f"criteria.{name} is {limit}, and no task of the suite {suite.name!r} samples: "
                "add one of prompts that a model answers, or leave it out"
            )


def validator_of(written: Sequence[Any]) -> AdversarialValidator | None:
    """Makes the validator of a gate; ``None`` without checks.

    Raises:
        ValueError: a check that there is not, or naming its option, the value and what is allowed.
    """
    try:
        return AdversarialValidator(written) if written else None
    except TypeError as error:
        raise ValueError(str(error)) from error


def check_passed_on(name: str, model: Any) -> None:
    """Refuses an ensemble where the accepted model is passed on as a folder.

    Raises:
        ValueError: it is one.
    """
    why = "and what is accepted is passed on as one folder: merge its models first, or compare it by an evaluate stage"
    check_single(model, name, why)


def check_folder(name: str, model: str) -> None:
    """Refuses a model that is not a folder: a rejected candidate is replaced by a copy of the accepted model."""
    if not Path(model).expanduser().is_dir():
        raise ValueError(
            f"{name} is {model!r}, which is no folder: give a folder with a model, such as a stage's export"
        )


@dataclass(frozen=True)
class Judge:
    """Compares candidates with accepted models on a suite.

    Args:
        suite: the tasks.
        criteria: of acceptance.
        folder: where results are kept: answers that are there are not computed again.
        seed: of samples and resamples.
        dtype: of the weights.
        start: the model that the divergence is measured from.
        say: shown one line per result.
        validator: looks at candidates that the paired test accepts; ``None`` for none.
    """

    suite: str | dict[str, Any]
    criteria: CapabilityCriteria
    folder: Path
    seed: int
    dtype: str
    start: str
    say: Say = lambda line: None
    validator: AdversarialValidator | None = None

    def check_tokens(self, candidate: str) -> None:
        """Refuses a candidate with other tokens than the start where the divergence between them is limited.

        Raises:
            ValueError: naming a token.
        """
        _check_samples(self.criteria, Suite.read(self.suite))
        if self.criteria.max_kl is not None:
            advice = f"criteria.max_kl is {self.criteria.max_kl} and needs one tokenizer, so leave it out"
            check_tokens(load_tokenizer(candidate), load_tokenizer(self.start), advice)

    def begin(self, accepted: str, name: str = "accepted") -> None:
        """Evaluates the accepted model, before a candidate is made; its results are kept.

        Raises:
            ValueError: it cannot be evaluated, or results like these cannot be compared by the criteria.
        """
        report = evaluate({name: accepted}, self.suite, output=self.folder, seed=self.seed, dtype=self.dtype)
        check_criteria(report.results, self.criteria)

    def decide(
        self,
        accepted: str,
        candidate: str,
        num_rejected: int = 0,
        names: tuple[str, str] = ("accepted", "candidate"),
    ) -> tuple[Decision, Report]:
        """Decides whether a candidate replaces the accepted model; see ``self_improvement.decide``.

        Args:
            accepted: the accepted model.
            candidate: the candidate.
            num_rejected: rejections in succession before this one.
            names: of both in results and in the history.

        Raises:
            ValueError: a limit on the divergence from a model with other tokens; nothing has been sampled yet.
        """
        self.check_tokens(candidate)
        models = dict(zip(names, (accepted, candidate), strict=True))
        if self.criteria.accept == "not_worse" and self.start != accepted:
            models["start"] = self.start
        report = evaluate(models, self.suite, output=self.folder, seed=self.seed, dtype=self.dtype, say=self.say)
        found_of = {name: [found for found in report.results if found.model == name] for name in models}
        before, after = (found_of[name] for name in names)
        start = None if self.start == accepted else found_of.get("start")
        drift = None if self.criteria.max_kl is None else self._drift(candidate)
        size = None if self.criteria.max_memory_gb is None else self._size(candidate)
        decision = decide(
            before,
            after,
            self.criteria,
            start=start,
            kl=drift,
            memory_gb=size,
            num_rejected=num_rejected,
            seed=self.seed,
        )
        if decision.verdict == "accept" and self.validator is not None:
            found = self.validator.validate(self._engine(candidate), seed=self.seed, say=self.say)
            decision = overruled(decision, found, self.criteria, num_rejected=num_rejected)
        return decision, report

    def _size(self, place: str) -> float:
        """Counts the bytes of a model's weights and of the keys and values that its criteria name, in units of 10^9."""
        model = self._engine(place).model
        weights = sum(held.nbytes for held in (*model.parameters(), *model.buffers()))
        tokens = self.criteria.cache_tokens
        return (weights + (0 if tokens is None else tokens * _bytes_of_token(model))) / 1e9

    def _engine(self, place: str) -> LocalEngine:
        return LocalEngine.from_pretrained(place, dtype=self.dtype)

    def _drift(self, candidate: str) -> float:
        """Computes KL(candidate || start) per token, on the candidate's own samples for the suite's prompts."""
        engine, start = self._engine(candidate), self._engine(self.start)
        assert engine.tokenizer is not None
        rows = []
        for task in Suite.read(self.suite).tasks:
            if not isinstance(task, Task):  # its completions are given
                continue
            prompts = read_prompts(
                task.prompts,
                engine.tokenizer,
                limit=min(task.limit or _DRIFT_PROMPTS, _DRIFT_PROMPTS),
                columns=task.columns or None,
                chat_template_kwargs=task.chat_template_kwargs or None,
            )
            sampling = SamplingParams(max_new_tokens=task.params.max_new_tokens, seed=self.seed)
            # Prompts that leave no room have no answers in the suite, either.
            longest = longest_prompt(engine, sampling)
            prompts = [p for p in prompts if longest is None or len(p.root.tokens) <= longest]
            rows += own_samples(engine, prompts, sampling=sampling)
        # A candidate that says nothing at all is as far away as can be.
        return divergence(engine, start, rows).forward if rows else math.inf


@torch.no_grad()
def _bytes_of_token(model: Any) -> int:
    """Counts the bytes of the keys and values that a model keeps for a token, in all layers that have some."""
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = model(input_ids=tokens, use_cache=True).past_key_values.layers
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(part.nbytes for part in held if part is not None)


def run_evaluate(stage: EvaluateStage, folder: Path, seed: int, dtype: str, say: Say) -> dict[str, float]:
    """Evaluates models on a suite; see ``evaluation.evaluate``.

    Args:
        stage: the stage.
        folder: of the stage; results go into its folder ``evaluation``.
        seed: of samples and resamples.
        dtype: of the weights.
        say: shown one line per result.

    Returns:
        Accuracies by task and model.
    """
    report = evaluate(stage.models, stage.suite, output=folder / EVALUATION, seed=seed, dtype=dtype, say=say)
    return {f"accuracy/{found.model}/{found.task.name}": found.accuracy.value for found in report.results}


def run_gate(stage: GateStage, folder: Path, seed: int, dtype: str, say: Say) -> dict[str, float]:
    """Decides between two models, and copies the one that is accepted.

    Args:
        stage: the stage.
        folder: of the stage, which gets ``model`` and ``decision.json``.
        seed: of samples and resamples.
        dtype: of the weights.
        say: shown one line per result, and the decision.

    Returns:
        The difference with its interval, the p-value, and 1 if the candidate is accepted.
    """
    check_folder("model", stage.model)
    check_folder("accepted", stage.accepted)
    criteria, validator = criteria_of(stage.criteria), validator_of(stage.validators)
    judge = Judge(stage.suite, criteria, folder / EVALUATION, seed, dtype, stage.accepted, say, validator=validator)
    judge.check_tokens(stage.model)
    judge.begin(stage.accepted)
    decision, _ = judge.decide(stage.accepted, stage.model)
    accepts = decision.verdict == "accept"
    say(f"{'accepted' if accepts else 'rejected'}: {decision.reason}")
    copy_model(stage.model if accepts else stage.accepted, folder / "model")
    write_atomically(folder / DECISION, json.dumps(json_values(decision.as_dict()), indent=1) + "\n")
    numbers = {name: getattr(decision, name) for name in ("difference", "low", "high", "p_value")}
    return {"accepted": float(accepts), **numbers}


def copy_model(source: str | Path, target: Path) -> None:
    """Copies a model's folder; the copy appears whole or not at all.

    Args:
        source: the folder.
        target: a folder that a stage owns; an earlier copy there is replaced.
    """
    source = Path(source).expanduser()
    record = read_marker(source)
    kind = "model" if record is None else record["kind"]
    replace_folder(target, kind, lambda place: shutil.copytree(source, place, dirs_exist_ok=True))
