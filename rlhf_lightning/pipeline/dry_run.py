"""``pipeline --dry-run``: what would run and why, with rows, parameters, memory and time, without running it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..utils.files import content_hash
from ..utils.inputs import input_hashes
from .config import Pipeline
from .errors import in_stage
from .kinds import describe
from .manifest import Manifest, stage_key
from .rounds_stage import check_rounds
from .runner import check_forced
from .stage_sizes import GIB, Sizes, StagePlan, describe_size, in_seconds, origins_of
from .stages import WITH_MODEL, RoundsStage


def plan_pipeline(pipeline: Pipeline, force: Collection[str] = ()) -> list[StagePlan]:
    """Plans a run: reads configurations and the record of earlier runs, and writes nothing.

    Seconds are those of an earlier run of the stage, or else the time of its arithmetic alone, at the speed of a matrix
    product that is measured now: small models take longer, as their arithmetic is not what takes the time.

    Args:
        pipeline: the pipeline.
        force: stages that run although they are finished.

    Raises:
        UsageError: ``force`` names a stage that there is not.
        ValueError: a mistake in a stage; the message begins with its name.
    """
    check_forced(pipeline, force)
    manifest = Manifest(pipeline.run_dir / "manifest.json")
    if (since := manifest.forced_since(force)) is not None:  # the run would continue
        force = [name for name in force if not manifest.is_started(name, since)]
    return _plans(pipeline, force, Sizes(pipeline.dtype), [])


def plan_lines(pipeline: Pipeline, force: Collection[str] = ()) -> list[str]:
    """Formats the plan of a run: its stages, and a line for all that run."""
    found = plan_pipeline(pipeline, force)
    return [*(line for one in found for line in _lines(one, "")), _total(found)]


def _total(found: Sequence[StagePlan]) -> str:
    """Sums up the stages that run."""
    running = [one for one in found if one.runs]
    if not running:
        return "in all: nothing to do"
    count = f"in all: {len(running)} of {len(found)} stages run"

    # A stage of unknown length is named: a sum without it says too little.
    seconds = math.fsum(one.seconds for one in running if one.seconds is not None)
    unknown = [one.name for one in running if one.seconds is None]
    without = f", without {', '.join(unknown)}" if unknown else ""
    spent = f"{in_seconds(seconds)} of arithmetic, or as in earlier runs{without}"
    every = [*running, *(inner for one in running for inner in one.body)]
    sizes = {one.name: one.memory for one in every if one.memory}
    if not sizes:
        return f"{count}; {spent}"
    largest = max(sizes, key=lambda name: sizes[name])
    missing = [one.name for one in every if not one.memory and not one.body]
    but = f", without {', '.join(missing)}" if missing else ""
    return f"{count}; {spent}; {sizes[largest] / GIB:.2f} GiB in {largest}{but}"


def _lines(found: StagePlan, indent: str) -> Iterator[str]:
    runs = "runs" if found.runs else "stays"
    yield f"{indent}{found.name} ({found.kind}): {runs}, {found.why}"
    if found.facts:
        yield f"{indent}    {'; '.join(found.facts)}"
    for inner in found.body:
        yield from _lines(inner, indent + "    ")


def _plans(pipeline: Pipeline, force: Collection[str], sizes: Sizes, awaited: Sequence[str]) -> list[StagePlan]:
    """Plans the stages of a pipeline; folders in ``awaited`` will be written by stages before it."""
    manifest = Manifest(pipeline.run_dir / "manifest.json")
    found: list[StagePlan] = []
    for name, stage in pipeline.stages.items():
        waits = [one.name for one in found if one.runs]
        later = [*awaited, *(f"{pipeline.folder(before)}/" for before in waits)]
        notes: list[str] = []
        with in_stage(name):
            try:
                config = describe(pipeline, name, later, notes.append)
            except (ValueError, FileNotFoundError) as error:
                # A model that an earlier stage will write.
                if not any(place in str(error) for place in later):
                    raise
                config = {"stage": str(stage)}
        runs, why = _reason(pipeline, manifest, name, config, waits, name in force)
        sizes.origins |= origins_of(pipeline, name, stage)
        one = StagePlan(name, stage.kind, runs, why, notes)
        if isinstance(stage, RoundsStage) and runs:
            one.body = _plans(check_rounds(stage, pipeline.folder(name), later), (), sizes, later)
            for inner in one.body:
                inner.why = "in every round"
        if runs:
            tested = pipeline.evaluation if isinstance(stage, WITH_MODEL) and stage.evaluate else None
            describe_size(one, stage, config, manifest.stages.get(name, {}), sizes, pipeline.folder(name), tested)
        found.append(one)
    return found


def _reason(
    pipeline: Pipeline, manifest: Manifest, name: str, config: Mapping[str, Any], waits: list[str], forced: bool
) -> tuple[bool, str]:
    """Tells whether a stage would run, and why."""
    written = str(config)
    after = [before for before in waits if f"{pipeline.folder(before)}/" in written]
    record = manifest.stages.get(name)
    if forced:
        return True, "forced"
    if record is None:
        return True, f"not run before{_after(after)}"
    if record.get("status") != "finished":
        return True, "interrupted before"
    if after:
        return True, f"its inputs are new{_after(after)}"
    inputs = input_hashes(config)
    if record["key"] != stage_key(config, inputs, pipeline.run_dir):
        return True, _changed(record, config, inputs)
    for place, digest in record["outputs"].items():
        if content_hash(pipeline.folder(name) / place) != digest:
            return True, f"{place} is missing or changed"
    return False, "finished before and unchanged"


def _after(stages: list[str]) -> str:
    return f" (after {', '.join(stages)})" if stages else ""


def _changed(record: Mapping[str, Any], config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Names what differs from an earlier run: contents of inputs, else options."""
    contents = [place for place in {**record["inputs"], **inputs} if record["inputs"].get(place) != inputs.get(place)]
    if contents:
        return f"{', '.join(contents)} changed"
    before = record["config"]
    options = [key for key in {**before, **config} if str(before.get(key)) != str(config.get(key))]
    return f"{', '.join(options) or 'the version of the package'} changed"
