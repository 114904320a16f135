"""``pipeline --dry-run``: what would run and why, with rows, parameters, memory and time, without running it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ..core.device_precision import default_precision
from ..evaluation import Suite
from ..merging.options import expand
from ..models import load_tokenizer
from ..planning import plan
from ..planning.plan import decoder_of
from ..utils.files import content_hash
from ..utils.imports import load_attribute
from ..utils.inputs import input_hashes
from ..utils.messages import UsageError
from .config import Pipeline
from .errors import in_stage
from .kinds import describe
from .manifest import Manifest, stage_key
from .rounds_stage import check_rounds
from .rows_ahead import Sources, rows_ahead
from .runner import check_forced
from .stages import (
    ChallengeStage,
    ExportStage,
    FitStage,
    MergeStage,
    RoundsStage,
    RowStage,
    SelfPlayStage,
    Stage,
)
from .workload import Load, Samples, load_of, samples_of

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
        memory: bytes of weights, states and caches at most; ``None`` if not known.
        seconds: of an earlier run, or of its arithmetic alone; ``None`` if not known.
    """

    name: str
    kind: str
    runs: bool
    why: str
    facts: list[str] = field(default_factory=list)
    body: list[StagePlan] = field(default_factory=list)
    memory: float | None = None
    seconds: float | None = None


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
    return _plans(pipeline, force, _Sizes(pipeline.dtype), [])


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
    spent = f"{_seconds(seconds)} of arithmetic, or as in earlier runs{without}"
    every = [*running, *(inner for one in running for inner in one.body)]
    sizes = {one.name: one.memory for one in every if one.memory}
    if not sizes:
        return f"{count}; {spent}"
    largest = max(sizes, key=lambda name: sizes[name])
    return f"{count}; {spent}; {sizes[largest] / _GIB:.2f} GiB in {largest}"


def _seconds(number: float) -> str:
    return f"{number:,.0f} s" if number >= 10 else f"{number:.1g} s"


def _lines(found: StagePlan, indent: str) -> Iterator[str]:
    runs = "runs" if found.runs else "stays"
    yield f"{indent}{found.name} ({found.kind}): {runs}, {found.why}"
    if found.facts:
        yield f"{indent}    {'; '.join(found.facts)}"
    for inner in found.body:
        yield from _lines(inner, indent + "    ")


