"""Tasks of given rows, which reward models score: pairs as in RewardBench, and marked solutions as in ProcessBench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from ..data.formats import preference
from ..data.joined_rows import distinct
from ..data.messages import Text
from ..data.sources import Source, open_source
from ..inference.text_scorers import computing_in
from ..metrics import CalibrationError, FirstErrorF1, PreferenceAccuracy
from ..metrics.functional import NO_ERROR
from ..models import ProcessRewardModel
from ..rewards.exact_answer import check_verdicts
from ..rewards.learned import RewardModelReward
from ..utils.progress import progress
from ..utils.validation import check_count
from .options import check_options
from .samples import PromptResult, SampleResult
from .sections import section_metrics, section_scores

# Rows that a model scores at a time.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """Base of tasks whose rows are scored.

    Args:
        name: what results call it.
        rows: a source of rows, such as a file; or a source for each section.
        section: the column that says which subset a row belongs to.
        limit: number of rows to read, of each source; all by default.
        columns: new name of a column -> its name in the rows.

    Raises:
        ValueError: an option out of its range.
    """

    kind: ClassVar[str]
    name: str
    rows: Source | dict[str, Source]
    section: str | None = None
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ValueError(f"the name of a task is {self.name!r}; write a text without '/', such as reward-bench")
        if self.limit is not None:
            check_count("limit", self.limit, "null reads all rows")
        check_options(self, {"section": str | None}, names=("columns",))

    def check_rows(self) -> None:
        """Reads all rows.

        Raises:
            ValueError: the source is empty, or a row is not as it must be.
        """
        if not sum(1 for _ in self._rows()):
            raise ValueError(f"it has no rows: {self.rows!r} is empty")

    def _rows(self) -> Iterator[Any]:
        """Yields the rows as they are scored."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Returns its options."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def read(self) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
        """Yields the id, the subset and the columns of each row.

        Raises:
            ValueError: a row lacks the column of its section, or a source cannot be read.
        """
        parts = self.rows if isinstance(self.rows, Mapping) else {None: self.rows}
        # Sections may be splits of one dataset, or lists: their rows need distinct ids.
        sources = distinct(open_source(source, columns=self.columns or None) for source in parts.values())
        for part, source in zip(parts, sources, strict=True):
            for number, (row_id, row) in enumerate(source):
                if self.limit is not None and number == self.limit:
                    break
                if self.section is not None and row.get(self.section) is None:
                    have = ", ".join(map(str, row))
                    raise ValueError(f"{row_id} has no {self.section!r}, its section in {self.name!r}: it has {have}")
                yield row_id, part if self.section is None else str(row[self.section]), row


