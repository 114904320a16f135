"""Runs the unfinished stages of a pipeline in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint_io import check_place
from ..evaluation.answers import load_verifier
from ..inference.answering import StrategyOption
from ..utils.files import (
    check_names,
    check_replaceable,
    content_hash,
    hold,
    listed_names,
    mark,
    read_marker,
    release,
)
from ..utils.folders import discard
from ..utils.inputs import input_hashes
from ..utils.messages import UsageError, did_you_mean
from .config import Pipeline
from .errors import in_stage
from .fit_stage import HISTORY
from .judging import DECISION
from .kinds import describe, run_stage
from .manifest import Manifest, stage_key, versions
from .report import write_report
from .round_folders import MODELS
from .rounds_stage import RECORD
from .row_files import SAMPLED
from .sample_stage import ANSWERS, evaluate
from .stages import REPLAY, ROWS, WITH_MODEL, ChallengeStage, CompressStage, FitStage, SelfPlayStage

Say = Callable[[str], None]

# Files that a pipeline writes next to the folders of its stages, and files that a stage writes into its own folder:
# nothing else in either is ever replaced or deleted.
_OF_RUN = ("manifest.json", "summary.json", "report.html")
_OF_STAGE = (
    *("model", "model.json", "model.soup.json", HISTORY, "stage.yaml", "config.yaml", ANSWERS, SAMPLED),
    *(
        "generated.jsonl",
        "generated.summary.json",
        "steps.jsonl",
        ".steps.jsonl.journal",
        "model.gguf",
        "compressed.jsonl",
    ),
    *(DECISION, RECORD, MODELS, *ROWS.values(), *REPLAY.values()),
    *(*ChallengeStage.outputs.values(), SelfPlayStage.league),
    "accepted",  # the folder of a CapabilityGate, which refuses the states of another run
)


def run_pipeline(pipeline: Pipeline, say: Say = print, force: Collection[str] = ()) -> Manifest:
    """Runs unfinished stages, evaluates exported models, and records both.

    A stage is finished if it is recorded as such, its configuration, inputs and the package's version match the record,
    and its outputs are unchanged. Otherwise its earlier files are removed and it starts from its inputs. Nothing else
    is removed: a folder of a stage's name that no pipeline made is refused before anything runs, and other files in
    the folders of a run stay.

    Args:
        pipeline: the pipeline.
        say: shown one line per stage.
        force: stages that run although they are finished; of rounds, all of their stages. A forced run that was
            interrupted continues where the same stages are forced again.

    Returns:
        The run's record, as in ``manifest.json``.

    Raises:
        UsageError: ``force`` names a stage that there is not.
        ValueError: a stage failed; the message begins with its name.
    """
    return _run(pipeline, say, force, None)


def _run(pipeline: Pipeline, say: Say, force: Collection[str], since: float | None) -> Manifest:
    """Runs a pipeline; forced stages run unless they were started since a time, by default that of this run."""
    check_forced(pipeline, force)
    if pipeline.threads is not None:
        torch.set_num_threads(pipeline.threads)
    _check_places(pipeline)
    check_stages(pipeline)
    if pipeline.evaluation is not None:
        load_verifier(pipeline.evaluation.verifier)
        StrategyOption(pipeline.evaluation.strategy, own_sampling=True)

    with _locked(pipeline.run_dir):
        pipeline.run_dir.mkdir(parents=True, exist_ok=True)
        mark(pipeline.run_dir, "pipeline", _OF_RUN)
        manifest = Manifest(pipeline.run_dir / "manifest.json")
        manifest.content |= {"title": pipeline.title, "config": pipeline.source, "versions": versions()}
        # Stages of policies that are not chosen this time stay finished: their files are still there.
        others = {name: record | {"ran": False} for name, record in manifest.stages.items()}
        manifest.content["stages"] = others
        since = manifest.force(force) if since is None else since
        manifest.save()
        for name, stage in pipeline.stages.items():
            with in_stage(name):
                _run_stage(pipeline, manifest, name, say, since if name in force else None)
                if isinstance(stage, WITH_MODEL) and stage.evaluate and pipeline.evaluation is not None:
                    _evaluate_stage(pipeline, manifest, name, say)

        # In the order of the pipeline, then stages of other policies.
        manifest.content["stages"] = {name: manifest.stages[name] for name in pipeline.stages} | {
            name: record for name, record in others.items() if name not in pipeline.stages
        }
        manifest.content.pop("forced", None)
        manifest.save()
    return manifest


def check_forced(pipeline: Pipeline, force: Collection[str]) -> None:
    """Refuses names that are no stages.

    Raises:
        UsageError: naming the nearest.
    """
    for name in force:
        if name not in pipeline.stages:
            known = ", ".join(pipeline.stages)
            raise UsageError(f"force is {name!r}, and stages are {known}{did_you_mean(name, pipeline.stages)}")


def _check_places(pipeline: Pipeline) -> None:
    """Refuses folders that hold files of a pipeline's names which no pipeline wrote."""
    check_place(pipeline.run_dir, "a pipeline")
    check_names(pipeline.run_dir, "pipeline", _OF_RUN)
    Manifest(pipeline.run_dir / _OF_RUN[0])  # reports a damaged one before anything runs
    for name in pipeline.stages:
        folder = pipeline.folder(name)
        with in_stage(name):
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise ValueError(f"{str(folder)!r} is a file: give the stage another name, or move it away")
            if folder.is_dir() and any(folder.iterdir()) and read_marker(folder) is None:
                raise ValueError(
                    f"{str(folder)!r} exists and was not made by a pipeline: give the stage another name, choose "
                    "another run_dir, or move that folder away"
                )
            check_names(folder, "stage", _OF_STAGE)
            # A model that the user put there must not be replaced.
            model = folder / "model"
            record = read_marker(model)
            check_replaceable(model, "model" if record is None else record["kind"])


