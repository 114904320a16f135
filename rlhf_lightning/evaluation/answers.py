"""Samples a model's answers to prompts, and verifies them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.sources import Source
from ..data.transformed_rows import Transform
from ..datamodules import PromptDataModule
from ..inference import Completion, Engine, SamplingParams
from ..inference.answering import ask_examples, takes_tokens
from ..models import CompressedContext
from ..rewards.exact_answer import check_verdicts
from ..sequences import Example

Verifier = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Answer:
    """A completion with its reward.

    Attributes:
        example: the prompt, with the row's other columns.
        completion: the model's answer.
        reward: the verifier's reward; ``None`` without a verdict.
    """

    example: Example
    completion: Completion
    reward: float | None


def load_verifier(path: str) -> Verifier:
    """Imports a reward function by its dotted path.

    Args:
        path: such as ``rlhf_lightning.rewards.exact_answer``, or one of your own modules.

    Raises:
        ValueError: the path does not lead to a function.

    Example:
        >>> load_verifier("rlhf_lightning.rewards.exact_answer").__name__
        'exact_answer'
    """
    module, _, name = path.rpartition(".")
    advice = "write the dotted path of a function, such as rlhf_lightning.rewards.exact_answer"
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"verifier {path!r} cannot be imported ({error}): {advice}") from error
    if not callable(found):
        raise ValueError(f"verifier {path!r} is a {type(found).__name__}: {advice}")
    return found  # type: ignore[no-any-return]


def read_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    columns: dict[str, str] | None = None,
    transform: Transform | None = None,
) -> list[Example]:
    """Reads and tokenises the prompts of a source, as the datamodules do.

    Args:
        source: a source of ``PromptDataModule``.
        tokenizer: the model's.
        limit: number of prompts to read, at least 1; all by default.
        chat_template_kwargs: passed to the chat template; the rows' own take precedence.
        columns: new name of a column -> its name in the rows.
        transform: maps a row's columns to new ones.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 (null reads all prompts)")
    data = PromptDataModule(
        predict=source,
        tokenizer=tokenizer,
        chat_template_kwargs=chat_template_kwargs,
        columns=columns,
        transform=transform,
    )
    data.setup("predict")
    examples = [example for batch in data.predict_dataloader() for example in batch.examples]
    return examples[:limit]


def longest_prompt(engine: Any, sampling: SamplingParams) -> int | None:
    """Returns the most tokens that a prompt may have for an engine or a strategy; ``None`` where that is not known."""
    ask = getattr(engine, "longest_prompt", None)
    longest: int | None = ask(sampling) if callable(ask) and takes_tokens(engine) else None
    return longest


def check_fit(task: str, model: str, examples: Sequence[Example], longest: int | None) -> list[Example]:
    """Returns the prompts of a task that leave no room for an answer.

    Args:
        task: name of the task.
        model: name of the model.
        examples: the prompts.
        longest: the most tokens that one may have; ``None`` for any number.

    Raises:
        ValueError: all of them.
    """
    if longest is None:
        return []
    long = [example for example in examples if len(example.root.tokens) > longest]
    if long and len(long) == len(examples):
        shortest = min(long, key=lambda example: len(example.root.tokens))
        raise ValueError(
            f"no prompt of task {task!r} fits model {model!r}, which has room for {longest} tokens before an answer: "
            f"the shortest, {shortest.row_id}, has {len(shortest.root.tokens)}; shorten them, or leave out the task or "
            "the model"
        )
    return long


def answer_prompts(
    engine: Engine,
    examples: Sequence[Example],
    verifier: Verifier,
    *,
    num_samples: int = 1,
    sampling: SamplingParams | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    contexts: Sequence[CompressedContext] | None = None,
) -> list[list[Answer]]:
    """Samples completions of prompts and verifies them.

    Args:
        engine: samples completions; a strategy's scorer reads the prompts as written, and the rows' other columns.
        examples: prompts, from ``read_prompts``.
        verifier: called as ``fn(prompts, completions, **columns)``, where columns are the rows' other fields.
        num_samples: completions per prompt, at least 1.
        sampling: the settings; greedy by default.
        seeds: one per prompt and sample, instead of seeds derived from the sampling's.
        contexts: compressed ones that prompts follow, one each, for a ``LocalEngine``.

    Returns:
        One list per prompt with ``num_samples`` answers.

    Raises:
        ValueError: the verifier's rewards are not one finite number or ``None`` each; NaN counts as ``None``.
    """
    sampling = sampling or SamplingParams(temperature=0.0)
    groups = ask_examples(engine, examples, num_samples, sampling, seeds=seeds, contexts=contexts)
    return verified(examples, groups, verifier)


def verified(
    examples: Sequence[Example], groups: Sequence[Sequence[Completion]], verifier: Verifier
) -> list[list[Answer]]:
    """Verifies completions of prompts.

    Args:
        examples: prompts.
        groups: the completions of each, equally many.
        verifier: called as in :func:`answer_prompts`.

    Raises:
        ValueError: the verifier's rewards are not one finite number or ``None`` each; NaN counts as ``None``.
    """
    pairs = [(example, sample) for example, group in zip(examples, groups, strict=True) for sample in group]
    given = score_texts(verifier, [example.fields for example, _ in pairs], [sample.text for _, sample in pairs])
    rewards = iter(check_verdicts(given, len(pairs)))
    answers = (Answer(*pair, reward) for pair, reward in zip(pairs, rewards, strict=True))
    return [[next(answers) for _ in group] for group in groups]


def score_texts(verifier: Callable[..., Any], rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
    """Calls a verifier or another reward function with completions and the columns of their rows.

    Args:
        verifier: called as ``fn(prompts, completions, **columns)``, with the columns that it takes.
        rows: the row of each completion, with its ``prompt``.
        texts: completions.

    Returns:
        The returned values, as a list.
    """
    if not texts:
        return []
    names = sorted({name for row in rows for name in row} - {"prompt"})
    if (taken := _taken(verifier)) is not None:
        names = [name for name in names if name in taken]
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    return list(verifier([row.get("prompt") for row in rows], list(texts), **columns))


def _taken(verifier: Callable[..., Any]) -> set[str] | None:
    """Names of the columns that a verifier takes; ``None`` if it takes all, or nothing is known of it."""
    try:
        parameters = inspect.signature(verifier).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
