"""``pipeline --dry-run``: what would run and why, with rows, parameters, memory and time, without running it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ..core.device_precision import default_precision
from ..data.sources import open_source
from ..evaluation import Suite
from ..inference.policies import policy_name
from ..models import load_tokenizer
from ..planning import plan
from ..planning.plan import decoder_of
from ..utils.files import content_hash
from ..utils.imports import load_attribute
from ..utils.inputs import input_hashes
from .config import Pipeline
from .kinds import describe
from .manifest import Manifest, stage_key
from .rounds_stage import check_rounds
from .runner import check_forced, in_stage
from .stages import ChallengeStage, FitStage, MergeStage, RefineStage, RoundsStage, SampleStage, SelfPlayStage, Stage

# Rows whose tokens are counted.
_COUNTED = 32
_GIB = float(1 << 30)


@dataclass
class StagePlan:
    """The work of a stage in a run that has not begun.

    Attributes:
        name: of the stage.
        kind: of the stage.
        runs: whether it would run.
        why: the reason.
        facts: rows, parameters, memory, seconds, as far as they are known.
        body: the stages of a round.
    """

    name: str
    kind: str
    runs: bool
    why: str
    facts: list[str] = field(default_factory=list)
    body: list[StagePlan] = field(default_factory=list)


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
    return _plans(pipeline, force, _Sizes(), [])


def plan_lines(pipeline: Pipeline, force: Collection[str] = ()) -> list[str]:
    """Formats the plan of a run."""
    return [line for found in plan_pipeline(pipeline, force) for line in _lines(found, "")]


def _lines(found: StagePlan, indent: str) -> Iterator[str]:
    runs = "runs" if found.runs else "stays"
    yield f"{indent}{found.name} ({found.kind}): {runs}, {found.why}"
    if found.facts:
        yield f"{indent}    {'; '.join(found.facts)}"
    for inner in found.body:
        yield from _lines(inner, indent + "    ")


class _Sizes:
    """Knows the sizes of models that there are not yet: those of the models that they are trained from."""

    def __init__(self) -> None:
        self.origins: dict[str, str] = {}
        self._rate: float | None = None

    def origin(self, model: Any) -> str | None:
        """Returns a model that exists and has the sizes of another."""
        if not model:
            return None
        found = str(model[0] if isinstance(model, list) else model)
        while found in self.origins:
            found = self.origins[found]
        return found

    def seconds(self, operations: float) -> float:
        """Returns the seconds of so many multiplications and additions."""
        if self._rate is None:
            one = torch.randn(512, 512)
            one @ one
            started = time.perf_counter()
            for _ in range(4):
                one @ one
            self._rate = 4 * 2 * 512.0**3 / (time.perf_counter() - started)
        return operations / self._rate


def _plans(pipeline: Pipeline, force: Collection[str], sizes: _Sizes, awaited: Sequence[str]) -> list[StagePlan]:
    """Plans the stages of a pipeline; folders in ``awaited`` will be written by stages before it."""
    manifest = Manifest(pipeline.run_dir / "manifest.json")
    found: list[StagePlan] = []
    for name, stage in pipeline.stages.items():
        waits = [one.name for one in found if one.runs]
        later = [*awaited, *(f"{pipeline.folder(before)}/" for before in waits)]
        with in_stage(name):
            try:
                config = describe(pipeline, name, later)
            except (ValueError, FileNotFoundError) as error:
                # A model that an earlier stage will write.
                if not any(place in str(error) for place in later):
                    raise
                config = {"stage": str(stage)}
        runs, why = _reason(pipeline, manifest, name, config, waits, name in force)
        sizes.origins |= _origins(pipeline, name, stage)
        one = StagePlan(name, stage.kind, runs, why)
        if runs:
            one.facts = list(_facts(stage, config, manifest.stages.get(name, {}), sizes))
        if isinstance(stage, RoundsStage) and runs:
            one.body = _plans(check_rounds(stage, pipeline.folder(name), later), (), sizes, later)
            for inner in one.body:
                inner.why = "in every round"
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


def _origins(pipeline: Pipeline, name: str, stage: Stage) -> dict[str, str]:
    """Returns models that have the size of the stage's."""
    source: Any = None
    if isinstance(stage, FitStage):
        source = (stage.model.get("init_args") or {}).get("model")
    elif isinstance(stage, MergeStage):
        source = stage.models[0] if stage.models else None
    else:
        source = getattr(stage, "model", None)
    place = pipeline.folder(name) / "model"
    return {str(place): source} if "model" in stage.outputs and isinstance(source, str) else {}


