"""Suites of evaluation tasks: named prompts, how they are answered, and what verifies the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..inference import SamplingParams
from ..utils import yaml_parser
from ..utils.messages import did_you_mean
from ..utils.packaged_configs import nearest_config, packaged_config
from ..utils.validation import check_count

_EXACT = "rlhf_lightning.rewards.exact_answer"
_GREEDY = {"temperature": 0.0, "max_new_tokens": 256}
_SAMPLED = {"temperature": 1.0, "max_new_tokens": 256}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One set of prompts and its verifier.

    Args:
        name: what results call it.
        prompts: a source of ``PromptDataModule``: a file, folder, hub id or task such as ``sums:prompts?split=test``.
        verifier: a reward function: a dotted path, or ``class_path`` and ``init_args``.
        num_samples: completions per prompt, at least 1; with several, pass@k and maj@k are estimated.
        sampling: settings of ``SamplingParams`` without a seed; greedy for one sample, at temperature 1 for several.
        strategy: a search instead of plain sampling; as in ``inference.build_strategy``.
        limit: number of prompts to read; all by default.
        success: least reward of a right answer.
        votes: whether answers can be compared, for maj@k and the share of unique answers: they need a final
            answer that ``data.answer_key`` reads.
        chat_template_kwargs: passed to the chat template; the rows' own take precedence.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> Task(name="sums", prompts="sums:prompts?rows=8", num_samples=6).ks
        (1, 2, 4, 6)
    """

    name: str
    prompts: str | list[str]
    verifier: str | dict[str, Any] = _EXACT
    num_samples: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    strategy: str | dict[str, Any] | None = None
    limit: int | None = None
    success: float = 0.5
    votes: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ValueError(f"the name of a task is {self.name!r}; write a text without '/', such as arithmetic")
        check_count("num_samples", self.num_samples, "1 answers greedily")
        if self.limit is not None:
            check_count("limit", self.limit, "null reads all prompts")
        allowed = [f.name for f in fields(SamplingParams) if f.name != "seed"]
        for key in self.sampling:
            if key not in allowed:
                raise ValueError(f"sampling of task {self.name!r} has no key {key!r}{did_you_mean(str(key), allowed)}")
        if self.num_samples > 1 and self.strategy is None and self.params.temperature == 0:
            raise ValueError(
                f"task {self.name!r} draws {self.num_samples} samples at temperature 0, which are all equal: raise "
                "sampling.temperature, or set num_samples to 1"
            )

    @property
    def params(self) -> SamplingParams:
        """The settings of its samples."""
        return SamplingParams(**(_GREEDY if self.num_samples == 1 else _SAMPLED) | self.sampling)

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k: powers of two, and the number of samples."""
        powers = [2**n for n in range(self.num_samples.bit_length()) if 2**n <= self.num_samples]
        return tuple(dict.fromkeys([*powers, self.num_samples]))

    def as_dict(self) -> dict[str, Any]:
        """Returns its options."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that models are evaluated on.

    Args:
        name: what reports call it.
        tasks: at least one, with different names.

    Raises:
        ValueError: no task, or two with the same name.
    """

    name: str
    tasks: tuple[Task, ...]

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
            source: a suite, a mapping with ``name`` and ``tasks`` (a list of the options of ``Task``), or a YAML file
                with one, such as ``configs/suites/arithmetic.yaml``.

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
            source = yaml_parser.plain(yaml_parser.load(path.read_text(encoding="utf-8"), str(path)))
        if not isinstance(source, Mapping) or not isinstance(source.get("tasks"), Sequence | None):
            raise ValueError(f"{where}a suite is a mapping with name and tasks, a list; got {source!r:.80}")
        _check_keys(source, ("name", "tasks"), f"{where}the suite")
        tasks = [_task(written, where) for written in source.get("tasks") or ()]
        return cls(name=str(source.get("name", "suite")), tasks=tuple(tasks))


def _task(written: Any, where: str) -> Task:
    if isinstance(written, Task):
        return written
    if not isinstance(written, Mapping):
        raise ValueError(f"{where}a task is {written!r:.80}; write a mapping with name, prompts and verifier")
    _check_keys(written, [f.name for f in fields(Task)], f"{where}task {written.get('name')!r}")
    for key in ("name", "prompts"):
        if not written.get(key):
            raise ValueError(f"{where}task {written.get('name')!r} has no {key}: write it")
    return Task(**written)


def _check_keys(written: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    for key in written:
        if key not in allowed:
            raise ValueError(f"{what} has no key {key!r}{did_you_mean(str(key), allowed)}")
