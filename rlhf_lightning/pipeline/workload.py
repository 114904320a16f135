"""The work of stages that sample, score, merge or export, as far as it is known before they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch

from ..evaluation import Suite, Task
from ..evaluation.row_tasks import RowTask
from ..inference import SamplingParams
from ..inference.cpu_linear import packed_bytes
from ..inference.policies import policy_models, policy_name
from ..models import load_tokenizer
from ..models.decoder_sizes import Decoder
from ..models.memory import cache_bytes
from ..planning.plan import decoder_of
from .rows_ahead import Sources
from .stages import (
    ChallengeStage,
    CompressStage,
    EvaluateStage,
    GateStage,
    GenerateStage,
    LabelStage,
    RefineStage,
    RoundsStage,
    SampleStage,
    SelfPlayStage,
)

# Prompts that a stage works on together, and tokens of cache that an engine holds at once.
_TOGETHER, _CACHED = 64, 65536


@dataclass(frozen=True)
class Samples:
    """Completions that one policy draws in a stage, and rows that it reads.

    Args:
        model: a policy.
        source: of its prompts.
        prompts: their number; ``None`` if the source is not there yet.
        each: completions of a prompt; 0 where rows are only read.
        tokens: of a completion, at most.
        what: the word for completions.
        at_most: whether there may be fewer.
        search: whether a search finds each completion, whose tokens are not known before.
        columns: new name of a column -> its name in the rows.
        dtype: of the weights, unless the pipeline's.
        at_once: prompts that are worked on together.
        cached: tokens of cache that the engine holds at once.
        cache: its kind.
    """

    model: Any
    source: Any
    prompts: int | None
    each: int
    tokens: int
    what: str = "samples"
    at_most: bool = False
    search: bool = False
    columns: Mapping[str, str] | None = None
    dtype: str | None = None
    at_once: int = _TOGETHER
    cached: int = _CACHED
    cache: str = "dynamic"

    @property
    def completions(self) -> int | None:
        """Number of completions."""
        return None if self.prompts is None else self.prompts * self.each


@singledispatch
def samples_of(stage: Any, sources: Sources) -> list[Samples]:
    """Lists what a stage samples, each part with the policy that draws it; nothing for other kinds."""
    return []


@samples_of.register
def _(stage: SampleStage, sources: Sources) -> list[Samples]:
    # A hint is for prompts that no sample solved: at most all.
    drawn = _drawn(stage, sources, stage.num_samples * (2 if stage.hint else 1))
    at_most = stage.hint is not None or stage.max_rows is not None
    return [replace(drawn, at_most=at_most)] if stage.server is None else []


@samples_of.register
def _(stage: RefineStage, sources: Sources) -> list[Samples]:
    # A critique before each revision.
    drafts = replace(_drawn(stage, sources, 1 + stage.revisions), what="drafts", at_most=True)
    return [drafts, replace(drafts, each=stage.revisions, what="critiques", search=False)]


@samples_of.register
def _(stage: ChallengeStage, sources: Sources) -> list[Samples]:
    writing = SamplingParams(**stage.writing).max_new_tokens
    solved = replace(_drawn(stage, sources, stage.num_samples), prompts=stage.number, at_most=True)
    written = replace(solved, each=1, tokens=writing, what="requests", at_most=False)
    return [written, replace(solved, model=stage.solver or stage.model)]


@samples_of.register
def _(stage: SelfPlayStage, sources: Sources) -> list[Samples]:
    # Every player answers the trial's prompts, and two players each of the others.
    own = replace(_drawn(stage, sources, stage.num_samples), at_most=stage.max_rows is not None)
    places = {policy_name(place): place for place in stage.opponents}.values()
    if own.prompts is None:
        return [own, *(replace(own, model=place) for place in places)]
    trial = min(stage.trial, own.prompts)
    opponents = [replace(own, model=place, prompts=trial) for place in places]
    rest = own.prompts - trial
    return [own, *opponents, *([replace(opponents[0], prompts=rest)] if rest else [])]


@samples_of.register
def _(stage: GenerateStage, sources: Sources) -> list[Samples]:
    if stage.server is not None:
        return []
    rows = 1 if stage.prompt is not None else limited(sources, stage.prompts, stage.limit)
    source = {"prompt": stage.prompt} if stage.prompt is not None else stage.prompts
    return [
        Samples(
            stage.model,
            source,
            rows,
            stage.num_samples,
            stage.sampling.max_new_tokens,
            search=stage.strategy is not None,
            columns=stage.columns,
            dtype=None if stage.dtype == "auto" else stage.dtype,
            at_once=stage.prompts_at_once,
            cached=stage.max_batch_tokens,
            cache=stage.cache,
        )
    ]


@samples_of.register
def _(stage: CompressStage, sources: Sources) -> list[Samples]:
    rows, dtype = limited(sources, stage.input, stage.limit), None if stage.dtype == "auto" else stage.dtype
    tokens = stage.sampling.max_new_tokens
    answers = Samples(stage.model, stage.input, rows, 1, tokens, "answers", columns=stage.columns, dtype=dtype)
    return [replace(answers, at_once=stage.rows_at_once, cached=stage.max_batch_tokens)]


@samples_of.register
def _(stage: LabelStage, sources: Sources) -> list[Samples]:
    if stage.url is not None:
        return []
    rows, tokens = limited(sources, stage.prompts, stage.limit), stage.sampling.max_new_tokens
    # The number of steps, and so of tokens, is not known before solutions are there.
    what = f"solutions and {stage.num_completions} completions of each of their steps"
    return [
        Samples(stage.model, stage.prompts, rows, stage.num_solutions, tokens, what, search=True, dtype=stage.dtype)
    ]


@samples_of.register
def _(stage: EvaluateStage, sources: Sources) -> list[Samples]:
    return [one for model in stage.models.values() for one in suite_samples(stage.suite, sources, model)]


@samples_of.register
def _(stage: GateStage, sources: Sources) -> list[Samples]:
    return [one for model in (stage.accepted, stage.model) for one in suite_samples(stage.suite, sources, model)]


@samples_of.register
def _(stage: RoundsStage, sources: Sources) -> list[Samples]:
    # The start, and a model of each round.
    each = [] if stage.suite is None else suite_samples(stage.suite, sources, stage.model)
    return [replace(one, at_most=True) for one in each] * (1 + stage.rounds)


def suite_samples(suite: Any, sources: Sources, model: Any) -> list[Samples]:
    """Lists what a model samples and reads in a suite."""
    found = []
    for task in Suite.read(suite).tasks:
        if isinstance(task, Task):
            rows, search = limited(sources, task.prompts, task.limit), task.strategy is not None
            tokens = task.params.max_new_tokens
            found.append(
                Samples(model, task.prompts, rows, task.num_samples, tokens, search=search, columns=task.columns)
            )
        elif isinstance(task, RowTask):
            for source in task.rows.values() if isinstance(task.rows, dict) else [task.rows]:
                rows = limited(sources, source, task.limit)
                found.append(Samples(model, source, rows, 0, 0, "rows", columns=task.columns))
    return found


def _drawn(stage: Any, sources: Sources, each: int) -> Samples:
    """Completions of a stage with options of sampling."""
    tokens = SamplingParams(**stage.sampling).max_new_tokens
    search, rows = getattr(stage, "strategy", None) is not None, sources.count(stage.prompts)
    return Samples(stage.model, stage.prompts, rows, each, tokens, search=search, columns=stage.columns)


def limited(sources: Sources, source: Any, limit: int | None) -> int | None:
    """Counts the rows that are read of a source, at most ``limit``; ``None`` if unknown."""
    found = sources.count(source)
    return found if found is None or limit is None else min(found, limit)


@dataclass(frozen=True)
class Load:
    """Cost of the samples of a policy.

    Args:
        parameters: of the policy, all models of an ensemble together.
        weights: bytes, blocked copies for products of few rows on a CPU included.
        caches: bytes of keys and values, at most.
        tokens: of completions, at most; ``None`` if not known.
        operations: multiplications and additions if all have so many tokens; ``None`` if not known.
        prompt: tokens of a prompt, a mean; ``None`` if not known.
    """

    parameters: int
    weights: float
    caches: float
    tokens: int | None
    operations: float | None
    prompt: float | None

    @property
    def memory(self) -> float:
        """Bytes of weights and caches."""
        return self.weights + self.caches


def load_of(samples: Samples, sources: Sources, origin: Callable[[Any], str | None], dtype: str) -> Load:
    """Computes what samples take.

    A prompt is computed once, whatever the number of its completions: 2 operations per weight and token.

    Args:
        samples: of one policy.
        sources: counts rows.
        origin: returns a model that exists and has the sizes of another, which may not be there yet.
        dtype: of the pipeline.

    Raises:
        ValueError: the sizes of a model are not known.
    """
    places = [place for model in policy_models(samples.model) if (place := origin(model)) is not None]
    decoders = [decoder_of(place) for place in places]
    dtype_of_weights = getattr(torch, samples.dtype or dtype)
    size = dtype_of_weights.itemsize
    read = prompt_lengths(samples, sources, places[0]) if places else []
    mean, longest = (sum(read) / len(read), max(read)) if read else (0.0, 0.0)

    # Rows in flight have places for whole prompts and completions, within the engine's budget.
    prompts, completions = samples.prompts, samples.completions
    rows = samples.each * (samples.at_once if prompts is None else min(prompts, samples.at_once))
    places_of_rows = min(samples.cached, rows * (longest + samples.tokens))
    caches = sum(cache_bytes(one, places_of_rows, size=size, kind=samples.cache) for one in decoders)
    parameters = sum(one.weights for one in decoders)
    weights = float(size * parameters + sum(_blocked(one, samples.tokens, dtype_of_weights) for one in decoders))

    if prompts is None or completions is None or samples.search or not any(read):
        return Load(parameters, weights, caches, None, None, mean if read else None)
    tokens = completions * samples.tokens
    return Load(parameters, weights, caches, tokens, 2.0 * parameters * (tokens + prompts * mean), mean)


def _blocked(decoder: Decoder, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the copies of weights that decoding on a CPU multiplies by."""
    if torch.cuda.is_available():
        return 0.0
    shapes = [(layer.inputs, layer.outputs) for layer in decoder.linears] * decoder.layers
    return packed_bytes([*shapes, (decoder.hidden, decoder.vocabulary)], tokens, dtype)


def prompt_lengths(samples: Samples, sources: Sources, model: str) -> list[float]:
    """Counts the tokens of the first rows of a source, or estimates those of rows that a stage will write."""
    ahead = sources.find(samples.source)
    if ahead:
        return [one.prompt for one in ahead]
    rows = sources.first(samples.source)
    tokenizer = load_tokenizer(model) if rows else None
    texts = ([*_texts(row, samples)] for row in rows)
    return [float(sum(len(tokenizer(text)["input_ids"]) for text in found)) for found in texts] if tokenizer else []


def _texts(row: Mapping[str, Any], samples: Samples) -> Iterator[str]:
    """Texts that a model reads of a row: its prompt, and the context before it; all of rows that are scored."""
    names = dict(samples.columns or {})
    wanted = [names.get(name, name) for name in ("context", "prompt")] if samples.each else list(row)
    for name in wanted:
        value = row.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (one["content"] if isinstance(one, Mapping) else str(one) for one in value if one)
