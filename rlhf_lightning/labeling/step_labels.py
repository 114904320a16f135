"""Labels steps of solutions automatically: completes each prefix many times, and counts right answers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

from ..data.chat_template import ChatTemplate
from ..data.text_tokens import encode, prompt_tokens
from ..evaluation.answers import score_texts
from ..inference.answering import ask
from ..inference.candidates import begun_prompt, columns_of
from ..inference.completion import readable
from ..inference.engine import Engine
from ..inference.sampling import SamplingParams, derive_seed
from ..rewards.exact_answer import check_verdicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ``verify(prompts, completions, **columns)`` returns one reward per completion, or None without a verdict.
Verifier = Callable[..., Sequence[float | None]]
# Returns the tokens of a row's prompt, in place of the tokenizer's encoding of the text or chat.
PromptTokens = Callable[[Mapping[str, Any]], Sequence[int]]
OnTooLong = Literal["drop", "error"]

# Reasons for which ``label_steps`` skips a row.
TOO_LONG: Final = "too long"
UNJUDGED: Final = "without verdict"

_ROWS_AT_ONCE = 32
# Columns of a row that belong to another solution than the sampled one.
_OF_A_SOLUTION = ("completion", "response", "completions", "label", "labels")


class Solutions(NamedTuple):
    """Sampled solutions, and the numbers of skipped ones.

    Attributes:
        rows: one per solution, as ``label_steps`` takes them: the prompt's row with ``completions`` and a ``row_id``.
        cut_off: number of solutions cut off by the limit.
        empty: number without steps.
        duplicates: number that repeated another solution of the same prompt.
        too_long: number of prompts (not solutions) that leave the engine no room.
    """

    rows: list[dict[str, Any]]
    cut_off: int
    empty: int
    duplicates: int
    too_long: int


def sample_solutions(
    rows: Iterable[Mapping[str, Any]],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_solutions: int = 4,
    step_separator: str = "\n",
    sampling: SamplingParams | None = None,
    prompt_tokens: PromptTokens | None = None,
    max_length: int | None = None,
    on_too_long: OnTooLong = "drop",
    seed: int = 0,
) -> Solutions:
    r"""Samples several solutions of each problem, in steps, for ``label_steps``.

    Paper: Math-Shepherd (Wang et al., 2023, arXiv:2312.08935), section 4: several solutions per problem, without
    duplicates. Departure: truncated solutions are skipped as well, since their last step is incomplete.

    A solution is a function of the model, the settings and (``seed``, the row's id, the solution's number).

    Args:
        rows: with ``prompt``, text or chat messages; ``row_id`` if there is one, else the row's number names it.
        engine: samples the solutions; a strategy searches for each.
        tokenizer: the engine's.
        num_solutions: per prompt, at least 1.
        step_separator: ends each step; at least one character.
        sampling: the settings; its own seed is not read.
        prompt_tokens: returns a row's prompt as tokens; by default the tokenizer encodes it.
        max_length: maximum tokens of a prompt, at least 1; limited by the engine's own maximum.
        on_too_long: ``drop`` a row with a longer one and count it, or ``error``.
        seed: see above.

    Raises:
        ValueError: an option out of range, a row without a prompt, or, with ``error``, one that is too long.

    Example:
        >>> sample_solutions([{"prompt": "1+2=?", "answer": "3"}], engine, tokenizer).rows[0]  # doctest: +SKIP
        {'prompt': '1+2=?', 'answer': '3', 'row_id': 'rows:0/2', 'completions': ['1+2=3', '#3']}
    """
    if num_solutions < 1:
        raise ValueError(f"num_solutions is {num_solutions}; it must be at least 1 (4 to 16 are usual)")
    _check_separator(step_separator)
    params = replace(sampling or SamplingParams(), seed=seed)
    limit = _Limit.of(engine, params, max_length, on_too_long)

    # Too long prompts are skipped before sampling; the samples of the others do not depend on them.
    named = [(str(row.get("row_id", f"rows:{number}")), row) for number, row in enumerate(rows)]
    encode = prompt_tokens or (lambda row: _prompt_ids(tokenizer, row))
    for row_id, row in named:
        if not row.get("prompt"):
            raise ValueError(f"row {row_id} has the columns {sorted(row)}; it needs a prompt")
    encoded = [(row_id, row, list(encode(row))) for row_id, row in named]
    fitting = [(row_id, row, ids) for row_id, row, ids in encoded if limit.allows(row_id, len(ids), "its prompt has")]
    seeds = [[derive_seed(seed, row_id, "solution", n) for n in range(num_solutions)] for row_id, _, _ in fitting]
    prompts, columns = [row["prompt"] for _, row, _ in fitting], columns_of([_given(row) for _, row, _ in fitting])
    tokens = [ids for _, _, ids in fitting]
    groups = ask(engine, prompts, tokens, num_solutions, params, seeds=seeds, columns=columns)

    found: list[dict[str, Any]] = []
    cut_off = empty = duplicates = 0
    for (row_id, row, _), group in zip(fitting, groups, strict=True):
        rest = _given(row)
        seen: set[tuple[str, ...]] = set()
        for number, completion in enumerate(group):
            steps = [step for step in readable(completion.text).split(step_separator) if step]
            # Counted for one reason each: cut off first, since such a text may be empty or repeated by chance.
            ended = completion.finish_reason == "stop"
            cut_off += not ended
            empty += ended and not steps
            duplicates += ended and tuple(steps) in seen
            if ended and steps and tuple(steps) not in seen:
                seen.add(tuple(steps))
                found.append({**rest, "row_id": f"{row_id}/{number}", "completions": steps})
    return Solutions(found, cut_off, empty, duplicates, len(encoded) - len(fitting))


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row that belong to its problem."""
    return {name: value for name, value in row.items() if name not in _OF_A_SOLUTION}


