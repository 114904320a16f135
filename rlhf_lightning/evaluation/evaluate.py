"""Evaluates models on a suite: answers are sampled, verified, compared, and reported."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ..data.transformed_rows import Transform
from ..inference import Engine, build_strategy, derive_seed
from ..inference.answering import ask_examples
from ..inference.policies import PolicySpec, policy_tokenizer
from ..rewards.exact_answer import check_verdicts
from ..rewards.specs import build_reward
from ..sequences import Example
from ..utils.files import write_atomically
from ..utils.inputs import input_hashes
from ..utils.progress import progress
from .answers import Answer, read_prompts, score_texts, verified
from .candidates import Candidate, check_models
from .journal import Chunk, Journal
from .report import Report
from .results import TaskResult
from .samples import PromptResult, SampleResult
from .suite import AnyTask, Suite
from .tasks import Task
from .wins import all_wins

_PROMPTS_AT_ONCE = 64
# Finished results of an output folder, which are not computed again.
PARTS = "parts"


def evaluate(
    models: Sequence[str | Path] | Mapping[str, Path | PolicySpec | Engine],
    suite: Suite | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    seed: int = 0,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Evaluates models on the tasks of a suite, and compares each with the first.

    A sample is a function of ``seed``, the number of its prompt and its own number. With ``output``, finished results
    (win rates by judges, too) are kept in the folder and not computed again as long as the contents of model and
    prompts, the verifier's source, the task, the seed, the type of the weights and the version of this package are the
    same: an interrupted evaluation continues after the prompts that were answered, 64 at a time, and a further model
    costs its own answers only.

    Args:
        models: folders or hub ids; or names with a folder, a hub id, several as one (as in ``policy_spec``) or an
            engine with a tokenizer each. The first is what the others are compared with.
        suite: a suite, a mapping, or a YAML file; see ``Suite.read``.
        output: folder of ``results.json``, ``report.html`` and ``history.jsonl``; nothing is written by default.
        seed: of samples and resamples.
        dtype: of the weights that are loaded: ``float32``, ``bfloat16`` or ``float16``.
        say: shown one line per result.

    Raises:
        ValueError: no models, a task without prompts, or one whose verifier has no verdict for any sample.

    Example::

        report = evaluate({"sft": "runs/sft/model", "dpo": "runs/dpo/model"}, "configs/suites/arithmetic.yaml")
        print(report.table())
    """
    suite = Suite.read(suite)
    candidates = check_models(models, suite)
    # Verifiers are built and models looked for before anything is sampled: a typo costs nothing.
    answered = [task for task in suite.tasks if isinstance(task, Task)]
    verifiers = {task.name: build_reward(task.verifier) for task in answered}
    scorers = {task.name: build_reward(task.scorer) for task in answered if task.scorer is not None}
    judges = {task.name: task.wins.build_judge() for task in answered if task.win_rate is not None}
    for candidate in candidates:
        if candidate.spec is not None:
            policy_tokenizer(candidate.spec)
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        Report.check_output(folder)
    results: list[TaskResult] = []
    for candidate in candidates:
        loaded: dict[str, Any] = {}
        for task in suite.tasks:
            part = None if folder is None else _part(folder, candidate, task, seed, dtype)
            if part is not None and part.is_file():
                written = json.loads(part.read_text(encoding="utf-8"))
                found = TaskResult.read(written | {"model": candidate.name, "task": task.as_dict()})
            else:
                if task.kind not in loaded:
                    loaded[task.kind] = candidate.load(task, dtype)
                journal = None if part is None else Journal(part.with_suffix(".jsonl"))
                found = run_task(
                    task,
                    loaded[task.kind],
                    model=candidate.name,
                    seed=seed,
                    verifier=verifiers.get(task.name),
                    scorer=scorers.get(task.name),
                    journal=journal,
                )
                if part is not None and journal is not None:
                    part.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(part, json.dumps(found.as_dict(), ensure_ascii=False) + "\n")
                    journal.remove()
            results.append(found)
            say(f"{candidate.name}, {task.name}: {found.accuracy.value:.1%} right, {found.seconds:.1f} s")
    report = Report(suite.name, tuple(results), seed=seed, wins=all_wins(results, judges, partial(_kept, folder)))
    if folder is not None:
        report.save(folder)
    return report


