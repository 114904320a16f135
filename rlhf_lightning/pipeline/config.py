"""Reads and checks a pipeline's YAML: its stages in order, with their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..generation.options import sampling_params
from ..utils import yaml_parser
from ..utils.messages import UsageError, did_you_mean, one_line
from ..utils.packaged_configs import nearest_config, packaged_config
from .build import build, whole
from .references import check_order
from .stages import (
    EXACT,
    KINDS,
    REPLAY,
    ROWS,
    CompressStage,
    Export,
    FitStage,
    GenerateStage,
    LabelStage,
    MergeStage,
    RoundsStage,
    RowStage,
    Stage,
    outputs_of,
)


@dataclass(frozen=True)
class Evaluation:
    """Tests every exported model by greedy completions of the test prompts, or by searches.

    ``strategy`` is as in ``inference.build_strategy``; its ``sampling``, by default at temperature 1, draws samples of
    at most ``max_new_tokens``.
    """

    prompts: str | list[str]
    verifier: str = EXACT
    max_new_tokens: int = 256
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    strategy: str | dict[str, Any] | None = None
    samples: int = 8  # shown in the report


_TOP_LEVEL = (
    *("title", "run_dir", "seed", "threads", "dtype", "variables"),
    *("policy", "policies", "evaluation", "stages", "compare"),
)


@dataclass(frozen=True)
class Comparison:
    """A figure of one metric over the steps, or the seconds of training, of several stages.

    Stages of policies that are not chosen are skipped.
    """

    metric: str
    stages: list[str]
    over: Literal["steps", "seconds"] = "steps"
    title: str = ""
    text: str = ""


class Before(NamedTuple):
    """Folders of earlier rounds: of the last that was accepted, and of the last that had a model; ``None`` for none."""

    accepted: Path | None = None
    finished: Path | None = None


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline.

    Attributes:
        title: the heading of its report.
        run_dir: where everything is written.
        seed: seed of every stage without its own.
        threads: threads of torch; ``None`` for its default.
        dtype: type of the weights in sampling and evaluation.
        stages: by name, in order; interpolations are resolved, so that outputs of earlier stages are paths.
        evaluation: test of every exported model; ``None`` for no test.
        compare: figures of the report that show several stages.
        source: the configuration as written, overrides included.
    """

    title: str
    run_dir: Path
    seed: int
    threads: int | None
    dtype: str
    stages: dict[str, Stage]
    evaluation: Evaluation | None
    compare: list[Comparison]
    source: dict[str, Any]

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.run_dir / stage

    def stage_seed(self, stage: str) -> int:
        """The seed of a stage: its own, or the pipeline's."""
        own = self.stages[stage].seed
        return self.seed if own is None else own


def load_pipeline(path: str | Path, overrides: Sequence[str] = (), run_dir: str | Path | None = None) -> Pipeline:
    """Reads a pipeline's YAML.

    Args:
        path: the file; ``configs/...`` may be one of the package.
        overrides: ``key=value``, such as ``stages.dpo.trainer.max_epochs=2``.
        run_dir: replaces the file's ``run_dir``.

    Raises:
        UsageError: something is missing, unknown or of the wrong kind.
    """
    file = packaged_config(path) or Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {str(path)!r}{nearest_config(path)}")
    try:
        config = OmegaConf.create(yaml_parser.plain(yaml_parser.load(file.read_text(encoding="utf-8"), str(file))))
        if not isinstance(config, DictConfig):
            raise UsageError(f"{str(path)!r} is not a mapping: a pipeline has stages")
        # Overrides before interpolation, so that they may contain references and change referenced values.
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UsageError(f"{override!r} is not an override: write key=value, such as stages.dpo.seed=1")
            OmegaConf.update(config, key, yaml_parser.plain(yaml_parser.load(value)), force_add=True)
        if run_dir is not None:
            config.run_dir = str(run_dir)
        others = _choose_policies(config)
        source = OmegaConf.to_container(config)
        return _check(config, source, others)  # type: ignore[arg-type]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(f"{str(path)!r}: {one_line(error)}") from error


def _choose_policies(config: DictConfig) -> set[str]:
    """Adds the stages of the chosen policies to ``stages``; returns the names of the stages not chosen."""
    written = OmegaConf.to_container(config)
    policies = written.get("policies") if isinstance(written, dict) else None
    if policies is None:
        if "policy" in config:
            raise UsageError(f"policy is {config.policy!r}, but the file defines no policies")
        return set()
    if not isinstance(policies, dict) or not all(isinstance(stages, dict) for stages in policies.values()):
        raise UsageError("policies is not a mapping of names to stages: write policies: {dpo: {dpo: {kind: fit, ...}}}")
    policy = written.get("policy")  # type: ignore[union-attr]
    chosen: list[Any] = policy if isinstance(policy, list) else [policy]
    for name in chosen:
        if name not in list(policies):
            raise UsageError(f"policy is {name!r}; write {', '.join(map(str, policies))}, or several: [a, b]")
    given = config.get("stages") or OmegaConf.create()

    # A stage without a kind is an override of a policy's stage, not a stage.
    always = {name: stage for name, stage in given.items() if not OmegaConf.is_dict(stage) or "kind" in stage}
    # Values under stages take precedence: overrides of a policy's stages on the command line are there.
    config.stages = OmegaConf.merge(always, *(config.policies[name] for name in chosen), given)
    del config["policies"]
    return {stage for stages in policies.values() for stage in stages} - set(config.stages)