@dataclass
class _Solution:
    """A row while it is labelled: its steps as tokens, and their labels."""

    row_id: str
    row: Mapping[str, Any]
    steps: list[str]
    prompt_ids: list[int]
    step_ids: list[list[int]]
    labels: list[float | None] = field(default_factory=list)

    def prefix_ids(self, count: int) -> list[int]:
        """The tokens of the prompt and the first ``count`` steps."""
        return self.prompt_ids + [token for ids in self.step_ids[:count] for token in ids]

    def longest_prefix(self) -> tuple[str, int, str]:
        """The row's id, the length of the longest prefix to complete (0 for a single step), and words for messages."""
        count = len(self.steps) - 1
        said = f"its prompt and first {count} steps have"
        return self.row_id, len(self.prefix_ids(count)) if count else 0, said


def label_steps(
    rows: Iterable[Mapping[str, Any]],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    verify: Verifier,
    *,
    num_samples: int = 8,
    labels: Literal["soft", "hard"] = "soft",
    step_separator: str = "\n",
    sampling: SamplingParams | None = None,
    success: float = 0.5,
    skip_after_failure: bool = False,
    prompt_tokens: PromptTokens | None = None,
    max_length: int | None = None,
    on_too_long: OnTooLong = "drop",
    skipped: Counter[str] | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    r"""Labels each step by how often completions from there reach the right answer.

    Paper: Math-Shepherd (Wang et al., 2023, arXiv:2312.08935). With N = ``num_samples`` completions of the prompt and
    the steps up to i, and c_i the number of right ones:

        soft  y_i = c_i / N        hard  y_i = 1 if c_i > 0 else 0

    The last step is labelled by the solution's own answer, since nothing is left to sample. Departure: with
    ``skip_after_failure``, once no completion of a *wrong* solution succeeds, its remaining steps are labelled 0
    without sampling (as in the search for the first error of OmegaPRM, Luo et al., 2024, arXiv:2406.06592). The steps
    of a right solution are all sampled: its own answer shows that a failed prefix could be saved.

    A sample is a function of the model, the settings and (``seed``, the row's id, the step's number, the sample's).

    Args:
        rows: ``prompt`` (text or chat messages) and ``completions`` (the steps), or ``completion`` or ``response``,
            which is split at the separator; ``row_id`` if there is one, else the row's number names it. Further columns
            hold the verifier's inputs (``answer``).
        engine: completes prefixes.
        tokenizer: the engine's.
        verify: called as ``verify(prompts, completions, **columns)`` with whole solutions, and the columns that it
            takes; returns one reward each, ``None`` without a verdict.
        num_samples: N, at least 1.
        labels: ``soft`` or ``hard``.
        step_separator: ends each step; at least one character.
        sampling: settings of the completions; its own seed is not read.
        success: smallest reward of a right answer.
        skip_after_failure: see above.
        prompt_tokens: returns a row's prompt as tokens; by default the tokenizer encodes it.
        max_length: maximum tokens of a prompt and all steps but the last, at least 1; limited by the engine's own
            maximum.
        on_too_long: ``drop`` a longer row, or ``error``.
        skipped: counts the rows that are skipped, under ``"too long"`` and ``"without verdict"``.
        seed: see above.

    Yields:
        The rows in order, with ``completions`` (the steps), ``labels`` and all other columns, as ``StepwiseDataModule``
        reads them. Rows that are too long, or that the verifier cannot judge, are skipped; one warning at the end
        reports their number, unless ``skipped`` counts them.

    Raises:
        ValueError: an option out of range, a row without prompt or steps, or, with ``error``, one that is too long.

    Example:
        >>> from rlhf_lightning.rewards.exact_answer import exact_answer
        >>> rows = [{"prompt": "1+2=?", "completions": ["1+2=3", "#3"], "answer": "3"}]
        >>> next(label_steps(rows, engine, tokenizer, exact_answer))["labels"]  # doctest: +SKIP
        [0.75, 1.0]
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1 (8 is usual)")
    if labels not in ("soft", "hard"):
        raise ValueError(f"labels is {labels!r}; it must be one of soft, hard")
    _check_separator(step_separator)
    params = replace(sampling or SamplingParams(), seed=seed)
    limit = _Limit.of(engine, params, max_length, on_too_long)
    labeller = _Labeller(engine, tokenizer, verify, num_samples, step_separator, params, success, prompt_tokens, seed)

    # Answers first: a row without a verdict needs no completions.
    numbered, lost = enumerate(rows), Counter[str]() if skipped is None else skipped
    while part := [labeller.read(number, row) for number, row in islice(numbered, _ROWS_AT_ONCE)]:
        chunk = [solution for solution in part if limit.allows(*solution.longest_prefix())]
        labeller.judge_answers(chunk)
        judged = [solution for solution in chunk if solution.labels]
        lost.update({TOO_LONG: len(part) - len(chunk), UNJUDGED: len(chunk) - len(judged)})
        labeller.judge_prefixes(judged, skip_after_failure=skip_after_failure)
        for solution in judged:
            values = [float(value or 0.0) for value in solution.labels]
            if labels == "hard":
                values = [float(value > 0) for value in values]
            rest = {k: v for k, v in solution.row.items() if k not in ("completion", "response")}
            yield {**rest, "completions": solution.steps, "labels": values}
    if skipped is None and lost.total():
        reasons = f"{lost[TOO_LONG]} are too long, and the verifier gives no verdict on {lost[UNJUDGED]}"
        warnings.warn(f"{lost.total()} rows were skipped: {reasons}", stacklevel=2)


@dataclass
class _Labeller:
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    verify: Verifier
    num_samples: int
    separator: str
    sampling: SamplingParams
    success: float
    prompt_tokens: PromptTokens | None
    seed: int

    def read(self, number: int, row: Mapping[str, Any]) -> _Solution:
        """Reads a row's prompt and steps, and encodes them."""
        row_id = str(row.get("row_id", f"rows:{number}"))
        prompt, steps = row.get("prompt"), row.get("completions")
        if steps is None:
            text = row.get("completion") if row.get("completion") is not None else row.get("response")
            steps = text.split(self.separator) if isinstance(text, str) else None
        steps = [step for step in steps or () if step]
        if not prompt or not steps or not all(isinstance(step, str) for step in steps):
            raise ValueError(
                f"row {row_id} has the columns {sorted(row)}; it needs a prompt, and completions (a list of steps) or "
                "completion (a text of at least one step)"
            )

        # Tokenized step by step, as the datamodule of process reward models does.
        steps = [readable(step) for step in steps]
        step_ids = [encode(self.tokenizer, step + self.separator, continues=True) for step in steps]
        prompt_ids = list(self.prompt_tokens(row)) if self.prompt_tokens else _prompt_ids(self.tokenizer, row)
        return _Solution(row_id, row, steps, prompt_ids, step_ids)

    def judge_answers(self, solutions: Sequence[_Solution]) -> None:
        """Labels last steps by the solutions' answers; a solution without a verdict gets no labels."""
        if not solutions:
            return
        texts = [self._text(solution, len(solution.steps)) for solution in solutions]
        for solution, reward in zip(solutions, self._rewards(solutions, texts), strict=True):
            if reward is not None:
                solution.labels = [None] * (len(solution.steps) - 1) + [float(reward >= self.success)]

    def judge_prefixes(self, solutions: Sequence[_Solution], *, skip_after_failure: bool) -> None:
        """Labels all steps but the last ones by sampling."""
        tasks = [(solution, count) for solution in solutions for count in range(1, len(solution.steps))]
        if not skip_after_failure:
            self._sample(tasks)
            return
        # Step by step, because whether a step is sampled depends on the one before it.
        for count in range(1, max((len(s.steps) for s in solutions), default=1)):
            self._sample([task for task in tasks if task[1] == count and not _given_up(task[0], count)])

    def _sample(self, tasks: Sequence[tuple[_Solution, int]]) -> None:
        """Completes prefixes and labels their last steps."""
        if not tasks:
            return
        tokens = [solution.prefix_ids(count) for solution, count in tasks]
        prompts = [begun_prompt(solution.row["prompt"], self._text(solution, count)) for solution, count in tasks]
        columns = columns_of([_given(solution.row) for solution, _ in tasks])
        # Seeds depend on row, step and sample, so that an interrupted run continues with the same samples.
        seeds = [
            [derive_seed(self.seed, solution.row_id, count, sample) for sample in range(self.num_samples)]
            for solution, count in tasks
        ]
        groups = ask(self.engine, prompts, tokens, self.num_samples, self.sampling, seeds=seeds, columns=columns)
        owners = [solution for solution, _ in tasks for _ in range(self.num_samples)]
        texts = [
            self._text(solution, count) + completion.text
            for (solution, count), group in zip(tasks, groups, strict=True)
            for completion in group
        ]
        rewards = self._rewards(owners, texts)
        for n, (solution, count) in enumerate(tasks):
            sample_rewards = rewards[n * self.num_samples : (n + 1) * self.num_samples]
            right = sum(reward is not None and reward >= self.success for reward in sample_rewards)
            solution.labels[count - 1] = right / self.num_samples

    def _text(self, solution: _Solution, count: int) -> str:
        return "".join(step + self.separator for step in solution.steps[:count])

    def _rewards(self, solutions: Sequence[_Solution], texts: Sequence[str]) -> Sequence[float | None]:
        given = ("completions", "completion")
        rows = [{name: value for name, value in one.row.items() if name not in given} for one in solutions]
        return check_verdicts(score_texts(self.verify, rows, texts), len(texts))


def _given_up(solution: _Solution, count: int) -> bool:
    """Whether no completion of a wrong solution succeeded from a step before the last of ``count``."""
    return solution.labels[-1] == 0.0 and 0.0 in solution.labels[: count - 1]


@dataclass(frozen=True)
class _Limit:
    """The maximum length of a prefix to complete, and the treatment of longer ones."""

    tokens: int | None
    on_too_long: OnTooLong

    @classmethod
    def of(cls, engine: Engine, params: SamplingParams, max_length: int | None, on_too_long: OnTooLong) -> _Limit:
        """Takes the smaller one of ``max_length`` and the engine's limit, if it reports one."""
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for what the engine takes")
        if on_too_long not in get_args(OnTooLong):
            raise ValueError(f"on_too_long is {on_too_long!r}; it must be one of {', '.join(get_args(OnTooLong))}")
        ask: Callable[[SamplingParams], int | None] | None = getattr(engine, "longest_prompt", None)
        limits = [limit for limit in (max_length, ask(params) if ask else None) if limit is not None]
        return cls(min(limits, default=None), on_too_long)

    def allows(self, row_id: str, length: int, said: str) -> bool:
        """Whether a prefix of ``length`` tokens may be completed.

        Raises:
            ValueError: it is too long, with ``on_too_long="error"``.
        """
        if self.tokens is None or length <= self.tokens:
            return True
        if self.on_too_long == "drop":
            return False
        raise ValueError(
            f"row {row_id} is too long: {said} {length} tokens, and at most {self.tokens} can be completed: shorten "
            "it, or set on_too_long to drop"
        )


def _check_separator(step_separator: str) -> None:
    if not step_separator:
        raise ValueError("step_separator is ''; it must have at least one character, such as a line's end")


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    if isinstance(row["prompt"], str):
        return prompt_tokens(tokenizer, row["prompt"])
    template = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        template["tools"] = row["tools"]
    return encode(tokenizer, ChatTemplate(tokenizer).context(row["prompt"], template))