def run_task(
    task: AnyTask,
    engine: Any,
    *,
    model: str = "model",
    seed: int = 0,
    verifier: Callable[..., Any] | None = None,
    transform: Transform | None = None,
    scorer: Callable[..., Any] | None = None,
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
        journal: keeps the answers to prompts, and has those of before.

    Raises:
        ValueError: the engine has no tokenizer, there are no prompts, or no sample has a verdict.
    """
    if isinstance(task, Task):
        tokenizer: Any = getattr(engine, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"the engine of {model!r} has no tokenizer, which prompts are read with: give it one")
        verify = verifier or build_reward(task.verifier)
        examples = task_prompts(task, tokenizer, verify, transform=transform)
        start = time.perf_counter()
        every = range(len(examples))
        clock: list[float] = []
        given: dict[str, Any] = {"model": model, "seed": seed, "scorer": scorer, "clock": clock, "journal": journal}
        prompts = answer_task(task, engine, examples, every, verify, **given)
    else:
        start, clock = time.perf_counter(), []
        prompts = task.run(engine, model)
    seconds = time.perf_counter() - start
    found = TaskResult(model, task, tuple(prompts), seconds, median(clock) if clock else None)
    if journal is not None and not found.scores:
        journal.remove()  # a verifier that has no verdict now may have one later
    check_scores(found)
    return found


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
        raise ValueError(
            f"task {task.name!r} has no prompts: {task.prompts!r} is empty, or all of its rows are too long"
        )
    _check_columns(task, verifier, examples[0])
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
        One result per number, in their order.
    """
    answering = engine if task.strategy is None else build_strategy(task.strategy, engine)
    prompts: list[PromptResult] = []
    for first in progress(range(0, len(numbers), _PROMPTS_AT_ONCE), f"evaluating {model} on {task.name}"):
        chunk = numbers[first : first + _PROMPTS_AT_ONCE]
        compute = partial(_answer_chunk, task, answering, examples, chunk, verifier, seed)
        found, seconds = compute() if journal is None else journal.chunk(first // _PROMPTS_AT_ONCE, compute)
        prompts += found
        if clock is not None and seconds is not None:
            clock.append(seconds)
    return prompts if task.scorer is None else _scored(prompts, examples, numbers, scorer or build_reward(task.scorer))


def _answer_chunk(
    task: Task,
    answering: Any,
    examples: Sequence[Example],
    chunk: Sequence[int],
    verifier: Callable[..., Any],
    seed: int,
) -> Chunk:
    rows = [examples[number] for number in chunk]
    seeds = [[derive_seed(seed, number, s) for s in range(task.num_samples)] for number in chunk]
    start = time.perf_counter()
    drawn = ask_examples(answering, rows, task.num_samples, task.params, seeds=seeds)
    seconds, tokens = time.perf_counter() - start, sum(sample.num_sampled for group in drawn for sample in group)
    groups = verified(rows, drawn, verifier)
    prompts = [_prompt_result(task, example, group) for example, group in zip(rows, groups, strict=True)]
    return prompts, seconds / tokens if tokens else None


def _scored(
    prompts: Sequence[PromptResult], examples: Sequence[Example], numbers: Sequence[int], scorer: Callable[..., Any]
) -> list[PromptResult]:
    """Adds a scorer's scores to the samples; ``None`` where it has none."""
    pairs = [(examples[n], sample) for n, p in zip(numbers, prompts, strict=True) for sample in p.samples]
    given = score_texts(scorer, [example.fields for example, _ in pairs], [sample.text for _, sample in pairs])
    scores = iter(check_verdicts([None if isinstance(value, Exception) else value for value in given], len(pairs)))
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
        raise ValueError(f"{model!r} scores no row of task {name!r}: there are none, or all are too long for it")
    raise ValueError(
        f"the verifier of task {name!r} has no verdict for any answer of {model!r}: the prompts lack a column that it "
        "reads"
    )


def _check_columns(task: Task, verifier: Callable[..., Any], example: Example) -> None:
    """Refuses a section, or a verifier that must be given a column, that the prompts lack."""
    have = ", ".join(sorted(set(example.fields) - {"prompt"})) or "none"
    if task.section is not None and task.section not in example.fields:
        raise ValueError(f"the section of task {task.name!r} is the column {task.section!r}: its prompts have {have}")
    try:
        parameters = inspect.signature(verifier).parameters.values()
    except (TypeError, ValueError):  # nothing is known of it
        return
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for name in required[2:] if required[:2] == ["prompts", "completions"] else ():
        if name not in example.fields:
            raise ValueError(f"the verifier of task {task.name!r} reads the column {name!r}: its prompts have {have}")


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


def _kept(folder: Path | None, key: Sequence[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Finds what was computed before for a key, the contents of the files that it names included, or computes it."""
    if folder is None:
        return compute()
    part = _part_of(folder, [*key, input_hashes({"key": key[0]})])
    if not part.is_file():
        found = compute()
        part.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(part, json.dumps(found) + "\n")
    kept: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    return kept


def _part_of(folder: Path, key: Any) -> Path:
    from .. import __version__

    written = json.dumps([__version__, key], sort_keys=True, default=str)
    return folder / PARTS / f"{hashlib.sha256(written.encode()).hexdigest()[:24]}.json"


def _part(folder: Path, candidate: Candidate, task: AnyTask, seed: int, dtype: str) -> Path | None:
    """Returns where a result is kept: named after all that it depends on; ``None`` for an engine."""
    if candidate.spec is None:
        return None
    # The contents of the model (and of an adapter's base), of the prompts, and of verifiers and scorers of one's own.
    # How answers are compared with others changes none of them.
    asked = task.as_dict() | ({"win_rate": None} if isinstance(task, Task) else {})
    inputs = input_hashes({"model": candidate.spec, "task": asked})
    return _part_of(folder, [candidate.spec, inputs, asked, seed, dtype])
