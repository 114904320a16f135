"""Checks of a model by classifiers that are trained on pairs of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..evaluation.answers import read_prompts
from ..inference import Engine, SamplingParams, derive_seed
from ..inference.answering import ask_examples
from ..metrics.intervals import wilson_interval
from ..sequences import Example
from ..utils.option_groups import OptionGroup
from .corruption import CORRUPTIONS, Corruption, corrupted_twin
from .findings import Finding, at_most, check_share
from .pair_classifier import LabelledPair, PairClassifierOptions, TrainedPairClassifier, readable, train_pair_classifier


@dataclass(frozen=True, kw_only=True)
class _TrainedCheck(OptionGroup):
    """A check by a classifier that is trained on pairs of completions.

    Args:
        model: folder or hub id of the causal language model that the classifier starts from.
        references: a source of ``PromptDataModule`` whose rows also have a good completion.
        column: of the completion.
        limit: rows to read; all by default.
        sampling: settings of ``SamplingParams`` of the model's completions, without a seed.
        classifier: options of ``PairClassifierOptions``.
    """

    group: ClassVar[str] = "check"

    model: str
    references: Any
    column: str = "completion"
    limit: int | None = None
    sampling: Any = field(default_factory=dict)
    classifier: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        PairClassifierOptions(**self.classifier)
        SamplingParams(**self.sampling)

    def rows(self, engine: Engine) -> list[tuple[Example, str]]:
        """Reads the prompts and their references."""
        tokenizer: Any = getattr(engine, "tokenizer", None)
        examples = read_prompts(self.references, tokenizer, limit=self.limit)
        found = [(e, e.fields[self.column]) for e in examples if isinstance(e.fields.get(self.column), str)]
        if not found:
            have = ", ".join(sorted(examples[0].fields)) if examples else "no rows"
            raise ValueError(f"references have no column {self.column!r} with a text: they have {have}; set column")
        return found

    def completions(self, engine: Engine, examples: Sequence[Example], seed: int) -> list[str]:
        """Samples the model's completions of prompts."""
        settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 256} | dict(self.sampling)
        params = SamplingParams(**settings)
        seeds = [[derive_seed(seed, n, 0)] for n in range(len(examples))]
        groups = ask_examples(engine, examples, 1, params, seeds=seeds)
        return [group[0].text for group in groups]


@dataclass(frozen=True, kw_only=True)
class Discriminator(_TrainedCheck):
    """Checks that a classifier cannot tell the model's completions from references too well.

    As in SPIN and in generative adversarial training, but only to measure: a model that has drifted, or that hacks a
    reward, writes texts that are easily told apart. 50 % is chance.

    Args:
        max_accuracy: on held-out prompts, in [0.5, 1].
    """

    max_accuracy: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("max_accuracy", self.max_accuracy, least=0.5)

    def run(self, engine: Engine, seed: int) -> Finding:
        """Trains the discriminator on completions of the model and references."""
        rows = self.rows(engine)
        texts = self.completions(engine, [example for example, _ in rows], seed)
        pairs = [LabelledPair(e.fields["prompt"], ref, text) for (e, ref), text in zip(rows, texts, strict=True)]
        same = sum(pair.first == pair.second for pair in pairs)
        if same == len(pairs):
            detail = "all completions are equal to their references"
            return Finding("discriminator", 0.5, 0.5, 0.5, self.max_accuracy, True, detail)
        trained = train_pair_classifier(self.model, pairs, PairClassifierOptions(**self.classifier))
        found = trained.accuracy
        detail = (
            f"a discriminator tells {found.value:.1%} [{found.low:.1%}, {found.high:.1%}] of {len(trained.scores)} "
        )
        detail += f"held-out completions from references; at most {self.max_accuracy:.1%} is allowed"
        by_gap = sorted(zip(trained.scores, trained.held_out, strict=True), key=lambda e: e[0][1] - e[0][0])
        return at_most("discriminator", found, self.max_accuracy, detail, [pair.second for _, pair in by_gap])


@dataclass(frozen=True, kw_only=True)
class FlawDetector(_TrainedCheck):
    """Checks that a detector of flaws finds few in the model's completions.

    The detector learns to score references above their corrupted twins (``corrupted_twin``). A completion is flagged
    if it scores below 95 % of the held-out references, is empty, or is longer than the model's positions. A detector
    that finds no held-out twins says nothing, and the check passes.

    Args:
        corruptions: allowed kinds of change.
        separator: what steps end with.
        max_flagged: share of flagged completions that is allowed, in [0, 1]; 5 % of sound ones are flagged.
        min_detection: accuracy on held-out twins from which the detector is believed, in [0.5, 1].
    """

    corruptions: tuple[Corruption, ...] = CORRUPTIONS
    separator: str = "\n"
    max_flagged: float = 0.2
    min_detection: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("max_flagged", self.max_flagged)
        check_share("min_detection", self.min_detection, least=0.5)
        corrupted_twin("1", 0, self.corruptions)

    def run(self, engine: Engine, seed: int) -> Finding:
        """Trains the detector on twins, and scores the model's completions of held-out prompts."""
        rows = self.rows(engine)
        twins = [corrupted_twin(reference, seed, self.corruptions, self.separator) for _, reference in rows]
        pairs = [
            LabelledPair(e.fields["prompt"], ref, twin) for (e, ref), twin in zip(rows, twins, strict=True) if twin
        ]
        detector = train_pair_classifier(self.model, pairs, PairClassifierOptions(**self.classifier))
        if detector.accuracy.value < self.min_detection:
            detail = (
                f"not measured: the detector finds {detector.accuracy.value:.1%} of held-out corrupted twins, below "
            )
            detail += f"min_detection={self.min_detection}; give more references or epochs"
            return Finding("flaw detector", math.nan, 0.0, 1.0, self.max_flagged, True, detail)
        return self._flagged(detector, [example for example, _ in rows], engine, seed)

    def _flagged(
        self, detector: TrainedPairClassifier, examples: Sequence[Example], engine: Engine, seed: int
    ) -> Finding:
        unseen = {repr(pair.prompt) for pair in detector.held_out}
        held_out = [example for example in examples if repr(example.fields["prompt"]) in unseen]
        texts = self.completions(engine, held_out, seed)
        sound = sorted(first for first, _ in detector.scores)
        threshold = sound[int(0.05 * len(sound))]
        prompts = [example.fields["prompt"] for example in held_out]
        trees = [readable(detector.model, *pair) for pair in zip(prompts, texts, strict=True)]
        values, _ = detector.model.summarized(detector.model.score_trees([tree for tree in trees if tree is not None]))
        # An empty solution is left out, and one beyond the model's positions has no end.
        given = iter(values)
        scores = [-math.inf if tree is None else next(given) for tree in trees]
        flagged = [text for text, score in zip(texts, scores, strict=True) if score < threshold]
        found = wilson_interval(len(flagged), len(texts))
        detail = (
            f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}] of the completions look corrupted to a detector "
        )
        detail += (
            f"that finds {detector.accuracy.value:.1%} of held-out twins; at most {self.max_flagged:.1%} is allowed"
        )
        return at_most("flaw detector", found, self.max_flagged, detail, flagged)
