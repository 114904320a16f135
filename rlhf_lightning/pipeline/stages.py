"""Kinds of stages: their options, and what each writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ..generation import GenerateOptions
from ..generation.compress import CompressOptions
from ..inference.policies import PolicySpec
from ..labeling.command import LabelOptions
from ..merging.methods import METHODS
from ..merging.options import MergeOptions
from ..self_improvement.challenger import CHALLENGE
from ..self_improvement.refine import CRITIQUE, REVISION, Refine
from ..self_improvement.row_options import KINDS_OF_ROWS, RowOptions
from ..self_improvement.self_play import Weighting

T = TypeVar("T")

EXACT = "rlhf_lightning.rewards.exact_answer"
# Kinds of rows that stages write, with their files; and rows that are kept for the same stage of the next round.
ROWS = {kind: f"{kind}.jsonl" for kind in KINDS_OF_ROWS}
REPLAY = {"replay": "replay.jsonl"}
MODEL = {"model": "model"}


def _options(stage: Any, cls: type[T], **own: Any) -> T:
    """Makes a command's options from the fields that a stage repeats, and from its own."""
    given = {option.name: getattr(stage, option.name) for option in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{**given, **own})


@dataclass(frozen=True)
class Export:
    """Selects the exported model of a fit stage: the last, or the best by a validation metric."""

    monitor: str | None = None
    mode: Literal["max", "min"] | None = None
    merge_adapter: bool = False


@dataclass(frozen=True)
class FitStage:
    """Training: config files of ``rlhf-lightning fit``, and overrides."""

    outputs: ClassVar[Mapping[str, str]] = MODEL

    kind: Literal["fit"] = "fit"
    config: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    export: Export = field(default_factory=Export)
    evaluate: bool = True


@dataclass(frozen=True, kw_only=True)
class RowStage(RowOptions):
    """Writes rows of each kind in ``rows`` into a file of its name."""

    @property
    def outputs(self) -> dict[str, str]:
        """Files of the kinds of rows that are written, and of rows for the next round."""
        return {name: ROWS[name] for name in self.rows} | ({} if self.replay is None else REPLAY)


@dataclass(frozen=True, kw_only=True)
class PromptStage:
    """Reads prompts, a source of ``PromptDataModule``; ``columns`` has names of its columns: ``{prompt: question}``."""

    prompts: str | list[str]
    columns: dict[str, str] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleStage(RowStage, PromptStage):
    """Samples and scores completions, and makes rows of them.

    ``model`` may be several that sample as one, as in ``inference.policies.policy_spec``, in every stage that samples.
    With ``server``, options of ``inference.RemoteEngine``, completions come from there, and only the tokenizer of
    ``model`` is read. ``verifier`` is any reward function: a dotted path, or ``class_path`` and ``init_args``, such as
    a reward model or a judge. With ``strategy``, as in ``inference.build_strategy``, each sample is the result of a
    search of its own. With ``hint``, prompts that no sample solved are sampled once more with a hint, for
    ``demonstrations`` alone (STaR).
    """

    model: PolicySpec
    kind: Literal["sample"] = "sample"
    verifier: str | dict[str, Any] = EXACT
    num_samples: int = 4
    sampling: dict[str, Any] = field(default_factory=dict)
    strategy: str | dict[str, Any] | None = None
    hint: str | None = None
    server: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RefineStage(RowStage, PromptStage):
    """Lets a model revise its answers by critiques, and makes rows of the drafts; see ``self_improvement.Refine``.

    With ``strategy``, as in ``inference.build_strategy``, drafts are the results of searches; critiques are sampled.
    """

    model: PolicySpec
    kind: Literal["refine"] = "refine"
    verifier: str | dict[str, Any] = EXACT
    critique: str = CRITIQUE
    revision: str = REVISION
    principles: list[str] = field(default_factory=list)
    revisions: int = 2
    good_enough: float | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    strategy: str | dict[str, Any] | None = None

    @property
    def settings(self) -> Refine:
        """The settings of refinement."""
        return Refine(
            critique=self.critique,
            revision=self.revision,
            principles=self.principles,
            revisions=self.revisions,
            threshold=self.good_enough,
        )


