"""Evaluates models on a suite: answers are sampled, verified, compared, and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..inference import Engine
from ..inference.policies import PolicySpec, policy_tokenizer
from ..rewards.specs import build_reward
from ..sequences import Example
from ..utils.inputs import input_hashes
from .candidates import Candidate, check_models
from .checks import check_suite
from .journal import Journal
from .kept import kept, part_of, read_result, write_part
from .report import Report
from .results import TaskResult
from .running import run_task
from .suite import AnyTask, Suite
from .tasks import Task
from .wins import all_wins


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
    check_suite(suite)
    # Verifiers are built, models looked for and prompts read before anything is sampled: a mistake costs nothing.
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

    parts, done, prompts = _before_sampling(candidates, suite, verifiers, folder, seed, dtype)
    for candidate in candidates:
        loaded: dict[str, Any] = {}
        for task in suite.tasks:
            key = candidate.name, task.name
            if key not in done:
                if task.kind not in loaded:
                    loaded[task.kind] = candidate.load(task, dtype)
                part = parts[key]
                journal = None if part is None else Journal(part.with_suffix(".jsonl"))
                done[key] = run_task(
                    task,
                    loaded[task.kind],
                    model=candidate.name,
                    seed=seed,
                    verifier=verifiers.get(task.name),
                    scorer=scorers.get(task.name),
                    examples=prompts.pop(key, None),
                    journal=journal,
                )
                if part is not None and journal is not None:
                    write_part(part, done[key].as_dict())
                    journal.remove()
            found = done[key]
            say(f"{candidate.name}, {task.name}: {found.accuracy.value:.1%} right, {found.seconds:.1f} s")
    hashes = {} if folder is None else {candidate.name: candidate.content() for candidate in candidates}
    results = [
        replace(done[candidate.name, task.name], model_hash=hashes.get(candidate.name))
        for candidate in candidates
        for task in suite.tasks
    ]
    report = Report(suite.name, tuple(results), seed=seed, wins=all_wins(results, judges, partial(kept, folder)))
    if folder is not None:
        report.save(folder)
    return report


# The names of a model and of a task.
_Key = tuple[str, str]


def _before_sampling(
    candidates: Sequence[Candidate],
    suite: Suite,
    verifiers: Mapping[str, Callable[..., Any]],
    folder: Path | None,
    seed: int,
    dtype: str,
) -> tuple[dict[_Key, Path | None], dict[_Key, TaskResult], dict[_Key, list[Example]]]:
    """Returns where results are kept, results that are there, and the prompts of all others."""
    parts: dict[_Key, Path | None] = {}
    done: dict[_Key, TaskResult] = {}
    prompts: dict[_Key, list[Example]] = {}
    for candidate in candidates:
        for task in suite.tasks:
            key = candidate.name, task.name
            part = parts[key] = None if folder is None else _part(folder, candidate, task, seed, dtype)
            if part is not None and part.is_file():
                done[key] = read_result(part, candidate.name, task)
            elif isinstance(task, Task):
                prompts[key] = candidate.prompts(task, verifiers[task.name])
    return parts, done, prompts


def _part(folder: Path, candidate: Candidate, task: AnyTask, seed: int, dtype: str) -> Path | None:
    """Returns where a result is kept: named after all that it depends on; ``None`` for an engine."""
    if candidate.spec is None:
        return None
    # The contents of the model (and of an adapter's base), of the prompts, and of verifiers and scorers of one's own.
    # How answers are compared with others changes none of them.
    asked = task.as_dict() | ({"win_rate": None} if isinstance(task, Task) else {})
    inputs = input_hashes({"model": candidate.spec, "task": asked})
    return part_of(folder, [candidate.spec, inputs, asked, seed, dtype])