@dataclass(frozen=True, kw_only=True)
class PreferenceTask(RowTask):
    """Pairs whose chosen completion a reward model should prefer.

    A row is right if the chosen completion's reward is above those of all rejected ones; equal rewards are wrong.

    Args:
        name: what results call it.
        rows: a source of rows with ``prompt``, ``chosen`` and ``rejected`` (a text, messages, or a list of texts); or
            a source for each section.
        section: the column that says which subset a row belongs to, such as ``subset``.
        sections: the subsets of each section; by default every subset is a section.
        counts: number of rows that a subset counts as in its section, instead of its own.
        chat: make a text that is the prompt the message of a user.
        limit: number of rows to read, of each source; all by default.
        columns: new name of a column -> its name in the rows.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "three"}]
        >>> task = PreferenceTask(name="pairs", rows=rows)
        >>> shorter = lambda prompts, completions: [-len(text) for text in completions]
        >>> task.share(task.run(shorter)[0])
        1.0
    """

    kind: ClassVar[str] = "preferences"
    sections: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, {"chat": bool, "sections": Mapping, "counts": Mapping})

    def load(self, place: str, dtype: str) -> RewardModelReward:
        """Loads a reward model, on a GPU where there is one."""
        reward = RewardModelReward(place, dtype=dtype)  # type: ignore[arg-type]
        if torch.cuda.is_available():
            reward.scorer.attach(torch.device("cuda"), None)
        return reward

    def run(self, scorer: Any, model: str = "model") -> list[PromptResult]:
        """Scores all completions.

        Args:
            scorer: a reward function, called as ``fn(prompts, completions)``.
            model: name of the model, for the progress.

        Raises:
            ValueError: a row is no pair, or belongs to no section.
        """
        rows = list(self._rows())
        found = []
        for first in progress(range(0, len(rows), _ROWS_AT_ONCE), f"evaluating {model} on {self.name}"):
            chunk = rows[first : first + _ROWS_AT_ONCE]
            pairs = [(prompt, text) for _, _, prompt, texts in chunk for text in texts]
            given = list(scorer([prompt for prompt, _ in pairs], [text for _, text in pairs]))
            # Completions too long for a model have no reward.
            given = [None if isinstance(value, Exception) else value for value in given]
            rewards = iter(check_verdicts(given, len(pairs)))
            for row_id, section, prompt, texts in chunk:
                samples = tuple(SampleResult(text, next(rewards), 0, True) for text in texts)
                found.append(PromptResult(row_id, prompt, samples, section))
        return found

    def _rows(self) -> Iterator[tuple[str, str | None, Text, list[str]]]:
        known = [subset for subsets in self.sections.values() for subset in subsets]
        for row_id, section, row in self.read():
            if known and section not in known:
                raise ValueError(f"{row_id} is of subset {section!r}, which no section of task {self.name!r} lists")
            try:
                prompt, texts = _completions(row)
            except ValueError as error:
                raise ValueError(f"{row_id}: {error}") from error
            if self.chat and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            yield row_id, section, prompt, texts

    def share(self, prompt: PromptResult) -> float | None:
        """Returns 1 for a row whose chosen completion is preferred, else 0; ``None`` without all rewards."""
        margin = _margin(prompt)
        return None if margin is None else float(margin > 0)

    def metrics(self, prompts: Sequence[PromptResult]) -> dict[str, float]:
        """Computes margins, calibration, and the scores of sections."""
        margins = [margin for prompt in prompts if (margin := _margin(prompt)) is not None]
        pairs, calibration = PreferenceAccuracy(), CalibrationError()
        pairs.update(margins, [0.0] * len(margins))
        sure = [margin for margin in margins if margin != 0]
        if sure:
            given = torch.tensor(sure, dtype=torch.float64)
            calibration.update(given.abs().sigmoid(), given > 0)
        of_pairs = {name: float(value) for name, value in pairs.compute().items() if name.startswith("margin")}
        judged = [(prompt.section, self.share(prompt)) for prompt in prompts]
        shares = [(section, share) for section, share in judged if section is not None and share is not None]
        scores = section_scores(shares, self.sections, self.counts)
        error = {"calibration_error": float(calibration.compute())} if sure else {}
        return of_pairs | error | section_metrics(scores)

    def shown(self, prompt: PromptResult) -> str:
        """Describes a row for the page: every completion with its reward."""
        names = ["chosen", *["rejected"] * (len(prompt.samples) - 1)]
        return "\n".join(
            f"{name} {'no reward' if sample.reward is None else f'{sample.reward:+.3g}'}: {sample.text}"
            for name, sample in zip(names, prompt.samples, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class FirstErrorTask(RowTask):
    """Marked solutions whose first wrong step a process reward model should find.

    Paper: ProcessBench (Zheng et al., 2024, arXiv:2412.06559): the harmonic mean of the accuracies on solutions with
    and without a wrong step, and its mean over sections.

    Args:
        name: what results call it.
        rows: a source of rows with ``problem`` (or ``prompt``), ``steps`` and ``label``, the number of the first wrong
            step from 0, -1 for none; or a source for each section.
        section: the column that says which section a row belongs to.
        threshold: a step whose probability is below it is wrong, in (0, 1).
        chat: make a text that is the problem the message of a user.
        limit: number of rows to read, of each source; all by default.
        columns: new name of a column -> its name in the rows.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> FirstErrorTask(name="math", rows="math.json").threshold
        0.5
    """

    kind: ClassVar[str] = "first_errors"
    threshold: float = 0.5
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, {"chat": bool})
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, float) or not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be in (0, 1) (0.5 is usual)")

    def load(self, place: str, dtype: str) -> ProcessRewardModel:
        """Loads a process reward model, on a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return ProcessRewardModel.from_pretrained(place, dtype=getattr(torch, dtype), device=device)

    def run(self, scorer: Any, model: str = "model") -> list[PromptResult]:
        """Scores all steps.

        Args:
            scorer: a process reward model, or anything with its ``score_steps(prompts, solutions)``.
            model: name of the model, for the progress.

        Raises:
            ValueError: a row is no marked solution.
        """
        rows = list(self._rows())
        found = []
        for first in progress(range(0, len(rows), _ROWS_AT_ONCE), f"evaluating {model} on {self.name}"):
            chunk = rows[first : first + _ROWS_AT_ONCE]
            with computing_in(None, getattr(scorer, "device", torch.device("cpu"))):
                scores = _step_scores(scorer, [row[2] for row in chunk], [row[3] for row in chunk])
            for (row_id, section, prompt, steps, label), of_row in zip(chunk, scores, strict=True):
                given = [None] * len(steps) if of_row is None else of_row
                samples = [SampleResult(step, score, 0, True) for step, score in zip(steps, given, strict=True)]
                found.append(PromptResult(row_id, prompt, tuple(samples), section, label))
        return found

    def _rows(self) -> Iterator[tuple[str, str | None, Text, list[str], int]]:
        for row_id, section, row in self.read():
            prompt = row.get("problem", row.get("prompt"))
            steps, label = row.get("steps"), row.get("label")
            if not isinstance(prompt, str | list) or not prompt:
                raise ValueError(f"{row_id}: problem is {prompt!r:.60}; write the problem that the steps solve")
            if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
                raise ValueError(f"{row_id}: steps is {steps!r:.60}; write a list of texts, one for each step")
            if isinstance(label, bool) or not isinstance(label, int) or not NO_ERROR <= label < len(steps):
                raise ValueError(
                    f"{row_id}: label is {label!r}; write the number of the first wrong step, from 0 to "
                    f"{len(steps) - 1}, or -1 for none"
                )
            if self.chat and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            yield row_id, section, prompt, steps, label

    def _predicted(self, prompt: PromptResult) -> int | None:
        scores = [sample.reward for sample in prompt.samples]
        if None in scores:
            return None
        wrong = (n for n, score in enumerate(scores) if score is not None and score < self.threshold)
        return next(wrong, NO_ERROR)

    def share(self, prompt: PromptResult) -> float | None:
        """Returns 1 for a solution whose first wrong step, or whose having none, was found, else 0."""
        predicted = self._predicted(prompt)
        return None if predicted is None else float(predicted == prompt.expected)

    def metrics(self, prompts: Sequence[PromptResult]) -> dict[str, float]:
        """Computes F1 and both accuracies, of all rows and of sections; ``score`` is the mean F1 over sections."""
        named = list(dict.fromkeys(prompt.section for prompt in prompts if prompt.section is not None))
        found = self._f1(prompts)
        scores = {name: self._f1([prompt for prompt in prompts if prompt.section == name])["f1"] for name in named}
        return found | (section_metrics(scores) if scores else {"score": found["f1"]})

    def _f1(self, prompts: Sequence[PromptResult]) -> dict[str, float]:
        metric = FirstErrorF1()
        judged = [(found, prompt.expected) for prompt in prompts if (found := self._predicted(prompt)) is not None]
        metric.update(*torch.tensor(judged, dtype=torch.int64).reshape(-1, 2).unbind(1))
        return {name: float(value) for name, value in metric.compute().items()}

    def shown(self, prompt: PromptResult) -> str:
        """Describes a row for the page: every step with its probability, and the first wrong one."""
        lines = [f"{'?' if s.reward is None else f'{s.reward:.2f}'} {s.text}" for s in prompt.samples]
        marked = "none" if prompt.expected == NO_ERROR else f"step {prompt.expected}"
        return "\n".join([*lines, f"first wrong step: {marked}"])


def _completions(row: Mapping[str, Any]) -> tuple[Text, list[str]]:
    """Reads the prompt, the chosen completion and the rejected ones of a row."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(rejected, list) and rejected and all(isinstance(text, str) for text in rejected):
        chosen = [chosen] if isinstance(chosen, str) else chosen
        if not isinstance(chosen, list) or len(chosen) != 1 or not isinstance(chosen[0], str):
            raise ValueError(f"chosen is {chosen!r:.60}; write one text that is better than all of the rejected ones")
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"prompt is {prompt!r:.60}; write a text or messages")
        return prompt, [chosen[0], *rejected]
    read = preference(row)
    if len(read.completions) != 2:
        raise ValueError("there is one rated completion; write chosen and rejected")
    return read.prompt, [_text(completion) for completion in read.completions]


def _text(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or not isinstance(completion[0].get("content"), str):
        raise ValueError(f"a completion has {len(completion)} messages; write one answer of the assistant")
    return str(completion[0]["content"])


def _margin(prompt: PromptResult) -> float | None:
    """The chosen completion's reward less the highest of the others; ``None`` unless all have rewards."""
    rewards = [sample.reward for sample in prompt.samples if sample.reward is not None]
    return rewards[0] - max(rewards[1:]) if len(rewards) == len(prompt.samples) > 1 else None


def _step_scores(scorer: Any, prompts: Sequence[Text], solutions: Sequence[list[str]]) -> list[list[float] | None]:
    """Scores the steps of solutions; ``None`` for one that the model cannot read, such as one that is too long."""
    try:
        return [list(scores) for scores in scorer.score_steps(list(prompts), list(solutions))]
    except ValueError:
        if len(prompts) == 1:
            return [None]
        return [_step_scores(scorer, [p], [s])[0] for p, s in zip(prompts, solutions, strict=True)]