@dataclass(frozen=True, kw_only=True)
class ChallengeStage(PromptStage):
    """Lets a model write new prompts, and keeps what the solver, by default the same model, solves sometimes.

    ``prompts`` are its examples, ``writing`` samples the new ones, and ``sampling`` their solutions. Without a verifier
    a solution is right if it answers as most do (``self_improvement.agreement``), and rows have that ``answer``.
    """

    outputs: ClassVar[Mapping[str, str]] = {"prompts": "prompts.jsonl"}

    model: PolicySpec
    kind: Literal["challenge"] = "challenge"
    number: int = 64
    num_examples: int = 4
    template: str = CHALLENGE
    max_overlap: float = 0.7
    writing: dict[str, Any] = field(default_factory=dict)
    solver: PolicySpec | None = None
    verifier: str | dict[str, Any] | None = None
    num_samples: int = 4
    sampling: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.5
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SelfPlayStage(RowStage, PromptStage):
    """Lets a model and its opponents answer the same prompts, and makes rows of the answers of both.

    All players answer the first ``trial`` prompts: ``league.json`` gets their Elo ratings, and win rates, from which an
    opponent is drawn for each further prompt; see ``self_improvement.league_weights``.
    """

    league: ClassVar[str] = "league.json"

    model: PolicySpec
    opponents: list[Any]
    kind: Literal["self-play"] = "self-play"
    verifier: str | dict[str, Any] = EXACT
    num_samples: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    trial: int = 64
    weighting: Weighting = "hard"
    power: float = 2.0
    floor: float = 0.1
    k: float = 32.0

    @property
    def outputs(self) -> dict[str, str]:
        """Files of the kinds of rows that are written, and the table of the league."""
        return super().outputs | {"league": self.league}


