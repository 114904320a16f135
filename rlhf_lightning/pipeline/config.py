"""Reads and checks a pipeline's YAML: its stages in order, with their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..generation import GenerateOptions
from ..generation.compress import CompressOptions
from ..generation.options import sampling_params
from ..merging.methods import METHODS
from ..merging.options import MergeOptions
from ..utils import yaml_parser
from ..utils.messages import UsageError, did_you_mean, one_line
from ..utils.packaged_configs import nearest_config, packaged_config

_EXACT = "rlhf_lightning.rewards.exact_answer"
T = TypeVar("T")


@dataclass(frozen=True)
class Export:
    """Selects the exported model of a fit stage: the last, or the best by a validation metric."""

    monitor: str | None = None
    mode: Literal["max", "min"] | None = None
    merge_adapter: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Tests every exported model by greedy completions of the test prompts."""

    prompts: str | list[str]
    verifier: str = _EXACT
    max_new_tokens: int = 256
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    samples: int = 8  # shown in the report


@dataclass(frozen=True)
class FitStage:
    """Training: config files of ``rlhf-lightning fit``, and overrides."""

    outputs: ClassVar[dict[str, str]] = {"model": "model"}

    kind: Literal["fit"] = "fit"
    config: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    export: Export = field(default_factory=Export)
    evaluate: bool = True


@dataclass(frozen=True)
class SampleStage:
    """Samples and verifies completions, and makes a preference pair of each prompt with a better and a worse one.

    A list of models samples as one: ``ensemble`` has options of ``merging.EnsemblePolicy``. With ``server``, options of
    ``inference.RemoteEngine``, completions come from there, and only the tokenizer of ``model`` is read.
    """

    outputs: ClassVar[dict[str, str]] = {"pairs": "pairs.jsonl"}

    model: str | list[str]
    prompts: str | list[str]
    kind: Literal["sample"] = "sample"
    verifier: str = _EXACT
    num_samples: int = 4
    sampling: dict[str, Any] = field(default_factory=dict)
    ensemble: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_pairs: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateStage(GenerateOptions):
    """Answers prompts as ``rlhf-lightning generate`` does, with the same options; ``dtype: auto`` is the pipeline's."""

    outputs: ClassVar[dict[str, str]] = {"rows": "generated.jsonl"}

    kind: Literal["generate"] = "generate"
    seed: int | None = None  # type: ignore[assignment]

    def options(self, folder: Path, seed: int, dtype: str) -> GenerateOptions:
        """Returns the options of the function that does the work.

        Args:
            folder: of the stage.
            seed: of all samples.
            dtype: of the weights, unless the stage has its own.
        """
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(GenerateOptions)}
        place = str(folder / self.outputs["rows"])
        return GenerateOptions(
            **{**given, "output": place, "seed": seed, "dtype": dtype if self.dtype == "auto" else self.dtype}
        )


@dataclass(frozen=True, kw_only=True)
class MergeStage(MergeOptions):
    """Merges models as ``rlhf-lightning merge`` does, with the same options; ``seed`` is the pipeline's by default."""

    outputs: ClassVar[dict[str, str]] = {"model": "model"}

    output: str = ""
    kind: Literal["merge"] = "merge"
    evaluate: bool = True

    def options(self, folder: Path, seed: int) -> MergeOptions:
        """Returns the options of the merge.

        Args:
            folder: of the stage.
            seed: of random masks, for methods that draw some.
        """
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(MergeOptions)}
        draws = self.method in METHODS and "seed" in {
            option.name for option in dataclasses.fields(METHODS[self.method])
        }
        place = str(folder / self.outputs["model"])
        return MergeOptions(**{**given, "output": place, "seed": seed if draws else self.seed})


@dataclass(frozen=True, kw_only=True)
class CompressStage(CompressOptions):
    """Compresses contexts and answers prompts as ``rlhf-lightning compress`` does, with the same options.

    ``dtype: auto`` is the pipeline's.
    """

    outputs: ClassVar[dict[str, str]] = {"rows": "compressed.jsonl"}

    kind: Literal["compress"] = "compress"
    seed: int | None = None  # type: ignore[assignment]

    def options(self, folder: Path, seed: int, dtype: str) -> CompressOptions:
        """Returns the options of the function that does the work.

        Args:
            folder: of the stage.
            seed: of all answers.
            dtype: of the weights, unless the stage has its own.
        """
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(CompressOptions)}
        place = str(folder / self.outputs["rows"])
        return CompressOptions(
            **{**given, "output": place, "seed": seed, "dtype": dtype if self.dtype == "auto" else self.dtype}
        )


