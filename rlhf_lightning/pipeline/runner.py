"""Runs the unfinished stages of a pipeline in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint_io import check_place
from ..evaluation.answers import load_verifier
from ..generation import generate_rows
from ..generation.compress import compress_rows
from ..generation.options import remote_engine, sampling_params
from ..merging.options import expand
from ..utils.files import (
    check_names,
    check_replaceable,
    content_hash,
    discard,
    hold,
    listed_names,
    mark,
    read_marker,
    release,
)
from ..utils.inputs import input_hashes
from ..utils.messages import UsageError
from .config import CompressStage, FitStage, GenerateStage, MergeStage, Pipeline, Stage
from .fit_stage import HISTORY, StageCLI, run_fit
from .manifest import Manifest, stage_key, versions
from .merge_stage import run_merge
from .sample_stage import ANSWERS, PAIRS, SAMPLED, check_models, evaluate, run_sample

Say = Callable[[str], None]

# Files that a pipeline writes next to the folders of its stages, and files that a stage writes into its own folder:
# nothing else in either is ever replaced or deleted.
_OF_RUN = ("manifest.json", "summary.json", "report.html")
_OF_STAGE = (
    *("model", "model.json", "model.soup.json", HISTORY, "stage.yaml", "config.yaml", PAIRS, ANSWERS, SAMPLED),
    *("generated.jsonl", "generated.summary.json", "compressed.jsonl"),
)
# Metrics of a generate stage.
_OF_ROWS = ("rows", "prompts", "cut_off", "tokens", "mean_score", "acceptance_rate", "cache_hit_rate")


def run_pipeline(pipeline: Pipeline, say: Say = print) -> Manifest:
    """Runs unfinished stages, evaluates exported models, and records both.

    A stage is finished if it is recorded as such, its configuration, inputs and the package's version match the record,
    and its outputs are unchanged. Otherwise its earlier files are removed and it starts from its inputs. Nothing else
    is
    removed: a folder of a stage's name that no pipeline made is refused before anything runs, and other files in the
    folders of a run stay.

    Args:
        pipeline: the pipeline.
        say: shown one line per stage.

    Returns:
        The run's record, as in ``manifest.json``.

    Raises:
        ValueError: a stage failed; the message begins with its name.
    """
    if pipeline.threads is not None:
        torch.set_num_threads(pipeline.threads)
    _check_places(pipeline)
    _check_all(pipeline)
    if pipeline.evaluation is not None:
        load_verifier(pipeline.evaluation.verifier)

    with _locked(pipeline.run_dir):
        pipeline.run_dir.mkdir(parents=True, exist_ok=True)
        mark(pipeline.run_dir, "pipeline", _OF_RUN)
        manifest = Manifest(pipeline.run_dir / "manifest.json")
        manifest.content |= {"title": pipeline.title, "config": pipeline.source, "versions": versions()}
        # Stages of policies that are not chosen this time stay finished: their files are still there.
        others = {name: record | {"ran": False} for name, record in manifest.stages.items()}
        manifest.content["stages"] = others
        manifest.save()
        for name, stage in pipeline.stages.items():
            with _in_stage(name):
                _run_stage(pipeline, manifest, name, stage, say)
                if isinstance(stage, FitStage | MergeStage) and stage.evaluate and pipeline.evaluation is not None:
                    _evaluate_stage(pipeline, manifest, name, say)

        # In the order of the pipeline, then stages of other policies.
        manifest.content["stages"] = {name: manifest.stages[name] for name in pipeline.stages} | {
            name: record for name, record in others.items() if name not in pipeline.stages
        }
        manifest.save()
    return manifest


def _check_places(pipeline: Pipeline) -> None:
    """Refuses folders that hold files of a pipeline's names which no pipeline wrote."""
    check_place(pipeline.run_dir, "a pipeline")
    check_names(pipeline.run_dir, "pipeline", _OF_RUN)
    Manifest(pipeline.run_dir / _OF_RUN[0])  # reports a damaged one before anything runs
    for name in pipeline.stages:
        folder = pipeline.folder(name)
        with _in_stage(name):
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


def _check_all(pipeline: Pipeline) -> None:
    """Finds mistakes in the last stage before the first runs."""
    awaited: list[str] = []
    for name, stage in pipeline.stages.items():
        with _in_stage(name):
            try:
                _describe(pipeline, name, stage)
            except (ValueError, FileNotFoundError) as error:
                # Some classes read a model when they are built: such a stage is checked once its model exists.
                if not any(place in str(error) for place in awaited):
                    raise
        # Not there yet: a later stage that reads one of these cannot be checked.
        places = [pipeline.folder(name) / place for place in stage.outputs.values()]
        awaited += [str(place) for place in places if not place.exists()]


