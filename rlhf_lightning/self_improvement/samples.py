"""Scored samples of prompts: what row makers read, and where each row comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.answers import answer_prompts
from ..inference import Completion, Engine, SamplingParams, derive_seed
from ..inference.policies import PolicySpec, combination, policy_models
from ..sequences import Example
from ..utils.files import content_hash
from ..utils.validation import check_count

Scorer = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Sample:
    """A completion with its score.

    Args:
        text: the completion.
        score: of a verifier, a reward model or a judge; ``None`` without a verdict.
        seed: that it was drawn with.
        ended: whether it ended before the limit of tokens.
        model: hash of the model that drew it, where its prompt's samples are of several.
        passage: the thought before it with its marks, if the model closed one itself.

    Example:
        >>> Sample("4", 1.0).usable, Sample("4", None).usable
        (True, False)
    """

    text: str
    score: float | None
    seed: int = 0
    ended: bool = True
    model: str = ""
    passage: str = ""

    @property
    def usable(self) -> bool:
        """Whether a row may be made of it: it ended, is not empty, and has a finite score."""
        return self.ended and bool(self.text) and self.score is not None and math.isfinite(self.score)

    @property
    def provenance(self) -> dict[str, Any]:
        """Its seed, its score, and its model if it has one of its own, for a row made of it."""
        return {"seed": self.seed, "score": self.score} | ({"model": self.model} if self.model else {})


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt and a model's samples for it.

    Args:
        prompt: a text or messages.
        samples: in the order in which they were drawn.
        columns: the row's other columns, which rows made of it keep.
        row_id: of the prompt's row.
        model: hash of the model that drew the samples, unless they have models of their own.

    Example:
        >>> ScoredPrompt("2+2=", (Sample("4", 1.0), Sample("5", 0.0))).pass_rate(0.5)
        0.5
    """

    prompt: Any
    samples: tuple[Sample, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    row_id: str = ""
    model: str = ""

    @property
    def usable(self) -> list[Sample]:
        """Samples that rows may be made of."""
        return [sample for sample in self.samples if sample.usable]

    @property
    def origin(self) -> dict[str, Any]:
        """The row and the model, for a row made of it."""
        return {"row_id": self.row_id, "model": self.model}

    def pass_rate(self, success: float) -> float | None:
        """Returns the share of judged samples with a score of at least ``success``; ``None`` if nothing was judged."""
        scores = [sample.score for sample in self.samples if sample.score is not None]
        return sum(score >= success for score in scores) / len(scores) if scores else None


def check_samples(
    num_samples: int, sampling: SamplingParams, rows: Sequence[str] = (), *, strategy: Any = None
) -> None:
    """Refuses samples that no row could be made of, before anything is sampled.

    Args:
        num_samples: of each prompt.
        sampling: the settings.
        rows: kinds of rows that are made of one model's samples.
        strategy: that searches for each sample, and may draw in ways of its own; ``None`` for none.

    Raises:
        ValueError: less than one sample, several at temperature 0, or one for pairs.

    Example:
        >>> check_samples(4, SamplingParams(temperature=0.0))
        Traceback (most recent call last):
        ValueError: num_samples is 4 at sampling.temperature 0, where all are equal: use a temperature above 0
    """
    check_count("num_samples", num_samples, "4 is usual")
    if num_samples > 1 and sampling.greedy and strategy is None:
        raise ValueError(
            f"num_samples is {num_samples} at sampling.temperature 0, where all are equal: use a temperature above 0"
        )
    if num_samples == 1 and "pairs" in rows:
        raise ValueError("num_samples is 1, and a pair is made of two samples of a prompt: draw at least 2")


def sample_prompts(
    engine: Engine,
    examples: Sequence[Example],
    scorer: Scorer,
    *,
    num_samples: int,
    sampling: SamplingParams,
    seed: int = 0,
    first: int = 0,
    numbers: Sequence[int] | None = None,
    model: str = "",
) -> list[ScoredPrompt]:
    """Samples and scores completions of prompts.

    Args:
        engine: samples completions of token ids.
        examples: prompts, as of ``evaluation.answers.read_prompts``.
        scorer: called as ``fn(prompts, completions, **columns)``: a verifier, a learned reward or a judge.
        num_samples: per prompt, at least 1.
        sampling: the settings, without a seed.
        seed: a sample is a function of this, the number of its prompt and its own.
        first: number of the first prompt; the others follow.
        numbers: of all prompts, instead.
        model: hash of the model, for the rows' provenance; see ``model_hash``.

    Raises:
        ValueError: ``num_samples`` below 1, or scores that are not one number or ``None`` each.
    """
    check_count("num_samples", num_samples, "8 is usual")
    places = range(first, first + len(examples)) if numbers is None else numbers
    seeds = [[derive_seed(seed, n, s) for s in range(num_samples)] for n in places]
    groups = answer_prompts(engine, examples, scorer, num_samples=num_samples, sampling=sampling, seeds=seeds)
    found = []
    for group, drawn in zip(groups, seeds, strict=True):
        samples = tuple(
            Sample(
                answer.completion.text,
                answer.reward,
                number,
                answer.completion.finish_reason == "stop",
                passage=passage_of(answer.completion),
            )
            for answer, number in zip(group, drawn, strict=True)
        )
        fields = dict(group[0].example.fields)
        found.append(ScoredPrompt(fields.pop("prompt"), samples, fields, group[0].example.row_id, model))
    return found


def passage_of(completion: Completion) -> str:
    """Returns the thought before a completion with its marks; empty without one that the model has closed itself."""
    thought = completion.thought
    return thought.passage if thought is not None and thought.closed else ""


def model_hash(model: Path | PolicySpec) -> str:
    """Returns the content hash of a model's folder, or the name of one that is no folder; of an ensemble all of these.

    Example:
        >>> model_hash("no-such/model")
        'no-such/model'
    """
    if not isinstance(model, str | Path):
        return ", ".join([" + ".join(map(model_hash, policy_models(model))), *combination(model)])
    return content_hash(Path(model).expanduser()) or str(model)
