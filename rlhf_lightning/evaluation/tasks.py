"""Tasks that models answer: named prompts, how they are answered, and what verifies the answers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, ClassVar

from ..data.final_answer import answer_key
from ..inference import SamplingParams
from ..metrics.at_k import MOST_SAMPLES, expected_best, majority_at_k, pass_at_k, usual_ks
from ..metrics.texts import distinct_n, length_statistics, repetition, unique_share
from ..utils.messages import did_you_mean
from ..utils.validation import check_count
from .options import check_options
from .samples import PromptResult
from .sections import section_metrics, section_scores
from .win_rate import WinOptions

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
        columns: names of the prompts' columns in their file: ``{prompt: question, answer: solution}``.
        success: least reward of a right answer.
        votes: whether answers can be compared, for maj@k and the share of unique answers: they need a final
            answer that ``data.answer_key`` reads.
        scorer: a reward function, such as one by a reward model: best@k is then estimated, the share of right ones
            among the best of k samples by its scores.
        chat_template_kwargs: passed to the chat template; the rows' own take precedence.
        section: a column of the prompts by whose values the accuracy is also given.
        win_rate: how answers are compared with the first model's: ``reward``, ``score`` (by the scorer), or the options
            of ``win_rate.WinOptions``, such as a judge.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> Task(name="sums", prompts="sums:prompts?rows=8", num_samples=6).ks
        (1, 2, 4, 6)
    """

    kind: ClassVar[str] = "answers"
    name: str
    prompts: str | list[str]
    verifier: str | dict[str, Any] = _EXACT
    num_samples: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    strategy: str | dict[str, Any] | None = None
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    success: float = 0.5
    votes: bool = True
    scorer: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    section: str | None = None
    win_rate: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ValueError(f"the name of a task is {self.name!r}; write a text without '/', such as arithmetic")
        check_count("num_samples", self.num_samples, "1 answers greedily")
        if self.limit is not None:
            check_count("limit", self.limit, "null reads all prompts")
        self._check_types()
        allowed = [f.name for f in fields(SamplingParams) if f.name != "seed"]
        for key in self.sampling:
            if key not in allowed:
                raise ValueError(f"sampling of task {self.name!r} has no key {key!r}{did_you_mean(str(key), allowed)}")
        try:
            _ = self.params
        except (TypeError, ValueError) as error:
            raise ValueError(f"sampling of task {self.name!r} is {self.sampling!r}: {error}") from error
        if self.num_samples > MOST_SAMPLES and (self.votes or self.scorer is not None):
            raise ValueError(
                f"num_samples of task {self.name!r} is {self.num_samples}; maj@k and best@k take at most "
                f"{MOST_SAMPLES}: draw fewer, or set votes to false and leave out the scorer"
            )
        if self.num_samples > 1 and self.strategy is None and self.params.temperature == 0:
            raise ValueError(
                f"task {self.name!r} draws {self.num_samples} samples at temperature 0, which are all equal: raise "
                "sampling.temperature, or set num_samples to 1"
            )

        if self.win_rate is not None and self.wins.by == "score" and self.scorer is None:
            raise ValueError(
                f"win_rate of task {self.name!r} compares scores: give it a scorer, such as a reward model"
            )

    def _check_types(self) -> None:
        success: Any = self.success
        if isinstance(success, bool) or not isinstance(success, int | float) or not math.isfinite(success):
            raise ValueError(f"success of task {self.name!r} is {success!r}; it must be a finite number (0.5 is usual)")
        check_options(
            self,
            {"votes": bool, "section": str | None, "sampling": Mapping, "chat_template_kwargs": Mapping},
            names=("columns",),
        )

    @property
    def wins(self) -> WinOptions:
        """The options of its win rates."""
        return WinOptions.read(self.win_rate)

    @property
    def params(self) -> SamplingParams:
        """The settings of its samples."""
        return SamplingParams(**(_GREEDY if self.num_samples == 1 else _SAMPLED) | self.sampling)

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k: powers of two, and the number of samples."""
        return usual_ks(self.num_samples)

    def as_dict(self) -> dict[str, Any]:
        """Returns its options."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def share(self, prompt: PromptResult) -> float | None:
        """Returns the share of a prompt's samples that are right, of those with a verdict; ``None`` without any."""
        right = prompt.right(self.success)
        return fmean(right) if right else None

    def metrics(self, prompts: Sequence[PromptResult]) -> dict[str, float]:
        """Computes estimates at k, rewards, diversity, lengths and the accuracy of sections."""
        samples = [sample for prompt in prompts for sample in prompt.samples]
        texts, rewards = [s.text for s in samples], [s.reward for s in samples if s.reward is not None]
        found = {
            "reward": fmean(rewards or [math.nan]),
            **{name: fmean(values.values()) for name, values in self.at_k(prompts).items()},
            **{f"length/{name}": value for name, value in length_statistics([s.num_tokens for s in samples]).items()},
            "truncated": fmean(not sample.ended for sample in samples),
            "repetition": fmean(map(repetition, texts)),
            "distinct_1": distinct_n(texts, 1),
            "distinct_2": distinct_n(texts, 2),
        }
        if self.num_samples > 1 and self.votes:
            shares = [unique_share([answer_key(s.text) for s in prompt.samples]) for prompt in prompts]
            found["unique_answers"] = fmean([share for share in shares if not math.isnan(share)] or [math.nan])
        judged = [(prompt.section, self.share(prompt)) for prompt in prompts]
        rows = [(section, share) for section, share in judged if section is not None and share is not None]
        return found | section_metrics(section_scores(rows))

    def at_k(self, prompts: Sequence[PromptResult]) -> dict[str, dict[str, float]]:
        """Estimates pass@k, maj@k and best@k of each prompt whose samples all have verdicts, by name and row."""
        judged = [p for p in prompts if len(p.right(self.success)) == len(p.samples) == self.num_samples]
        if self.num_samples == 1 or not judged:
            return {}
        found = {}
        for k in self.ks:
            found[f"pass@{k}"] = {
                prompt.row_id: pass_at_k(self.num_samples, sum(prompt.right(self.success)), k) for prompt in judged
            }
            if self.votes:
                found[f"maj@{k}"] = {prompt.row_id: majority_at_k(*self._votes(prompt), k) for prompt in judged}
        scored = [prompt for prompt in judged if all(sample.score is not None for sample in prompt.samples)]
        if scored:
            curves = {
                prompt.row_id: expected_best(
                    [s.score or 0.0 for s in prompt.samples], [float(r) for r in prompt.right(self.success)]
                )
                for prompt in scored
            }
            found |= {f"best@{k}": {row: curve[k - 1] for row, curve in curves.items()} for k in self.ks}
        return found

    def _votes(self, prompt: PromptResult) -> tuple[list[Hashable | None], list[float]]:
        answers = [answer_key(sample.text) for sample in prompt.samples]
        return answers, [float((sample.reward or 0.0) >= self.success) for sample in prompt.samples]

    def shown(self, prompt: PromptResult) -> str:
        """Describes a prompt's results for the page: its first sample."""
        return prompt.samples[0].text if prompt.samples else "(the prompt leaves no room for an answer)"
