"""Learned reward models as reward functions. Their weights are frozen and in no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ..core.device_precision import frozen_dtype
from ..inference.text_scorers import DTYPES, Dtype, computing_in, load_scorer, move, row_templates
from ..losses.process_reward import Aggregation
from ..models import ProcessRewardModel
from ..models.loading import locate
from ..utils.validation import check_choice, check_count, check_not_negative

RewardDtype = Literal["auto"] | Dtype
_DTYPES = {**DTYPES, "auto": torch.float32}


class RewardModelReward:
    """Rewards completions with a learned reward model.

    An ensemble's reward is its mean less ``uncertainty_penalty`` standard deviations over its members, which keeps a
    policy away from regions of disagreement (Coste et al., 2023, arXiv:2310.02743: uncertainty-weighted optimisation).

    Exports of ``RewardModule``, and sequence classifiers on a decoder with one linear layer, run packed, and read their
    training format: prompt, completion, end-of-sequence token (added to truncated completions, too). They read the
    sampled tokens themselves if the policy's tokenizer is the reward model's (vocabulary and chat template) and the
    tokens decode to the completion's text; else the texts, tokenised like the reward model's training data. Other
    sequence classifiers of transformers run padded, on pairs of prompt and completion as their tokenizer joins them, or
    on the chat in their template. A sample that is too long for the reward model counts as failed.

    Args:
        model: folder or hub id of an exported reward model, or of any sequence classifier.
        uncertainty_penalty: at least 0; only for ensembles.
        label: of a classifier with several outputs, the name of the one whose logit is the reward; of a reward model
            with several attributes, the one to use instead of their weighted sum.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights; ``auto``: ``float32``, with products in bf16 where the policy is trained so on a GPU.
        chat_template_kwargs: passed to the reward model's chat template; the rows' own take precedence.

    Raises:
        ValueError: the folder holds no reward model, or an option is out of range.

    Example::

        GRPOModule("my-sft-model", rewards=[RewardModelReward("my-reward-model")])
    """

    def __init__(
        self,
        model: str,
        uncertainty_penalty: float = 0.0,
        label: str | None = None,
        micro_batch_tokens: int = 8192,
        dtype: RewardDtype = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_not_negative("uncertainty_penalty", uncertainty_penalty, "0 is the ensemble's plain mean")
        check_count("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
        check_choice("dtype", dtype, _DTYPES)
        self.dtype = dtype
        self.uncertainty_penalty = uncertainty_penalty
        self.scorer = load_scorer(
            model,
            label=label,
            micro_batch_tokens=micro_batch_tokens,
            dtype=_DTYPES[dtype],
            penalty=uncertainty_penalty,
        )
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def attach(self, module: Any) -> None:
        """Moves to a policy's device, and checks whether both tokenizers agree."""
        half = frozen_dtype(module) if self.dtype == "auto" else None
        self.scorer.attach(module.device, module.tokenizer, half)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[float | Exception]:
        """Scores each completion; returns an exception where that is not possible.

        Args:
            prompts: texts, or lists of chat messages.
            completions: texts.
            prompt_ids: the prompts' tokens, if the completions were sampled from them.
            completion_ids: the completions' tokens.
            tools: tools of the prompts' chats.
            chat_template_kwargs: the rows' chat template settings.
        """
        templates = row_templates(len(completions), self.chat_template_kwargs, tools, chat_template_kwargs)
        tokens = [(None, None)] * len(completions) if prompt_ids is None or completion_ids is None else []
        pairs: Any = tokens or zip(prompt_ids or (), completion_ids or (), strict=True)
        samples = list(zip(prompts, completions, pairs, strict=True))
        rewards: list[float | Exception] = []
        segments: list[Any] = []
        places = []
        for number, (prompt, completion, ids) in enumerate(samples):
            try:
                segments.append(self.scorer.encode(prompt, completion, templates[number], *ids))
                places.append(number)
                rewards.append(0.0)
            except ValueError as error:
                rewards.append(error)
        for number, members_M in zip(places, self.scorer.score(segments), strict=True):
            rewards[number] = float(members_M.mean() - self.uncertainty_penalty * members_M.std(correction=0))
        return rewards


