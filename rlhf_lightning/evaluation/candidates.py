"""Models to evaluate: what names them, and their own names in results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..inference.policies import build_policy, check_single, policy_spec, policy_tokenizer
from ..models.backbone import positions_of
from ..models.loading import locate, read_config
from ..sequences import Example
from ..utils.files import content_hash
from .answers import check_fit, longest_prompt
from .running import given_tokenizer, task_prompts
from .suite import AnyTask, Suite
from .tasks import Task


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: loaded when the first task needs it."""

    name: str
    place: Any

    @property
    def spec(self) -> Any:
        """Names the model, as in ``policy_spec``; ``None`` for an engine."""
        given = isinstance(self.place, str | Path | list | tuple | Mapping)
        return policy_spec(self.place, f"model {self.name!r}") if given else None

    def load(self, task: AnyTask, dtype: str) -> Any:
        """Loads what a task is run with: an engine, or a model that scores rows."""
        if self.spec is None:
            return self.place
        return build_policy(self.spec, dtype=dtype) if isinstance(task, Task) else task.load(self.spec, dtype)

    def content(self) -> str | None:
        """Hashes the model's folder; ``None`` for anything else."""
        return content_hash(Path(self.spec).expanduser()) if isinstance(self.spec, str) else None

    def prompts(self, task: Task, verifier: Callable[..., Any]) -> list[Example]:
        """Reads the prompts of a task before the model is loaded; at least one must leave room for an answer.

        Args:
            task: the task.
            verifier: what will verify answers.

        Raises:
            ValueError: there are no prompts, they lack a column, or all are too long.
        """
        if self.spec is None:
            tokenizer, longest = self.place.tokenizer, longest_prompt(self.place, task.params)
        else:
            tokenizer, longest = policy_tokenizer(self.spec), _room(self.spec)
        examples = task_prompts(task, given_tokenizer(tokenizer, self.name), verifier)
        check_fit(task.name, self.name, examples, longest)
        return examples


def _room(spec: Any) -> int | None:
    """Returns the most tokens of a prompt that the config of a model leaves room after; ``None`` if it is not known."""
    if not isinstance(spec, str):
        return None
    try:
        positions = positions_of(read_config(locate(spec, what="model")))
    except ValueError:  # an adapter
        return None
    return None if positions is None else positions - 1


def check_models(models: Sequence[str | Path] | Mapping[str, Any], suite: Suite) -> list[Candidate]:
    """Reads the models to evaluate, without loading them.

    Args:
        models: as those of ``evaluate``.
        suite: the tasks.

    Raises:
        ValueError: no model is given, one is not written as a model, or an ensemble is to score given rows.
    """
    candidates = _candidates(models)
    scored = [task.name for task in suite.tasks if not isinstance(task, Task)]
    for candidate in candidates:
        if isinstance(candidate.spec, dict) and scored:
            why = f"and task {scored[0]!r} has rows that one reward model scores: leave out the one or the other"
            check_single(candidate.spec, f"model {candidate.name!r}", why)
    return candidates


def _candidates(models: Sequence[str | Path] | Mapping[str, Any]) -> list[Candidate]:
    if not models or isinstance(models, str):
        raise ValueError(f"models is {models!r}; give a list of folders, or a mapping of names to folders or engines")
    if isinstance(models, Mapping):
        return [Candidate(str(name), place) for name, place in models.items()]
    if unnamed := [place for place in models if not isinstance(place, str | Path)]:
        raise ValueError(f"models has {unnamed[0]!r} without a name: write a mapping, such as {{both: [A, B]}}")
    return [Candidate(name, place) for name, place in zip(short_names(models), models, strict=True)]


def short_names(places: Sequence[str | Path]) -> list[str]:
    """Names folders by the fewest of their parts that tell them apart, without the parts that all share.

    Raises:
        ValueError: a folder occurs twice.

    Example:
        >>> short_names(["runs/sft/model", "runs/dpo/model"]), short_names(["runs/sft/model"])
        (['sft', 'dpo'], ['model'])
    """
    parts = [[part for part in str(place).split("/") if part] or [str(place)] for place in places]
    written = ["/".join(names) for names in parts]
    if twice := [name for name in written if written.count(name) > 1]:
        raise ValueError(f"model {twice[0]!r} is given twice: give each model once")
    if len(parts) == 1:
        return [parts[0][-1]]
    while all(len(names) > 1 for names in parts) and len({names[0] for names in parts}) == 1:
        parts = [names[1:] for names in parts]
    while all(len(names) > 1 for names in parts) and len({names[-1] for names in parts}) == 1:
        parts = [names[:-1] for names in parts]
    return ["/".join(names) for names in parts]