def _check(config: DictConfig, source: dict[str, Any], not_chosen: set[str]) -> Pipeline:
    for key in source:
        if key not in _TOP_LEVEL:
            raise UsageError(f"a pipeline has no key {key!r}{did_you_mean(str(key), _TOP_LEVEL)}")
    if not isinstance(source.get("run_dir"), str):
        raise UsageError("run_dir is missing: write where the run goes, such as run_dir: runs/mine")
    if not isinstance(source.get("stages"), dict) or not source["stages"]:
        raise UsageError("stages is missing: write at least one stage by name, with its kind")

    stages, resolved = _stages(config, source["stages"])
    evaluation = resolved.get("evaluation")
    compare = [build(Comparison, item, "compare") for item in resolved.get("compare") or []]
    for name in (name for item in compare for name in item.stages):
        if name not in stages and name not in not_chosen:
            raise UsageError(f"compare names the stage {name!r}, which there is not{did_you_mean(name, stages)}")

    # A figure shows the stages of this run, and needs at least two.
    compare = [dataclasses.replace(item, stages=[n for n in item.stages if n in stages]) for item in compare]
    return Pipeline(
        title=str(resolved.get("title") or "Pipeline"),
        run_dir=Path(resolved["run_dir"]),
        seed=whole("seed", resolved.get("seed", 0), 0),
        threads=None if resolved.get("threads") is None else whole("threads", resolved["threads"], 1),
        dtype=_dtype(resolved.get("dtype", "float32")),
        stages=stages,
        evaluation=build(Evaluation, evaluation, "evaluation") if evaluation else None,
        compare=[item for item in compare if len(item.stages) > 1],
        source=source,
    )


def _stages(config: DictConfig, written: Mapping[str, Any]) -> tuple[dict[str, Stage], dict[str, Any]]:
    """Resolves the references of a configuration; returns its stages, and all of it as plain values."""
    check_order(written)
    # References such as ${outputs.sft.model} are resolved against the stages' places.
    places = {name: _outputs(config.run_dir, name, stage) for name, stage in written.items()}
    config.outputs = OmegaConf.merge(config.get("outputs") or {}, places)
    # Bodies of rounds are resolved later: they have references to each round.
    bodies: dict[str, Any] = {}
    for name, stage in written.items():
        if stage["kind"] == "rounds":
            bodies[name] = stage.get("body")
            config.stages[name].pop("body", None)
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    shared = {key: value for key, value in resolved.items() if key not in ("stages", "compare", "evaluation", "round")}
    found = {}
    for name, stage in resolved["stages"].items():
        if name in bodies:
            stage = stage | {"body": bodies[name], "written": shared}
        found[name] = _stage(name, stage)
        if name in bodies:
            _check_body(name, found[name], [*written])
    return found, resolved


def _outputs(run_dir: str, name: str, written: Any) -> dict[str, str]:
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind not in KINDS:
        *others, last = KINDS
        raise UsageError(f"stage {name!r} is of kind {kind!r}; write kind: {', '.join(others)} or {last}")
    return {key: str(Path(run_dir) / name / place) for key, place in outputs_of(written).items()}


def _stage(name: str, written: dict[str, Any]) -> Stage:
    where, cls = f"stage {name!r}", KINDS[written["kind"]]
    if not name.isidentifier() and not name.replace("-", "_").isidentifier():
        raise UsageError(f"{where}: a name has letters, digits, - and _, and is that of a folder")
    if cls in (CompressStage, GenerateStage, LabelStage, MergeStage) and "output" in written:
        raise UsageError(f"{where}: output is {written['output']!r}, and the stage names it itself: leave it out")
    if cls in (CompressStage, GenerateStage, LabelStage) and not written.get("sampling"):
        written = {key: value for key, value in written.items() if key != "sampling"}  # the command's own
    elif cls in (CompressStage, GenerateStage, LabelStage):
        try:
            written = written | {"sampling": sampling_params(written["sampling"])}
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
    if cls is FitStage:
        config = written.get("config") or []
        export = build(Export, written.get("export") or {}, f"{where}, export")
        written = written | {"config": [config] if isinstance(config, str) else config, "export": export}
    if issubclass(cls, RowStage):
        written = written | {"rows": _kinds_of_rows(written.get("rows", ["pairs"]), where)}
    if cls is RoundsStage:
        whole(f"{where}: rounds", written.get("rounds", 3), 1)
    stage: Stage = build(cls, written, where)
    return stage