@dataclass(frozen=True, kw_only=True)
class GenerateStage(GenerateOptions):
    """Answers prompts as ``rlhf-lightning generate`` does, with the same options; ``dtype: auto`` is the pipeline's."""

    outputs: ClassVar[Mapping[str, str]] = {"rows": "generated.jsonl"}

    kind: Literal["generate"] = "generate"
    seed: int | None = None  # type: ignore[assignment]

    def options(self, folder: Path, seed: int, dtype: str) -> GenerateOptions:
        """Returns the options of the function that does the work.

        Args:
            folder: of the stage.
            seed: of all samples.
            dtype: of the weights, unless the stage has its own.
        """
        dtype = dtype if self.dtype == "auto" else self.dtype
        return _options(self, GenerateOptions, output=str(folder / self.outputs["rows"]), seed=seed, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class CompressStage(CompressOptions):
    """Compresses contexts as ``rlhf-lightning compress`` does, with its options; ``dtype: auto`` is the pipeline's."""

    outputs: ClassVar[Mapping[str, str]] = {"rows": "compressed.jsonl"}

    kind: Literal["compress"] = "compress"
    seed: int | None = None  # type: ignore[assignment]

    def options(self, folder: Path, seed: int, dtype: str) -> CompressOptions:
        """Returns the options of the function that does the work.

        Args:
            folder: of the stage.
            seed: of all answers.
            dtype: of the weights, unless the stage has its own.
        """
        dtype = dtype if self.dtype == "auto" else self.dtype
        return _options(self, CompressOptions, output=str(folder / self.outputs["rows"]), seed=seed, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class LabelStage(LabelOptions):
    """Labels steps of solutions as ``rlhf-lightning label-steps`` does; ``dtype`` is the pipeline's by default."""

    outputs: ClassVar[Mapping[str, str]] = {"rows": "steps.jsonl"}

    output: str = ""
    kind: Literal["label-steps"] = "label-steps"
    seed: int | None = None  # type: ignore[assignment]
    dtype: Any = None

    def options(self, folder: Path, seed: int, dtype: str) -> LabelOptions:
        """Returns the options of the function that does the work.

        Args:
            folder: of the stage.
            seed: of all samples.
            dtype: of the weights, unless the stage has its own.
        """
        place = str(folder / self.outputs["rows"])
        return _options(self, LabelOptions, output=place, seed=seed, dtype=self.dtype or dtype)


@dataclass(frozen=True, kw_only=True)
class MergeStage(MergeOptions):
    """Merges models as ``rlhf-lightning merge`` does, with the same options; ``seed`` is the pipeline's by default."""

    outputs: ClassVar[Mapping[str, str]] = MODEL

    output: str = ""
    kind: Literal["merge"] = "merge"
    evaluate: bool = True

    def options(self, folder: Path, seed: int) -> MergeOptions:
        """Returns the options of the merge.

        Args:
            folder: of the stage.
            seed: of random masks, for methods that draw some.
        """
        draws = self.method in METHODS and "seed" in {
            option.name for option in dataclasses.fields(METHODS[self.method])
        }
        place = str(folder / self.outputs["model"])
        return _options(self, MergeOptions, output=place, seed=seed if draws else self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """Evaluates models on a suite as ``rlhf-lightning evaluate`` does, and compares them with the first."""

    outputs: ClassVar[Mapping[str, str]] = {"results": "evaluation/results.json", "page": "evaluation/report.html"}

    models: dict[str, Any]
    suite: str | dict[str, Any]
    kind: Literal["evaluate"] = "evaluate"
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class GateStage:
    """Passes on a model if a paired test on a suite accepts it, else the accepted one; ``criteria`` say when.

    Both models are folders, and ``criteria`` options of ``self_improvement.CapabilityCriteria``. ``validators`` are
    checks of ``self_improvement.AdversarialValidator``, which a model that the test accepts must pass as well.
    """

    outputs: ClassVar[Mapping[str, str]] = MODEL | {"decision": "decision.json"}

    model: str
    accepted: str
    suite: str | dict[str, Any]
    kind: Literal["gate"] = "gate"
    criteria: dict[str, Any] = field(default_factory=dict)
    validators: list[Any] = field(default_factory=list)
    seed: int | None = None
    evaluate: bool = True


@dataclass(frozen=True, kw_only=True)
class ExportStage:
    """Writes a model as a GGUF file, which is loaded again and compared before it counts as written."""

    outputs: ClassVar[Mapping[str, str]] = {"file": "model.gguf"}

    model: str
    kind: Literal["export"] = "export"
    type: str = "q8_0"
    check_prompts: list[str] = field(default_factory=list)
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoundsStage:
    """Repeats a body of stages, each round starting from the model that was accepted last.

    In the body, ``${round.model}`` is that model, ``${round.earlier}`` lists all that were accepted so far, the first
    model included, ``${round.number}`` counts from 1, and ``${outputs.NAME.model}`` is an output of a stage of this
    round, or of one outside. Each round has its own seed.

    Args:
        model: the first accepted model: a folder.
        body: stages by name.
        rounds: number of rounds, at least 1.
        result: stage of the body whose model is the round's; by default the last one with a model.
        suite: that the round's model and the accepted one answer; without one every round is accepted.
        criteria: options of ``self_improvement.CapabilityCriteria``: when a round is accepted, and what follows if not.
        validators: as those of a gate.
        written: the pipeline's configuration without its stages, for references in the body.
    """

    outputs: ClassVar[Mapping[str, str]] = MODEL | {"record": "rounds.jsonl", "models": "models.json"}

    model: str
    body: dict[str, Any]
    kind: Literal["rounds"] = "rounds"
    rounds: int = 3
    result: str | None = None
    suite: str | dict[str, Any] | None = None
    criteria: dict[str, Any] = field(default_factory=dict)
    validators: list[Any] = field(default_factory=list)
    seed: int | None = None
    evaluate: bool = True
    written: dict[str, Any] = field(default_factory=dict, repr=False)


Stage = (
    FitStage
    | SampleStage
    | RefineStage
    | ChallengeStage
    | SelfPlayStage
    | GenerateStage
    | CompressStage
    | LabelStage
    | MergeStage
    | EvaluateStage
    | GateStage
    | ExportStage
    | RoundsStage
)
KINDS: dict[str, type[Any]] = {
    "fit": FitStage,
    "sample": SampleStage,
    "refine": RefineStage,
    "challenge": ChallengeStage,
    "self-play": SelfPlayStage,
    "generate": GenerateStage,
    "compress": CompressStage,
    "label-steps": LabelStage,
    "merge": MergeStage,
    "evaluate": EvaluateStage,
    "gate": GateStage,
    "export": ExportStage,
    "rounds": RoundsStage,
}
# Stages whose model the pipeline's evaluation tests.
WITH_MODEL = (FitStage, MergeStage, GateStage, RoundsStage)


def outputs_of(written: Mapping[str, Any]) -> Mapping[str, str]:
    """Returns the outputs of a stage as it is written, by their names in references; its kind is known."""
    cls = KINDS[written["kind"]]
    if issubclass(cls, RowStage):
        rows = written.get("rows", ["pairs"])
        files = {name: ROWS[name] for name in ([rows] if isinstance(rows, str) else rows or ()) if name in ROWS}
        files |= REPLAY if written.get("replay") is not None else {}
        return files | ({"league": cls.league} if issubclass(cls, SelfPlayStage) else {})
    found: Mapping[str, str] = cls.outputs
    return found
