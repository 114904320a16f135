"""Checks and runs stages, kind by kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import Suite
from ..evaluation.candidates import check_models
from ..evaluation.checks import check_suite
from ..export import export_gguf
from ..export.gguf_tensors import TYPES
from ..generation import generate_rows
from ..generation.compress import compress_rows
from ..inference.policies import check_single
from ..labeling.command import label_prompts
from ..merging.options import expand
from ..utils.validation import check_choice
from .challenge_stage import check_challenge, run_challenge
from .config import Pipeline
from .errors import in_stage
from .fit_stage import PlannedStageCLI, StageCLI, run_fit
from .judging import check_judging, check_passed_on, run_evaluate, run_gate
from .merge_stage import run_merge
from .refine_stage import check_refine, run_refine
from .rounds_stage import RunBody, check_rounds, run_rounds
from .sample_stage import check_sample, run_sample
from .self_play_stage import check_self_play, run_self_play
from .stages import (
    ChallengeStage,
    CompressStage,
    EvaluateStage,
    ExportStage,
    FitStage,
    GateStage,
    GenerateStage,
    LabelStage,
    MergeStage,
    PromptStage,
    RefineStage,
    RoundsStage,
    SampleStage,
    SelfPlayStage,
)

Say = Callable[[str], None]
# Metrics of a generate stage.
_OF_ROWS = ("rows", "prompts", "cut_off", "tokens", "mean_score", "acceptance_rate", "cache_hit_rate")


def describe(pipeline: Pipeline, name: str, awaited: Sequence[str] = (), note: Say | None = None) -> dict[str, Any]:
    """Returns a stage's full configuration, and checks everything that can be checked without running it.

    Args:
        pipeline: the pipeline.
        name: of the stage.
        awaited: folders that other stages will write: what a suite reads from there is not checked.
        note: for plans: a fit stage whose device is not here counts as right, and this is told why it cannot run.

    Raises:
        ValueError: a mistake in the stage.
    """
    stage, folder, seed = pipeline.stages[name], pipeline.folder(name), pipeline.stage_seed(name)
    if isinstance(stage, FitStage):
        return _describe_fit(stage, folder, seed, note)
    if isinstance(stage, GenerateStage | CompressStage):
        options = stage.options(folder, seed, pipeline.dtype)
        options.check()
        return options.plain() | {"kind": stage.kind}
    if isinstance(stage, LabelStage):
        labels = stage.options(folder, seed, pipeline.dtype)
        # A finished stage has its output already.
        dataclasses.replace(labels, output=str(folder / ".unwritten.jsonl")).check()
        return asdict(labels) | {"kind": stage.kind}
    if isinstance(stage, MergeStage):
        merge = stage.options(folder, seed)
        merge.check()
        return asdict(merge) | {"models": expand(merge.models)}
    if isinstance(stage, PromptStage):
        _check_prompts(stage)
    if isinstance(stage, EvaluateStage | GateStage):
        if isinstance(stage, GateStage):
            check_passed_on("model", stage.model)
            check_passed_on("accepted", stage.accepted)
            suite = check_judging(stage.suite, stage.criteria, stage.validators, awaited)
        else:
            suite = check_suite(stage.suite, awaited)
        # The models by a name under which their contents are inputs.
        if isinstance(stage, EvaluateStage):
            check_models(stage.models, suite)
        models = [*stage.models.values()] if isinstance(stage, EvaluateStage) else [stage.accepted, stage.model]
        found = {"tasks": [task.as_dict() for task in suite.tasks], "compared": {"models": models}}
        return asdict(stage) | found | {"seed": seed, "dtype": pipeline.dtype}
    if isinstance(stage, ExportStage):
        check_choice("type", stage.type, TYPES)
        check_single(stage.model, "model", "and a GGUF file holds one: merge its models first")
    if isinstance(stage, RoundsStage):
        return _describe_rounds(stage, folder, awaited, note) | {"seed": seed, "dtype": pipeline.dtype}
    return asdict(stage) | {"seed": seed, "dtype": pipeline.dtype}


def _describe_fit(stage: FitStage, folder: Path, seed: int, note: Say | None) -> dict[str, Any]:
    if stage.trainer.get("fast_dev_run"):
        raise ValueError(
            f"trainer.fast_dev_run is {stage.trainer['fast_dev_run']!r}, which writes nothing, and later stages "
            "start from what it writes: set max_steps: 1 for a quick look, or try the stage by `rlhf-lightning fit`"
        )
    if note is None:
        return StageCLI(stage, folder, seed).merged | {"export": vars(stage.export)}
    planned = PlannedStageCLI(stage, folder, seed)
    if planned.elsewhere:
        note(planned.elsewhere)
    return planned.merged | {"export": vars(stage.export)}


def _describe_rounds(stage: RoundsStage, folder: Path, awaited: Sequence[str], note: Say | None) -> dict[str, Any]:
    """Describes the first round, and the options of the loop."""
    body = check_rounds(stage, folder, awaited)
    suite = None if stage.suite is None else [task.as_dict() for task in Suite.read(stage.suite).tasks]
    awaited = [*awaited, *(f"{body.folder(inner)}/" for inner in body.stages)]
    # As it is written, too: later rounds differ in what refers to them.
    own = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage) if f.name != "written"}
    first = {}
    for name in body.stages:
        with in_stage(name):
            first[name] = describe(body, name, awaited, note)
    return own | {"first": first, "tasks": suite}


def run_stage(pipeline: Pipeline, name: str, run_body: RunBody, say: Say) -> dict[str, float]:
    """Runs a stage in its folder.

    Args:
        pipeline: the pipeline.
        name: of the stage.
        run_body: runs the stages of a round.
        say: shown one line per part.

    Returns:
        Its metrics.

    Raises:
        ValueError: it failed.
    """
    stage, folder, seed = pipeline.stages[name], pipeline.folder(name), pipeline.stage_seed(name)
    if isinstance(stage, FitStage):
        return run_fit(stage, folder, seed, say)
    if isinstance(stage, GenerateStage):
        summary = generate_rows(stage.options(folder, seed, pipeline.dtype))
        return {metric: summary[metric] for metric in _OF_ROWS if metric in summary}
    if isinstance(stage, CompressStage):
        return compress_rows(stage.options(folder, seed, pipeline.dtype))
    if isinstance(stage, LabelStage):
        # Written by a run that ended before it was recorded.
        (folder / stage.outputs["rows"]).unlink(missing_ok=True)
        return label_prompts(stage.options(folder, seed, pipeline.dtype), say)
    if isinstance(stage, MergeStage):
        return run_merge(stage.options(folder, seed), say).metrics
    if isinstance(stage, PromptStage):
        return _run_prompts(stage, folder, seed, pipeline.dtype, say)
    if isinstance(stage, EvaluateStage):
        return run_evaluate(stage, folder, seed, pipeline.dtype, say)
    if isinstance(stage, GateStage):
        return run_gate(stage, folder, seed, pipeline.dtype, say)
    if isinstance(stage, ExportStage):
        return _run_export(stage, folder, say)
    return run_rounds(stage, folder, seed, pipeline.dtype, run_body, say)


def _check_prompts(stage: PromptStage) -> None:
    """Checks a stage that samples answers to prompts."""
    if isinstance(stage, SampleStage):
        check_sample(stage)
    elif isinstance(stage, RefineStage):
        check_refine(stage)
    elif isinstance(stage, ChallengeStage):
        check_challenge(stage)
    elif isinstance(stage, SelfPlayStage):
        check_self_play(stage)


def _run_prompts(stage: PromptStage, folder: Path, seed: int, dtype: str, say: Say) -> dict[str, float]:
    """Runs a stage that samples answers to prompts."""
    if isinstance(stage, SampleStage):
        return run_sample(stage, folder, seed, dtype, say)
    if isinstance(stage, RefineStage):
        return run_refine(stage, folder, seed, dtype, say)
    if isinstance(stage, ChallengeStage):
        return run_challenge(stage, folder, seed, dtype, say)
    assert isinstance(stage, SelfPlayStage)
    return run_self_play(stage, folder, seed, dtype, say)


def _run_export(stage: ExportStage, folder: Path, say: Say) -> dict[str, float]:
    prompts = {"check_prompts": stage.check_prompts} if stage.check_prompts else {}
    found = export_gguf(stage.model, folder / stage.outputs["file"], type=stage.type, say=say, **prompts)
    numbers = ("logit_error", "rounding", "greedy_agreement")
    return {"tensors": float(sum(found.types.values())), **{name: float(getattr(found, name)) for name in numbers}}
