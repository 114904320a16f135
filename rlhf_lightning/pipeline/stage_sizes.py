"""Sizes of stages before they run: rows, parameters, memory and time, as far as they are known."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ..utils.imports import load_attribute
from ..utils.messages import UsageError
from .config import Evaluation, Pipeline
from .rows_ahead import Sources, rows_ahead
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
from .workload import Load, Samples, limited, load_of, samples_of

GIB = float(1 << 30)


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


class Sizes:
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
        # A folder's name may have brackets, which are no pattern; a stage may be given what it wrote in an earlier run.
        seen: set[str] = set()
        while found not in seen:
            seen.add(found)
            known = found if found in self.origins else next((p for p in self.origins if fnmatch(p, found)), None)
            found = found if known is None else self.origins[known]
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


def origins_of(pipeline: Pipeline, name: str, stage: Stage) -> dict[str, str]:
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


def describe_size(
    one: StagePlan,
    stage: Stage,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    sizes: Sizes,
    folder: Path,
    tested: Evaluation | None,
) -> None:
    """Fills in the size of a stage, as far as it is known before it runs, and says what is not."""
    if isinstance(stage, FitStage) and "model" in config:
        _describe_training(one, config, sizes)
    elif isinstance(stage, FitStage):
        one.facts.append("rows not known: it reads a model that an earlier stage will write")
    elif isinstance(stage, MergeStage | ExportStage):
        _describe_weights(one, stage, sizes)
    else:
        _describe_samples(one, stage, sizes, folder)
    if isinstance(stage, RowStage) and (replay := stage.replay_options) is not None:
        rows = f"{replay.share:g} rows of earlier rounds for each new one"
        one.facts.append(f"up to {rows}, from {replay.capacity:,} that are kept")
    if isinstance(stage, RoundsStage):
        one.facts.append(f"up to {stage.rounds} rounds")
        judged = 0.0 if stage.suite is None else one.seconds
        rounds = [inner.seconds for inner in one.body]
        known = judged is not None and None not in rounds
        one.seconds = judged + stage.rounds * math.fsum(filter(None, rounds)) if known and judged is not None else None
    if tested is not None:
        _describe_test(one, tested, sizes, folder / "model")

    # An earlier run knows better than arithmetic.
    if record.get("seconds") is not None:
        one.seconds = float(record["seconds"]) + float(record.get("evaluation", {}).get("seconds", 0.0))
        one.facts.append(f"{one.seconds:.0f} s in an earlier run")
    elif one.seconds is not None:
        one.facts.append(f"{in_seconds(one.seconds)} of arithmetic")
    unknown = [what for what in ("memory", "time") if _is_unknown(one, what)]
    one.facts += [f"{' and '.join(unknown)} not known"] if unknown else []


def _is_unknown(one: StagePlan, what: str) -> bool:
    """Whether memory or time is unknown, and no fact says so."""
    value = one.memory if what == "memory" else one.seconds
    # The memory of rounds is that of their body.
    said = (what == "memory" and bool(one.body)) or any(fact.startswith(f"{what} not known") for fact in one.facts)
    return value is None and not said


def _describe_test(one: StagePlan, tested: Evaluation, sizes: Sizes, model: Path) -> None:
    """Adds what it takes to answer the pipeline's test prompts with the model of a stage."""
    rows = limited(sizes.sources, tested.prompts, tested.limit)
    part = Samples(str(model), tested.prompts, rows, 1, tested.max_new_tokens, search=tested.strategy is not None)
    try:
        load = load_of(part, sizes.sources, sizes.origin, sizes.dtype)
    except (ValueError, OSError) as error:
        one.seconds = None
        one.facts.append(f"size of its test not known ({error})")
        return
    known = load.tokens is not None and load.operations is not None
    count = "" if rows is None else f" of {rows:,} prompts"
    one.facts.append(f"then a test{count}, {f'up to {load.tokens:,} tokens' if known else 'tokens not known'}")
    both = one.seconds is not None and load.operations is not None
    one.seconds = (one.seconds or 0.0) + sizes.seconds(load.operations or 0.0) if both else None
    one.memory = None if one.memory is None else max(one.memory, load.memory)


def _describe_training(one: StagePlan, config: Mapping[str, Any], sizes: Sizes) -> None:
    options = config["model"].get("init_args") or {}
    one.facts += _memory(one, config, sizes)
    data = config["data"].get("init_args") or {}
    rows, ahead = sizes.sources.count(data.get("train")), sizes.sources.find(data.get("train"))
    if rows is None:
        one.facts.append("rows not known")
    else:
        one.facts.append(f"{'up to ' if ahead else ''}{rows:,} rows")
        one.seconds = _fit_seconds(config, data, rows, sizes.origin(options.get("model")), sizes)


def _describe_weights(one: StagePlan, stage: MergeStage | ExportStage, sizes: Sizes) -> None:
    """Tells the size of weights that are read."""
    places = stage.models if isinstance(stage, MergeStage) else [stage.model]
    count, awaited = "models of earlier stages", False
    try:
        places = expand(places)
        count = _numbered(len(places), "model")
    except (UsageError, ValueError, OSError):
        awaited = True  # a pattern of folders that an earlier stage will write
    try:
        origin = sizes.origin(places)
        weights = "size not known" if origin is None else f"{decoder_of(origin).weights:,} parameters"
        one.facts += [f"{count}, {weights} each" if isinstance(stage, MergeStage) else weights]
    except (ValueError, OSError) as error:
        one.facts.append(f"{count}, size not known" if awaited else f"size not known ({error})")


def _describe_samples(one: StagePlan, stage: Stage, sizes: Sizes, folder: Path) -> None:
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
        one.facts.append(f"{largest.memory / GIB:.2f} GiB, caches {largest.caches / GIB:.2f}")
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


def _memory(one: StagePlan, config: Mapping[str, Any], sizes: Sizes) -> Iterator[str]:
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
        whole = " on one device, unsharded" if "fsdp" in str(config["trainer"].get("strategy")) else ""
        yield f"{one.memory / GIB:.2f} GiB{whole}"
    except (ValueError, OSError) as error:
        yield f"memory not known ({error})"


def _fit_seconds(
    config: Mapping[str, Any], data: Mapping[str, Any], rows: int, origin: str | None, sizes: Sizes
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

    if not tokens:
        return None  # a folder without a tokenizer

    # Steps by their number, or by epochs.
    trainer, batch = config["trainer"], int(data.get("global_batch_size") or 1)
    steps = trainer.get("max_steps")
    if steps is None or steps < 0:
        steps = (trainer.get("max_epochs") or 1) * -(-rows // batch)
    return sizes.seconds(6.0 * weights * tokens * steps * batch)


def in_seconds(number: float) -> str:
    """Formats seconds."""
    if number >= 9.95:
        return f"{number:,.0f} s"
    return f"{number:.1f} s" if number >= 0.95 else f"{number:.1g} s"