def _facts(stage: Stage, config: Mapping[str, Any], record: Mapping[str, Any], sizes: _Sizes) -> Iterator[str]:
    """Describes the size of a stage, as far as it is known before it runs."""
    estimate: float | None = None
    if isinstance(stage, FitStage) and "model" in config:
        options = config["model"].get("init_args") or {}
        yield from _memory(config, sizes)
        data = config["data"].get("init_args") or {}
        rows = _count(data.get("train"))
        if rows is not None:
            yield f"{rows:,} rows"
            estimate = _fit_seconds(config, data, rows, sizes.origin(options.get("model")), sizes)
    yield from _sampled(stage)
    suite = getattr(stage, "suite", None)
    if suite is not None:
        yield f"{len(Suite.read(suite).tasks)} tasks"
    if isinstance(stage, RoundsStage):
        yield f"up to {stage.rounds} rounds"
    if record.get("seconds") is not None:
        yield f"{record['seconds']:.0f} s in an earlier run"
    elif estimate is not None:
        yield f"at least {estimate:.0f} s of arithmetic"


def _sampled(stage: Stage) -> Iterator[str]:
    """Describes what a stage samples, where its prompts are there."""
    if isinstance(stage, ChallengeStage):
        yield f"{stage.number:,} requests, up to {stage.number * stage.num_samples:,} samples"
    if not isinstance(stage, SampleStage | RefineStage | SelfPlayStage) or (prompts := _count(stage.prompts)) is None:
        return
    if isinstance(stage, RefineStage):
        yield f"{prompts:,} prompts, up to {prompts * (1 + stage.revisions):,} drafts"
        return
    players = prompts
    if isinstance(stage, SelfPlayStage):
        trial = min(stage.trial, prompts)
        players = trial * len(set(map(policy_name, stage.opponents))) + 2 * prompts - trial
    yield f"{prompts:,} prompts, {players * stage.num_samples:,} samples"


def _memory(config: Mapping[str, Any], sizes: _Sizes) -> Iterator[str]:
    """Describes the parameters of a fit stage, and the memory of its micro-batches."""
    options = dict(config["model"].get("init_args") or {})
    origin = sizes.origin(options.get("model"))
    if origin is None:
        return
    try:
        yield f"{decoder_of(origin).weights:,} parameters"
        method = load_attribute(config["model"]["class_path"])
        precision = config["trainer"].get("precision") or default_precision(config["trainer"])
        known = {**options, "model": origin, "rewards": None, "process_reward": None}
        yield f"{plan(method, known, str(precision or '32-true')).total / _GIB:.2f} GiB"
    except (ValueError, OSError) as error:
        yield f"memory not known ({error})"


def _count(source: Any) -> int | None:
    """Returns the number of rows of a source; ``None`` if it is not there yet or unknown."""
    try:
        return open_source(source).num_rows if source else None
    except (ValueError, OSError):
        return None


def _fit_seconds(
    config: Mapping[str, Any], data: Mapping[str, Any], rows: int, origin: str | None, sizes: _Sizes
) -> float | None:
    """Estimates six operations per weight and token, of rows that are read as they are: not of sampled ones."""
    if origin is None or "Prompt" in str(config["data"].get("class_path")):
        return None
    try:
        tokenizer, weights = load_tokenizer(origin), decoder_of(origin).weights
    except (ValueError, OSError):
        return None
    first = [row for _, row in islice(open_source(data["train"]), _COUNTED)]
    texts = [[value for value in row.values() if isinstance(value, str)] for row in first]
    tokens = sum(len(tokenizer(text)["input_ids"]) for row in texts for text in row) / max(1, len(first))

    # Steps by their number, or by epochs.
    trainer, batch = config["trainer"], int(data.get("global_batch_size") or 1)
    steps = trainer.get("max_steps")
    if steps is None or steps < 0:
        steps = (trainer.get("max_epochs") or 1) * -(-rows // batch)
    return sizes.seconds(6.0 * weights * tokens * steps * batch)