class ProcessModelReward:
    """Rewards a completion with the aggregated step probabilities of a process reward model.

    A completion without steps cannot be scored. To reward the steps themselves, use ``ProcessModelSteps`` as
    ``process_reward``.

    Args:
        model: folder or hub id of an exported process reward model.
        aggregation: ``min``, ``product``, ``last`` or ``mean``; the model's own by default.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights; ``auto``: ``float32``, with products in bf16 where the policy is trained so on a GPU.
        chat_template_kwargs: passed to the model's chat template; the rows' own take precedence.

    Raises:
        ValueError: the folder holds no process reward model, or an option is out of range.

    Example::

        GRPOModule("my-sft-model", rewards=[ProcessModelReward("my-process-model", aggregation="product")])
    """

    def __init__(
        self,
        model: str,
        aggregation: Aggregation | None = None,
        micro_batch_tokens: int = 8192,
        dtype: RewardDtype = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_choice("dtype", dtype, _DTYPES)
        self.dtype = dtype
        self._half: torch.dtype | None = None
        options: dict[str, Any] = {} if aggregation is None else {"aggregation": aggregation}
        model = locate(model, what="process reward model")
        options |= {"dtype": _DTYPES[dtype], "micro_batch_tokens": micro_batch_tokens}
        self.model = ProcessRewardModel.from_pretrained(model, **options)
        self.step_separator = self.model.options.step_separator
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def attach(self, module: Any) -> None:
        """Moves to a policy's device."""
        self._half = frozen_dtype(module) if self.dtype == "auto" else None
        move(self.model, module.device, self._half)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[Any]:
        """Scores each completion."""
        templates = row_templates(len(completions), self.chat_template_kwargs, tools, chat_template_kwargs)
        places = [n for n, completion in enumerate(completions) if self.model.split(completion)]
        found: list[Any] = [None] * len(completions)
        if places:
            with computing_in(self._half, self.model.device):
                scores = self._scores(
                    [prompts[n] for n in places], [completions[n] for n in places], [templates[n] for n in places]
                )
            for n, score in zip(places, scores, strict=True):
                found[n] = score
        return found

    def _scores(
        self, prompts: Sequence[Any], completions: Sequence[str], templates: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        scores: list[float] = self.model.score(prompts, completions, templates)
        return scores


class ProcessModelSteps(ProcessModelReward):
    """Rewards every step with its probability by a process reward model, less ``baseline``; a ``process_reward``.

    Without a baseline of about a half, every further step would have a positive reward in PPO, right or wrong. GRPO's
    normalisation cancels any baseline.

    Args:
        model: folder or hub id of an exported process reward model, without ``boundaries="learned"``.
        baseline: probability above which a step's reward is positive.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights; ``auto``: ``float32``, with products in bf16 where the policy is trained so on a GPU.
        chat_template_kwargs: passed to the model's chat template; the rows' own take precedence.

    Raises:
        ValueError: the folder holds no such model, or an option is out of range.

    Example::

        PPOModule("my-sft-model", rewards=[], process_reward=ProcessModelSteps("my-process-model"))
    """

    def __init__(
        self,
        model: str,
        baseline: float = 0.5,
        micro_batch_tokens: int = 8192,
        dtype: RewardDtype = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model, micro_batch_tokens=micro_batch_tokens, dtype=dtype, chat_template_kwargs=chat_template_kwargs
        )
        if self.model.options.learns_boundaries:
            raise ValueError(
                f"the process reward model {model!r} finds the steps (boundaries='learned'), so that its rewards "
                "have no tokens to land on: use ProcessModelReward, or a model trained with a step_separator"
            )
        self.baseline = baseline

    def _scores(
        self, prompts: Sequence[Any], completions: Sequence[str], templates: Sequence[dict[str, Any]]
    ) -> Sequence[Any]:
        steps = self.model.score_steps(prompts, completions, templates)
        return [[score - self.baseline for score in scores] for scores in steps]