def _clear(folder: Path) -> None:
    """Removes the files of a stage's earlier run, and makes its folder."""
    # Only what is on the stage's list: other files may be the user's.
    for name in sorted(listed_names(folder, "stage")):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            discard(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, "stage", _OF_STAGE)


def check_stages(pipeline: Pipeline) -> None:
    """Finds mistakes in the last stage before the first runs.

    Raises:
        ValueError: the message begins with the stage's name.
    """
    awaited: list[str] = []
    for name, stage in pipeline.stages.items():
        with in_stage(name):
            try:
                describe(pipeline, name, awaited)
            except (ValueError, FileNotFoundError) as error:
                # Some classes read a model when they are built: such a stage is checked once its model exists.
                if not any(place in str(error) for place in awaited):
                    raise
        # Not there yet: a later stage that reads something of this one cannot be checked.
        if not all((pipeline.folder(name) / place).exists() for place in stage.outputs.values()):
            awaited.append(f"{pipeline.folder(name)}/")


def _run_stage(pipeline: Pipeline, manifest: Manifest, name: str, say: Say, since: float | None) -> None:
    """Runs a stage that is not finished, or is forced and has not been started since a time."""
    stage, folder, seed = pipeline.stages[name], pipeline.folder(name), pipeline.stage_seed(name)
    config = describe(pipeline, name)
    inputs = input_hashes(config)
    key = stage_key(config, inputs, pipeline.run_dir)
    forced = since is not None and not manifest.is_started(name, since)
    if not forced and manifest.is_finished(name, key, folder):
        manifest.stages[name]["ran"] = False
        say(f"{name}: finished before and unchanged")
        return
    before = manifest.stages.get(name, {})
    begun = before.get("status") == "running" and before.get("key") == key
    if isinstance(stage, FitStage | CompressStage) or forced or not begun:
        _clear(folder)  # interrupted stages that sample keep their samples

    # Recorded as running first: after a crash the stage is not taken for finished.
    started = time.time()
    record: dict[str, Any] = {"kind": stage.kind, "status": "running", "key": key, "seed": seed, "started": started}
    manifest.stages[name] = record | {"inputs": inputs, "config": config, "ran": True}
    manifest.save()
    say(f"{name}: running")

    def tell(line: str) -> None:
        say(f"{name}: {line}")

    def run_body(body: Pipeline) -> None:
        write_report(body, _run(body, tell, () if since is None else body.stages, since))

    metrics = run_stage(pipeline, name, run_body, tell)
    # Hashes of the outputs are inputs of later stages.
    outputs = {place: content_hash(folder / place) for place in stage.outputs.values()}
    for place, digest in outputs.items():
        if digest is None:
            raise ValueError(f"it ended without writing {place}")
    manifest.stages[name] |= {
        "status": "finished",
        "metrics": metrics,
        "outputs": outputs,
        "seconds": round(time.time() - started, 2),
    }
    manifest.save()
    summary, seconds = _summary(metrics), f"{manifest.stages[name]['seconds']:.0f} s"
    say(f"{name}: {summary} ({seconds})" if summary else f"{name}: {seconds}")


def _evaluate_stage(pipeline: Pipeline, manifest: Manifest, name: str, say: Say) -> None:
    assert pipeline.evaluation is not None
    record = manifest.stages[name]
    config = asdict(pipeline.evaluation)
    shown = config.pop("samples")  # number in the report, no input of the result
    # Evaluated again if the model, the prompts or the settings have changed, or answers have no rows to pair them by.
    key = stage_key([config, pipeline.dtype, "by row"], input_hashes(config) | record["outputs"], pipeline.run_dir)
    answers_file = pipeline.folder(name) / ANSWERS
    if record.get("evaluation", {}).get("key") != key or not answers_file.is_file():
        started = time.time()
        found = evaluate(pipeline.evaluation, pipeline.folder(name) / "model", pipeline.dtype, answers_file)
        record["evaluation"] = {"key": key, **found, "seconds": round(time.time() - started, 2)}
        say(f"{name}: test accuracy {found['accuracy']:.1%} of {found['rows']} problems")
    record["evaluation"]["shown"] = shown
    manifest.save()


def _summary(metrics: dict[str, float]) -> str:
    shown = [
        name
        for name in (
            *("val/accuracy", "val/loss", *ROWS, "replayed", "mean_reward", "rows", "mean_score", "steps"),
            *("models", "ingredients", "soup", "rounds", "accepted", "accuracy_before", "accuracy", "tensors", "ratio"),
        )
        if name in metrics
    ]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Locks a run directory against a second process."""
    hold(run_dir)
    try:
        yield
    finally:
        release(run_dir)