def _run_stage(pipeline: Pipeline, manifest: Manifest, name: str, stage: Stage, say: Say) -> None:
    folder, seed = pipeline.folder(name), pipeline.stage_seed(name)
    config = _describe(pipeline, name, stage)
    inputs = input_hashes(config)
    key = stage_key(config, inputs, pipeline.run_dir)
    if manifest.is_finished(name, key, folder):
        manifest.stages[name]["ran"] = False
        say(f"{name}: finished before and unchanged")
        return
    before = manifest.stages.get(name, {})
    begun = before.get("status") == "running" and before.get("key") == key
    if isinstance(stage, FitStage | CompressStage) or not begun:
        _clear(folder)  # interrupted stages that sample keep their samples

    # Recorded as running first: after a crash the stage is not taken for finished.
    started = time.time()
    record: dict[str, Any] = {"kind": stage.kind, "status": "running", "key": key, "seed": seed, "started": started}
    manifest.stages[name] = record | {"inputs": inputs, "config": config, "ran": True}
    manifest.save()
    say(f"{name}: running")

    def tell(line: str) -> None:
        say(f"{name}: {line}")

    if isinstance(stage, FitStage):
        metrics = run_fit(stage, folder, seed, tell)
    elif isinstance(stage, GenerateStage):
        summary = generate_rows(stage.options(folder, seed, pipeline.dtype))
        metrics = {metric: summary[metric] for metric in _OF_ROWS if metric in summary}
    elif isinstance(stage, CompressStage):
        metrics = compress_rows(stage.options(folder, seed, pipeline.dtype))
    elif isinstance(stage, MergeStage):
        metrics = run_merge(stage.options(folder, seed), tell).metrics
    else:
        metrics = run_sample(stage, folder, seed, pipeline.dtype, tell)

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
    say(f"{name}: {_summary(metrics)} ({manifest.stages[name]['seconds']:.0f} s)")


def _evaluate_stage(pipeline: Pipeline, manifest: Manifest, name: str, say: Say) -> None:
    assert pipeline.evaluation is not None
    record = manifest.stages[name]
    config = asdict(pipeline.evaluation)
    shown = config.pop("samples")  # number in the report, no input of the result
    # Evaluated again if the model, the prompts or the settings have changed.
    key = stage_key([config, pipeline.dtype], input_hashes(config) | record["outputs"], pipeline.run_dir)
    answers_file = pipeline.folder(name) / ANSWERS
    if record.get("evaluation", {}).get("key") != key or not answers_file.is_file():
        started = time.time()
        found = evaluate(pipeline.evaluation, pipeline.folder(name) / "model", pipeline.dtype, answers_file)
        record["evaluation"] = {"key": key, **found, "seconds": round(time.time() - started, 2)}
        say(f"{name}: test accuracy {found['accuracy']:.1%} of {found['rows']} problems")
    record["evaluation"]["shown"] = shown
    manifest.save()


def _describe(pipeline: Pipeline, name: str, stage: Stage) -> dict[str, Any]:
    """Returns the stage's full configuration, and checks everything that can be checked without running it."""
    seed = pipeline.stage_seed(name)
    if isinstance(stage, FitStage):
        if stage.trainer.get("fast_dev_run"):
            raise ValueError(
                f"trainer.fast_dev_run is {stage.trainer['fast_dev_run']!r}, which writes nothing, and later stages "
                "start from what it writes: set max_steps: 1 for a quick look, or try the stage by `rlhf-lightning fit`"
            )
        return StageCLI(stage, pipeline.folder(name), seed).merged | {"export": vars(stage.export)}
    if isinstance(stage, GenerateStage):
        options = stage.options(pipeline.folder(name), seed, pipeline.dtype)
        options.check()
        return options.plain() | {"kind": stage.kind}
    if isinstance(stage, CompressStage):
        compress = stage.options(pipeline.folder(name), seed, pipeline.dtype)
        compress.check()
        return compress.plain() | {"kind": stage.kind}
    if isinstance(stage, MergeStage):
        merge = stage.options(pipeline.folder(name), seed)
        merge.check()
        return asdict(merge) | {"models": expand(merge.models)}
    sampling_params(stage.sampling)
    load_verifier(stage.verifier)
    check_models(stage)
    if stage.server is not None:
        remote_engine(stage.server | {"text_prompts": False}, None)  # the tokenizer comes later
    return asdict(stage) | {"seed": seed, "dtype": pipeline.dtype}


def _summary(metrics: dict[str, float]) -> str:
    shown = [
        name
        for name in (
            *("val/accuracy", "val/loss", "pairs", "mean_reward", "rows", "mean_score", "steps"),
            *("models", "ingredients", "soup", "accuracy", "ratio"),
        )
        if name in metrics
    ]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)


@contextmanager
def _in_stage(name: str) -> Iterator[None]:
    """Adds the stage's name to errors."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"stage {name!r}: {error}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"stage {name!r}: {error}") from error


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Locks a run directory against a second process."""
    hold(run_dir)
    try:
        yield
    finally:
        release(run_dir)
