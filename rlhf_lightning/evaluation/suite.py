"""Suites of evaluation tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from ..utils import yaml_parser
from ..utils.messages import did_you_mean, one_line
from ..utils.packaged_configs import nearest_config, packaged_config
from ..utils.validation import check_choice
from .row_tasks import FirstErrorTask, PreferenceTask
from .tasks import Task

AnyTask = Task | PreferenceTask | FirstErrorTask
_KINDS: dict[str, type[AnyTask]] = {
    "answers": Task,
    PreferenceTask.kind: PreferenceTask,
    FirstErrorTask.kind: FirstErrorTask,
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that models are evaluated on.

    Args:
        name: what reports call it.
        tasks: at least one, with different names.

    Raises:
        ValueError: no task, or two with the same name.

    Example:
        >>> from rlhf_lightning.evaluation import PreferenceTask
        >>> pairs = PreferenceTask(name="pairs", rows=[{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
        >>> [task.name for task in Suite(name="mine", tasks=(pairs,)).tasks]
        ['pairs']
    """

    name: str
    tasks: tuple[AnyTask, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"suite {self.name!r} has no tasks: give at least one, with name, prompts and verifier")
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"suite {self.name!r} has two tasks named {twice[0]!r}: give each its own name")

    @classmethod
    def read(cls, source: Suite | Mapping[str, Any] | str | Path) -> Suite:
        """Reads a suite.

        Args:
            source: a suite, a mapping with ``name`` and ``tasks``, or a YAML file with one, such as
                ``configs/suites/arithmetic.yaml``. A task is a mapping of the options of ``Task``; with ``kind:
                preferences`` those of ``PreferenceTask``, with ``kind: first_errors`` those of ``FirstErrorTask``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an unknown key, or a task that is not complete.

        Example:
            >>> tasks = [{"name": "sums", "prompts": "sums:prompts?rows=8"}]
            >>> Suite.read({"name": "small", "tasks": tasks}).tasks[0].params.temperature
            0.0
        """
        if isinstance(source, cls):
            return source
        where = ""
        if not isinstance(source, Mapping):
            path = packaged_config(str(source)) or Path(str(source)).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"there is no suite {str(source)!r}{nearest_config(str(source))}")
            where = f"{source}: "
            try:
                source = yaml_parser.plain(yaml_parser.load(path.read_text(encoding="utf-8"), str(path)))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}{one_line(error)}") from error
        if not isinstance(source, Mapping) or not isinstance(source.get("tasks"), Sequence | None):
            raise ValueError(f"{where}a suite is a mapping with name and tasks, a list; got {source!r:.80}")
        _check_keys(source, ("name", "tasks"), f"{where}the suite")
        tasks = [task_of(written, where) for written in source.get("tasks") or ()]
        return cls(name=str(source.get("name", "suite")), tasks=tuple(tasks))


def task_of(written: Any, where: str = "") -> AnyTask:
    """Makes a task of its options.

    Args:
        written: a mapping; or a task, which is returned.
        where: begins the messages of errors.

    Raises:
        ValueError: an unknown kind or key, or one that is missing.

    Example:
        >>> task_of({"kind": "preferences", "name": "pairs", "rows": "pairs.jsonl"}).limit is None
        True
    """
    if isinstance(written, AnyTask):
        return written
    if not isinstance(written, Mapping):
        raise ValueError(f"{where}a task is {written!r:.80}; write a mapping with name, prompts and verifier")
    options = dict(written)
    kind = options.pop("kind", "answers")
    check_choice(f"{where}kind of task {written.get('name')!r}", kind, _KINDS)
    made = _KINDS[kind]
    _check_keys(options, [f.name for f in fields(made)], f"{where}task {written.get('name')!r}")
    for key in ("name", "prompts" if made is Task else "rows"):
        if not options.get(key):
            raise ValueError(f"{where}task {written.get('name')!r} has no {key}: write it")
    return made(**options)


def _check_keys(written: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    for key in written:
        if key not in allowed:
            raise ValueError(f"{what} has no key {key!r}{did_you_mean(str(key), allowed)}")


if TYPE_CHECKING:
    SuiteSource: TypeAlias = str | dict[str, Any] | Suite
else:
    # Without classes: the command line would parse a suite's file as the arguments of a Suite.
    SuiteSource = str | dict[str, Any]
