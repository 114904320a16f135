"""Generate, critique, refine: a model revises its own answers, and drafts with different scores become pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.answers import read_prompts
from ..inference import Engine, SamplingParams, derive_seed
from ..inference.answering import ask_examples, policy_of
from ..rewards.exact_answer import check_verdicts
from ..sequences import Example
from ..utils.validation import check_count
from .samples import Sample, ScoredPrompt, Scorer, passage_of, sample_prompts
from .templates import asked_like, check_places, fill, last_words

CRITIQUE = """\
Request:
{prompt}

Answer:
{answer}

{principle}
Find what is wrong or weak in the answer. Be specific."""
REVISION = """\
Request:
{prompt}

Answer:
{answer}

Critique:
{critique}

Write a better answer to the request, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Settings of refinement, as in Self-Refine (Madaan et al., 2023, arXiv:2303.17651).

    With principles, the critiques are those of Constitutional AI (Bai et al., 2022, arXiv:2212.08073): revision ``n``
    is asked for by principle ``n``, from the first again after the last.

    Args:
        critique: what is asked about a draft, with the places ``{prompt}`` and ``{answer}``, and ``{principle}``.
        revision: what is asked for a new draft, with ``{prompt}``, ``{answer}``, ``{critique}``, and ``{principle}``.
        principles: sentences that critiques are about; without any, ``{principle}`` is empty.
        revisions: largest number of revisions of a draft, at least 1.
        threshold: a draft with this score is not revised; by default all are.

    Raises:
        ValueError: a template without one of its places, or a number out of its range.

    Example:
        >>> Refine(critique="{prompt} {answer}: wrong?", revision="{prompt} {answer} {critique} Better:").revisions
        2
    """

    critique: str = CRITIQUE
    revision: str = REVISION
    principles: list[str] = field(default_factory=list)
    revisions: int = 2
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_places("critique", self.critique, ("prompt", "answer"), ("principle",))
        check_places("revision", self.revision, ("prompt", "answer", "critique"), ("principle",))
        check_count("revisions", self.revisions, "2 is usual")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be finite (null revises every draft)")

    def principle(self, revision: int) -> str:
        """Returns the principle of a revision; the first revision is 0."""
        return self.principles[revision % len(self.principles)] if self.principles else ""


@dataclass(frozen=True)
class Refinement:
    """The drafts of a prompt.

    Args:
        drafts: the prompt with its drafts as samples, the first answer first; row makers read it.
        critiques: one for each revision.
    """

    drafts: ScoredPrompt
    critiques: tuple[str, ...] = ()

    @property
    def last(self) -> Sample:
        """The last draft."""
        return self.drafts.samples[-1]

    @property
    def best(self) -> Sample | None:
        """The draft with the highest score, the first of equals; ``None`` if no draft is usable."""
        return max(self.drafts.usable, key=lambda sample: sample.score or 0.0, default=None)


def refine(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scorer: Scorer,
    settings: Refine,
    *,
    sampling: SamplingParams,
    seed: int = 0,
    first: int = 0,
    model: str = "",
) -> list[Refinement]:
    """Answers prompts, and revises answers by critiques until they reach a score.

    Every draft is scored as an answer to the prompt itself. A draft, its critique and its revision are functions of
    ``seed``, the number of the prompt and that of the revision, not of other prompts.

    Args:
        engine: writes drafts, critiques and revisions; of a strategy, searches for drafts and revisions, whose
            scorer reads the rows' other columns, and its policy writes critiques.
        tokenizer: the engine's.
        examples: prompts, as of ``evaluation.answers.read_prompts``.
        scorer: called as ``fn(prompts, completions, **columns)``.
        settings: templates, number of revisions, threshold.
        sampling: of drafts, critiques and revisions.
        seed: of all samples.
        first: number of the first prompt.
        model: hash of the model, for the rows' provenance.
    """
    drawn = sample_prompts(
        engine, examples, scorer, num_samples=1, sampling=sampling, seed=seed, first=first, model=model
    )
    found = [Refinement(drafts) for drafts in drawn]
    for revision in range(settings.revisions):
        # Once a draft is good enough its prompt stays as it is.
        open_ones = [n for n, one in enumerate(found) if not _is_good(one.last, settings.threshold)]
        if not open_ones:
            break
        seeds = {kind: [derive_seed(seed, first + n, kind, revision) for n in open_ones] for kind in ("critique", "")}
        principle = settings.principle(revision)
        asked = [_values(found[n], principle) for n in open_ones]
        requests = [fill(settings.critique, values) for values in asked]
        critiques = _ask(
            policy_of(engine), tokenizer, [found[n] for n in open_ones], requests, sampling, seeds["critique"]
        )
        requests = [
            fill(settings.revision, values | {"critique": critique.text})
            for values, critique in zip(asked, critiques, strict=True)
        ]
        revised = _ask(engine, tokenizer, [found[n] for n in open_ones], requests, sampling, seeds[""])
        scores = _scores(scorer, [found[n].drafts for n in open_ones], [sample.text for sample in revised])
        for n, critique, draft, score in zip(open_ones, critiques, revised, scores, strict=True):
            found[n] = _with_draft(found[n], critique.text, replace(draft, score=score))
    return found


def _is_good(draft: Sample, threshold: float | None) -> bool:
    return threshold is not None and draft.usable and draft.score is not None and draft.score >= threshold


def _values(refinement: Refinement, principle: str) -> dict[str, Any]:
    prompt = last_words(refinement.drafts.prompt)
    return {"prompt": prompt, "answer": refinement.last.text, "principle": principle}


def _with_draft(before: Refinement, critique: str, draft: Sample) -> Refinement:
    drafts = replace(before.drafts, samples=(*before.drafts.samples, draft))
    return Refinement(drafts, (*before.critiques, critique))


def _ask(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    refinements: Sequence[Refinement],
    requests: Sequence[str],
    sampling: SamplingParams,
    seeds: Sequence[int],
) -> list[Sample]:
    """Samples one answer to each request, put like the prompt that it is about."""
    rows = [
        {**one.drafts.columns, "prompt": asked_like(one.drafts.prompt, text)}
        for one, text in zip(refinements, requests, strict=True)
    ]
    examples = read_prompts(rows, tokenizer)
    groups = ask_examples(engine, examples, 1, sampling, seeds=[[number] for number in seeds])
    return [
        Sample(group[0].text, None, number, group[0].finish_reason == "stop", passage=passage_of(group[0]))
        for group, number in zip(groups, seeds, strict=True)
    ]


def _scores(scorer: Scorer, prompts: Sequence[ScoredPrompt], texts: Sequence[str]) -> list[float | None]:
    names = sorted({name for scored in prompts for name in scored.columns})
    columns = {name: [scored.columns.get(name) for scored in prompts] for name in names}
    return check_verdicts(scorer([scored.prompt for scored in prompts], list(texts), **columns), len(texts))