def _kinds_of_rows(rows: Any, where: str) -> list[str]:
    rows = [rows] if isinstance(rows, str) else rows
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{where}: rows is {rows!r}; write at least one of {', '.join(ROWS)}")
    for kind in rows:
        if kind not in ROWS:
            raise UsageError(
                f"{where}: rows has {kind!r}; it may have {', '.join(ROWS)}{did_you_mean(str(kind), ROWS)}"
            )
    return rows


def _check_body(name: str, stage: Stage, outside: Sequence[str]) -> None:
    """Finds mistakes in the body of rounds before anything runs."""
    assert isinstance(stage, RoundsStage)
    where = f"stage {name!r}"
    if not isinstance(stage.body, dict) or not stage.body:
        raise UsageError(f"{where}: body is {stage.body!r}; write stages by name, as those of a pipeline")
    for inner, written in stage.body.items():
        if inner in outside:
            raise UsageError(f"{where}: its body has a stage {inner!r}, and so has the pipeline: rename one of them")
        if isinstance(written, dict) and written.get("kind") == "rounds":
            raise UsageError(f"{where}: its body has rounds of its own, {inner!r}: write them as a stage after it")
    try:
        body_of(stage, number=1, earlier=[stage.model], seed=0, run_dir="body")
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def body_of(
    stage: RoundsStage,
    *,
    number: int,
    earlier: Sequence[str],
    seed: int,
    run_dir: str | Path,
    step: float = 1.0,
    before: Before | None = None,
) -> Pipeline:
    """Returns the stages of one round as a pipeline.

    Args:
        stage: the rounds.
        number: of the round, from 1: ``${round.number}``.
        earlier: models that were accepted so far: ``${round.earlier}``; the last one is ``${round.model}``.
        seed: of its stages without their own.
        run_dir: its folder.
        step: factor of the learning rates of its fit stages.
        before: the rounds whose rows come back in stages with replay; by default none.

    Raises:
        UsageError: a mistake in the body.
    """
    values = {"stages": stage.body, "run_dir": str(run_dir), "seed": seed}
    now = {"number": number, "model": earlier[-1], "earlier": list(earlier)}
    config = OmegaConf.create({**stage.written, **values, "round": now})
    assert isinstance(config, DictConfig)
    stages, _ = _stages(config, stage.body)
    if step != 1:
        stages = {
            name: _smaller(inner, step) if isinstance(inner, FitStage) else inner for name, inner in stages.items()
        }
    stages = {name: _with_replay(name, inner, number, before or Before()) for name, inner in stages.items()}
    with_model = [name for name, inner in stages.items() if "model" in inner.outputs]
    if stage.result not in (None, *with_model):
        raise UsageError(f"result is {stage.result!r}; it must be a stage of the body with a model: {with_model}")
    if not with_model:
        raise UsageError(f"no stage of the body has a model: add one that trains, to {', '.join(stages)}")
    written: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return Pipeline(
        title=f"Round {number}",
        run_dir=Path(run_dir),
        seed=seed,
        threads=stage.written.get("threads"),
        dtype=_dtype(stage.written.get("dtype", "float32")),
        stages=stages,
        evaluation=None,
        compare=[],
        source=written,
    )


def _with_replay(name: str, stage: Stage, number: int, before: Before) -> Stage:
    """Gives a stage with replay the number of its round, and the buffer of the one before."""
    if not isinstance(stage, RowStage) or not isinstance(stage.replay, dict):
        return stage
    for key in ("round", "rows"):
        if key in stage.replay:
            raise UsageError(f"stage {name!r}: replay.{key} is {stage.replay[key]!r}, and rounds give it: leave it out")
    folder = before.finished if stage.replay.get("rejected") else before.accepted
    rows = None if folder is None else str(folder / name / REPLAY["replay"])
    return dataclasses.replace(stage, replay=stage.replay | {"round": number, "rows": rows})


def _smaller(stage: FitStage, step: float) -> FitStage:
    """Multiplies the learning rate of a stage that has one of its own."""
    options = stage.model.get("init_args") or {}
    optimizer = options.get("optimizer") or {}
    arguments = optimizer.get("init_args") or {}
    if "lr" not in arguments:
        return stage
    changed = optimizer | {"init_args": arguments | {"lr": step * float(arguments["lr"])}}
    return dataclasses.replace(stage, model=stage.model | {"init_args": options | {"optimizer": changed}})


def _dtype(value: Any) -> str:
    if value not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {value!r}; it must be float32, bfloat16 or float16")
    return str(value)
