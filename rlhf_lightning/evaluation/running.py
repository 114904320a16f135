"""Runs tasks: reads their prompts, samples answers and verifies them, or scores given rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from ..data.transformed_rows import Transform
from ..inference import Engine, build_strategy, derive_seed
from ..inference.answering import ask_examples
from ..rewards.specs import build_reward
from ..sequences import Example
from ..utils.progress import progress
from .answers import Answer, check_fit, longest_prompt, read_prompts, score_texts, verified
from .checks import check_columns
from .guarded import Guarded
from .journal import Chunk, Journal
from .results import TaskResult
from .row_tasks import FirstErrorTask, PreferenceTask
from .samples import PromptResult, SampleResult
from .suite import AnyTask
from .tasks import Task

_PROMPTS_AT_ONCE = 64


def run_task(
    task: AnyTask,
    engine: Any,
    *,
    model: str = "model",
    seed: int = 0,
    verifier: Callable[..., Any] | None = None,
    transform: Transform | None = None,
    scorer: Callable[..., Any] | None = None,
    examples: Sequence[Example] | None = None,
    journal: Journal | None = None,
) -> TaskResult:
    """Runs a task: answers and verifies its prompts, or scores its rows.

    Args:
        task: the task.
        engine: samples, and has a tokenizer; for a ``PreferenceTask`` a reward function, for a ``FirstErrorTask`` a
            process reward model.
        model: name of the model in the result.
        seed: a sample is a function of this, the number of its prompt and its own number.
        verifier: instead of the task's own.
        transform: maps a row's columns to new ones before the prompt is read.
        scorer: instead of the task's own.
        examples: the prompts, where they have been read.
        journal: keeps the answers to prompts, and has those of before.

    Raises:
        ValueError: the engine has no tokenizer, there are no prompts or none leaves room for an answer, the verifier
            fails on all answers, or no sample has a verdict.
    """
    if isinstance(task, Task):
        verify = verifier or build_reward(task.verifier)
        if examples is None:
            tokenizer = given_tokenizer(getattr(engine, "tokenizer", None), model)
            examples = task_prompts(task, tokenizer, verify, transform=transform)
        start = time.perf_counter()
        every = range(len(examples))
        clock: list[float] = []
        given: dict[str, Any] = {"model": model, "seed": seed, "scorer": scorer, "clock": clock, "journal": journal}
        prompts = answer_task(task, engine, examples, every, verify, **given)
    else:
        start, clock = time.perf_counter(), []
        prompts = _scored_rows(task, engine, model)
    seconds = time.perf_counter() - start
    found = TaskResult(model, task, tuple(prompts), seconds, median(clock) if clock else None)
    check_scores(found)
    return found


def given_tokenizer(tokenizer: Any, model: str) -> Any:
    """Returns the tokenizer of an engine.

    Raises:
        ValueError: it is ``None``.
    """
    if tokenizer is None:
        raise ValueError(f"the engine of {model!r} has no tokenizer, which prompts are read with: give it one")
    return tokenizer


def _scored_rows(task: PreferenceTask | FirstErrorTask, scorer: Any, model: str) -> list[PromptResult]:
    try:
        return task.run(scorer, model)
    except Exception as error:
        raise ValueError(f"task {task.name!r}, scored by {model!r}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def task_prompts(
    task: Task,
    tokenizer: Any,
    verifier: Callable[..., Any],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> list[Example]:
    """Reads the prompts of a task.

    Args:
        task: the task.
        tokenizer: the model's.
        verifier: what will verify answers; the prompts must have the columns that it needs.
        chat_template_kwargs: passed to the chat template; the task's own override them by name.
        transform: maps a row's columns to new ones before the prompt is read.

    Raises:
        ValueError: there are no prompts, or they lack a column.
    """
    settings = {**(chat_template_kwargs or {}), **task.chat_template_kwargs}
    examples = read_prompts(
        task.prompts,
        tokenizer,
        limit=task.limit,
        columns=task.columns or None,
        chat_template_kwargs=settings or None,
        transform=transform,
    )
    if not examples:
        raise ValueError(f"task {task.name!r} has no prompts: {task.prompts!r} is empty")
    check_columns(task, verifier, examples[0].fields)
    return examples


def answer_task(
    task: Task,
    engine: Engine,
    examples: Sequence[Example],
    numbers: Sequence[int],
    verifier: Callable[..., Any],
    *,
    model: str = "model",
    seed: int = 0,
    scorer: Callable[..., Any] | None = None,
    clock: list[float] | None = None,
    journal: Journal | None = None,
) -> list[PromptResult]:
    """Answers and verifies some of the prompts of a task.

    Args:
        task: the task.
        engine: samples.
        examples: all prompts of the task.
        numbers: which of them to answer.
        verifier: verifies the answers.
        model: name of the model, for the progress bar.
        seed: a sample is a function of this, the number of its prompt and its own number.
        scorer: instead of the task's own.
        clock: gets the seconds of sampling per sampled token of each batch of prompts that are answered together.
        journal: keeps the answers of each batch, and has those of before.

    Returns:
        One result per number, in their order; without samples where the prompt leaves no room for an answer.

    Raises:
        ValueError: no prompt leaves room, or the verifier or the scorer fails on all answers.
    """
    answering = engine if task.strategy is None else build_strategy(task.strategy, engine)
    verify = Guarded(verifier, f"the verifier of task {task.name!r}", model)
    prompts = {number: _prompt_result(task, examples[number], ()) for number in numbers}
    fit = _fitting(task, model, examples, numbers, longest_prompt(answering, task.params))
    for first in progress(range(0, len(fit), _PROMPTS_AT_ONCE), f"evaluating {model} on {task.name}"):
        chunk = fit[first : first + _PROMPTS_AT_ONCE]
        compute = partial(_answer_chunk, task, answering, examples, chunk, verify, seed)
        answered, seconds = compute() if journal is None else journal.chunk(first // _PROMPTS_AT_ONCE, compute)
        prompts |= dict(zip(chunk, answered, strict=True))
        if clock is not None and seconds is not None:
            clock.append(seconds)
    if journal is not None and all(s.reward is None for prompt in prompts.values() for s in prompt.samples):
        journal.remove()  # a verifier that has no verdict now may have one later
    verify.close()
    found = [prompts[number] for number in numbers]
    if task.scorer is None:
        return found
    score = Guarded(scorer or build_reward(task.scorer), f"the scorer of task {task.name!r}", model)
    return _scored(found, [examples[number] for number in numbers], score)


def _answer_chunk(
    task: Task, answering: Any, examples: Sequence[Example], chunk: Sequence[int], verify: Guarded, seed: int
) -> Chunk:
    rows = [examples[number] for number in chunk]
    seeds = [[derive_seed(seed, number, s) for s in range(task.num_samples)] for number in chunk]
    start = time.perf_counter()
    drawn = ask_examples(answering, rows, task.num_samples, task.params, seeds=seeds)
    seconds, tokens = time.perf_counter() - start, sum(sample.num_sampled for group in drawn for sample in group)
    groups = verified(rows, drawn, verify)
    prompts = [_prompt_result(task, example, group) for example, group in zip(rows, groups, strict=True)]
    return prompts, seconds / tokens if tokens else None


def _fitting(
    task: Task, model: str, examples: Sequence[Example], numbers: Sequence[int], longest: int | None
) -> list[int]:
    """Returns the numbers of prompts that leave room for an answer, and warns of the others."""
    long = check_fit(task.name, model, examples, longest)
    if long:
        warnings.warn(
            f"{len(long)} of {len(examples)} prompts of task {task.name!r} do not fit model {model!r} and have no "
            f"verdict: it has room for {longest} tokens before an answer, and {long[0].row_id} has "
            f"{len(long[0].root.tokens)}",
            stacklevel=3,
        )
    names = {example.row_id for example in long}
    return [number for number in numbers if examples[number].row_id not in names]


def _scored(prompts: Sequence[PromptResult], examples: Sequence[Example], scorer: Guarded) -> list[PromptResult]:
    """Adds a scorer's scores to the samples; ``None`` where it has none."""
    pairs = [(example, sample) for example, p in zip(examples, prompts, strict=True) for sample in p.samples]
    given = score_texts(scorer, [example.fields for example, _ in pairs], [sample.text for _, sample in pairs])
    scorer.close()
    scores = iter(given)
    return [
        replace(prompt, samples=tuple(replace(sample, score=next(scores)) for sample in prompt.samples))
        for prompt in prompts
    ]


def check_scores(result: TaskResult) -> None:
    """Refuses a result without any verdict.

    Raises:
        ValueError: no answer has one.
    """
    name, model = result.task.name, result.model
    if result.scores:
        return
    if not isinstance(result.task, Task):
        raise ValueError(f"{model!r} scores no row of task {name!r}: it is empty, or all are too long for the model")
    raise ValueError(
        f"the verifier of task {name!r} has no verdict for any answer of {model!r}: the prompts lack a column that it "
        "reads"
    )


def _prompt_result(task: Task, example: Example, group: Sequence[Answer]) -> PromptResult:
    samples = tuple(
        SampleResult(
            answer.completion.text,
            answer.reward,
            len(answer.completion.token_ids),
            answer.completion.finish_reason == "stop",
        )
        for answer in group
    )
    section = None if task.section is None else example.fields.get(task.section)
    return PromptResult(
        example.row_id, example.fields.get("prompt"), samples, None if section is None else str(section)
    )