class _Sizes:
    """Knows the sizes of models that there are not yet: those of the models that they are trained from."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.sources = Sources()
        self.origins: dict[str, str] = {}
        self._rate: float | None = None

    def origin(self, model: Any) -> str | None:
        """Returns a model that exists and has the sizes of another."""
        if not model:
            return None
        found = str(model[0] if isinstance(model, list) else model)
        while (known := next((place for place in self.origins if fnmatch(place, found)), None)) is not None:
            found = self.origins[known]
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
        sizes.origins |= _origins(pipeline, name, stage)
        one = StagePlan(name, stage.kind, runs, why, notes)
        if isinstance(stage, RoundsStage) and runs:
            one.body = _plans(check_rounds(stage, pipeline.folder(name), later), (), sizes, later)
            for inner in one.body:
                inner.why = "in every round"
        if runs:
            _describe_size(one, stage, config, manifest.stages.get(name, {}), sizes, pipeline.folder(name))
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
    places = [pipeline.folder(name) / place for key, place in stage.outputs.items() if key in ("model", "models")]
    return dict.fromkeys(map(str, places), source) if isinstance(source, str) else {}


def _describe_size(
    one: StagePlan,
    stage: Stage,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    sizes: _Sizes,
    folder: Path,
) -> None:
    """Fills in the size of a stage, as far as it is known before it runs."""
    if isinstance(stage, FitStage) and "model" in config:
        _describe_training(one, config, sizes)
    elif isinstance(stage, MergeStage | ExportStage):
        _describe_weights(one, stage, sizes)
    else:
        _describe_samples(one, stage, sizes, folder)
    if isinstance(stage, RowStage) and (replay := stage.replay_options) is not None:
        rows = f"{replay.share:g} rows of earlier rounds for each new one"
        one.facts.append(f"up to {rows}, from {replay.capacity:,} that are kept")
    if isinstance(stage, RoundsStage):
        one.facts.append(f"up to {stage.rounds} rounds")
        tested = 0.0 if stage.suite is None else one.seconds
        rounds = [inner.seconds for inner in one.body]
        known = tested is not None and None not in rounds
        one.seconds = tested + stage.rounds * math.fsum(filter(None, rounds)) if known and tested is not None else None

    # An earlier run knows better than arithmetic.
    if record.get("seconds") is not None:
        one.seconds = float(record["seconds"])
        one.facts.append(f"{one.seconds:.0f} s in an earlier run")
    elif one.seconds is not None:
        one.facts.append(f"{_seconds(one.seconds)} of arithmetic")


def _describe_training(one: StagePlan, config: Mapping[str, Any], sizes: _Sizes) -> None:
    options = config["model"].get("init_args") or {}
    one.facts += _memory(one, config, sizes)
    data = config["data"].get("init_args") or {}
    rows, ahead = sizes.sources.count(data.get("train")), sizes.sources.find(data.get("train"))
    if rows is None:
        one.facts.append("rows not known")
    else:
        one.facts.append(f"{'up to ' if ahead else ''}{rows:,} rows")
        one.seconds = _fit_seconds(config, data, rows, sizes.origin(options.get("model")), sizes)


def _describe_weights(one: StagePlan, stage: MergeStage | ExportStage, sizes: _Sizes) -> None:
    """Tells the size of weights that are read."""
    try:
        places = expand(stage.models) if isinstance(stage, MergeStage) else [stage.model]
    except (UsageError, ValueError, OSError):
        return  # a pattern of folders that an earlier stage will write
    try:
        origin = sizes.origin(places[0] if places else None)
        weights = "" if origin is None else f"{decoder_of(origin).weights:,} parameters"
        one.facts += [f"{len(places)} models, {weights} each" if isinstance(stage, MergeStage) else weights]
    except (ValueError, OSError) as error:
        one.facts.append(f"size not known ({error})")


def _describe_samples(one: StagePlan, stage: Stage, sizes: _Sizes, folder: Path) -> None:
    """Tells what a stage samples, and the memory of the policy that takes most."""
    parts = samples_of(stage, sizes.sources)
    suite = getattr(stage, "suite", None)
    one.facts += [] if suite is None else [_numbered(len(Suite.read(suite).tasks), "task")]
    if not parts:
        return
    one.facts += _counts(stage, parts)
    try:
        loads = [load_of(part, sizes.sources, sizes.origin, sizes.dtype) for part in parts]
    except (ValueError, OSError) as error:
        one.facts.append(f"size not known ({error})")
        return
    largest = max(loads, key=lambda load: load.memory)
    if largest.parameters:
        one.memory = largest.memory
        one.facts.append(f"{largest.parameters:,} parameters")
        one.facts.append(f"{largest.memory / _GIB:.2f} GiB, caches {largest.caches / _GIB:.2f}")
    one.facts += _tokens(parts, loads)
    operations = [load.operations for load in loads if load.operations is not None]
    one.seconds = sizes.seconds(math.fsum(operations)) if len(operations) == len(loads) else None

    # Later stages read its rows.
    if parts[0].prompts is not None and loads[0].prompt is not None:
        outputs = {name: str(folder / file) for name, file in stage.outputs.items()}
        players = len(parts) if isinstance(stage, SelfPlayStage) else 1
        each = parts[0].each * players
        sizes.sources.ahead |= rows_ahead(stage, outputs, parts[0].prompts, each, parts[0].tokens, loads[0].prompt)


def _counts(stage: Stage, parts: Sequence[Samples]) -> list[str]:
    """Counts prompts and completions, where their source is there."""
    counts: dict[str, float] = {}
    for part in parts:
        known = part.prompts if part.what == "rows" else part.completions
        counts[part.what] = counts.get(part.what, 0.0) + (math.nan if known is None else known)
    most = "up to " if any(part.at_most for part in parts) else ""
    words = [f"{most}{number:,.0f} {what}" for what, number in counts.items() if not math.isnan(number)]
    if isinstance(stage, ChallengeStage):
        words[:1] = [f"{stage.number:,} requests"]
    elif parts[0].prompts is not None and getattr(stage, "suite", None) is None:
        words.insert(0, f"{parts[0].prompts:,} prompts")
    return [", ".join(words)] if words else []


def _numbered(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _tokens(parts: Sequence[Samples], loads: Sequence[Load]) -> list[str]:
    if any(part.search for part in parts):
        return ["tokens not known"]
    tokens = [load.tokens for load in loads if load.tokens is not None]
    total = sum(tokens)
    return [f"up to {total:,} tokens"] if len(tokens) == len(loads) and total else []


def _memory(one: StagePlan, config: Mapping[str, Any], sizes: _Sizes) -> Iterator[str]:
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
        one.memory = plan(method, known, str(precision or "32-true")).total
        yield f"{one.memory / _GIB:.2f} GiB"
    except (ValueError, OSError) as error:
        yield f"memory not known ({error})"


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
    ahead = sizes.sources.find(data["train"])
    first = sizes.sources.first(data["train"])
    texts = [[value for value in row.values() if isinstance(value, str)] for row in first]
    tokens = sum(len(tokenizer(text)["input_ids"]) for row in texts for text in row) / max(1, len(first))
    if ahead:
        tokens = sum(one.rows * (one.prompt + one.completions) for one in ahead) / max(
            1, sum(one.rows for one in ahead)
        )

    # Steps by their number, or by epochs.
    trainer, batch = config["trainer"], int(data.get("global_batch_size") or 1)
    steps = trainer.get("max_steps")
    if steps is None or steps < 0:
        steps = (trainer.get("max_epochs") or 1) * -(-rows // batch)
    return sizes.seconds(6.0 * weights * tokens * steps * batch)