Stage = FitStage | SampleStage | GenerateStage | MergeStage | CompressStage
_KINDS: dict[str, type[Stage]] = {
    "fit": FitStage,
    "sample": SampleStage,
    "generate": GenerateStage,
    "merge": MergeStage,
    "compress": CompressStage,
}
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

    # References such as ${outputs.sft.model} are resolved against the stages' places.
    config.outputs = {name: _outputs(config.run_dir, name, written) for name, written in source["stages"].items()}
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    stages = {name: _stage(name, written) for name, written in resolved["stages"].items()}
    evaluation = resolved.get("evaluation")
    compare = [_build(Comparison, item, "compare") for item in resolved.get("compare") or []]
    for name in (name for item in compare for name in item.stages):
        if name not in stages and name not in not_chosen:
            raise UsageError(f"compare names the stage {name!r}, which there is not{did_you_mean(name, stages)}")

    # A figure shows the stages of this run, and needs at least two.
    compare = [dataclasses.replace(item, stages=[n for n in item.stages if n in stages]) for item in compare]
    return Pipeline(
        title=str(resolved.get("title") or "Pipeline"),
        run_dir=Path(resolved["run_dir"]),
        seed=_whole("seed", resolved.get("seed", 0), 0),
        threads=None if resolved.get("threads") is None else _whole("threads", resolved["threads"], 1),
        dtype=_dtype(resolved.get("dtype", "float32")),
        stages=stages,
        evaluation=_build(Evaluation, evaluation, "evaluation") if evaluation else None,
        compare=[item for item in compare if len(item.stages) > 1],
        source=source,
    )


def _outputs(run_dir: str, name: str, written: Any) -> dict[str, str]:
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind not in _KINDS:
        *others, last = _KINDS
        raise UsageError(f"stage {name!r} is of kind {kind!r}; write kind: {', '.join(others)} or {last}")
    return {key: str(Path(run_dir) / name / place) for key, place in _KINDS[kind].outputs.items()}


def _stage(name: str, written: dict[str, Any]) -> Stage:
    where = f"stage {name!r}"
    if not name.isidentifier() and not name.replace("-", "_").isidentifier():
        raise UsageError(f"{where}: a name has letters, digits, - and _, and is that of a folder")
    if written["kind"] == "sample":
        return _build(SampleStage, written, where)
    if written["kind"] == "generate":
        return _sampling_stage(GenerateStage, written, where)
    if written["kind"] == "compress":
        return _sampling_stage(CompressStage, written, where)
    if written["kind"] == "merge":
        if "output" in written:
            raise UsageError(f"{where}: output is {written['output']!r}, and the stage names it itself: leave it out")
        return _build(MergeStage, written, where)
    config = written.get("config") or []
    export = _build(Export, written.get("export") or {}, f"{where}, export")
    return _build(
        FitStage, written | {"config": [config] if isinstance(config, str) else config, "export": export}, where
    )


def _sampling_stage(cls: type[T], written: dict[str, Any], where: str) -> T:
    if "output" in written:
        raise UsageError(f"{where}: output is {written['output']!r}, and the stage names it itself: leave it out")
    given = written.get("sampling")
    if not given:  # the command's own
        return _build(cls, {name: value for name, value in written.items() if name != "sampling"}, where)
    try:
        sampling = sampling_params(given)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return _build(cls, written | {"sampling": sampling}, where)


def _build(cls: type[T], written: Any, where: str) -> T:
    """Makes a dataclass of a mapping.

    Raises:
        UsageError: naming an unknown or missing key.
    """
    if not isinstance(written, Mapping):
        raise UsageError(f"{where} is {written!r}: write a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in written:
        if key not in fields:
            raise UsageError(f"{where} has no key {key!r}{did_you_mean(str(key), fields)}")
    # Required keys, and lists and mappings by their kind; the other types are checked where they are used.
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and written.get(key) is None:
            raise UsageError(f"{where} needs {key!r}")
        if isinstance(f.default_factory, type) and key in written and not isinstance(written[key], f.default_factory):
            raise UsageError(f"{where}: {key} is {written[key]!r}; it must be a {f.default_factory.__name__}")
    return cls(**written)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value


def _dtype(value: Any) -> str:
    if value not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype is {value!r}; it must be float32, bfloat16 or float16")
    return str(value)
