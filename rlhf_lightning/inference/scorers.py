"""Scorers of whole and partial solutions by reward models and process reward models.

A scorer reads the policy's own tokens where the scoring model has the policy's tokenizer, so that nothing is encoded
again, and computes a prompt, and what solutions of it begin with in common, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.lengths import longest
from ..data.text_tokens import encode
from ..losses.process_reward import AGGREGATIONS, Aggregation
from ..models import ProcessRewardModel, RewardModel
from ..models.loading import locate
from ..models.scoring import prefix_examples
from ..sequences import Segment
from ..utils.validation import check_choice, check_not_negative
from .completion import decode
from .step_ends import step_ends
from .strategy import Candidate, Scores
from .text_scorers import (
    Dtype,
    PackedScorer,
    PaddedScorer,
    check_ensemble,
    check_unloaded,
    computing_in,
    load_scorer,
    loading_options,
    move,
    same_tokens,
)
from .token_counts import read_once


class RewardScorer:
    """Scores solutions by an outcome reward model.

    An ensemble's score is its mean less ``uncertainty_penalty`` standard deviations over its members (Coste et al.,
    2023, arXiv:2310.02743). A whole solution is read with its end, as in training; a partial one as it is so far,
    which only a reward model with the policy's tokenizer can do.

    Args:
        model: folder or hub id of an exported reward model or of any sequence classifier; or a ``RewardModel``.
        uncertainty_penalty: at least 0; only for ensembles.
        label: of several outputs, the one that is the score; only with a folder or hub id, as the next two.
        micro_batch_tokens: tokens per forward, at least 1, 8192 by default; changes no score.
        dtype: of the weights, ``float32`` by default.

    Raises:
        ValueError: the folder holds no reward model, or an option is out of range, or of no use to a loaded model.

    Example::

        BestOfN(engine, scorer=RewardScorer("runs/reward/model"), n=16)
    """

    def __init__(
        self,
        model: str | RewardModel,
        *,
        uncertainty_penalty: float = 0.0,
        label: str | None = None,
        micro_batch_tokens: int | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        check_not_negative("uncertainty_penalty", uncertainty_penalty, "0 is the ensemble's plain mean")
        self.uncertainty_penalty = uncertainty_penalty
        self.scorer: PackedScorer | PaddedScorer
        if isinstance(model, RewardModel):
            check_unloaded(label=label, micro_batch_tokens=micro_batch_tokens, dtype=dtype)
            self.scorer = PackedScorer(model)
            check_ensemble("the model", self.scorer.num_members, uncertainty_penalty)
        else:
            self.scorer = load_scorer(
                str(model),
                label=label,
                penalty=uncertainty_penalty,
                **loading_options(micro_batch_tokens, dtype),
            )
        self._tokenizer: Any = None

    def attach(self, engine: Any) -> None:
        """Moves to an engine's device, and checks whether both tokenizers agree."""
        self._tokenizer = getattr(engine, "tokenizer", None)
        self.scorer.attach(device_of(engine, self.scorer.model), self._tokenizer)

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates.

        Raises:
            ValueError: one is too long, or partial and of another tokenizer.
        """
        encoded = [self._encoded(candidate) for candidate in candidates]
        if isinstance(self.scorer, PaddedScorer):
            values, tokens = self.scorer.score(encoded), [len(each["input_ids"]) for each in encoded]
        else:
            values, tokens = packed_values(self.scorer.model, encoded), self._counts(candidates, encoded)
        scores = [float(v.mean() - self.uncertainty_penalty * v.std(correction=0)) for v in values]
        return Scores(scores, tokens)

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        encoded = self._encoded(candidate)
        return len(encoded["input_ids"]) if isinstance(encoded, dict) else longest(encoded)

    def _encoded(self, candidate: Candidate) -> Any:
        prompt = _prompt_of(candidate, self._tokenizer)
        ids = (candidate.query.token_ids, candidate.answer_ids) if candidate.answer_ids else (None, None)
        return self.scorer.encode(prompt, candidate.text, {}, *ids, ended=candidate.finish_reason is not None)

    def _counts(self, candidates: Sequence[Candidate], trees: Sequence[Segment]) -> list[int]:
        if self.scorer.model.options.pooling == "last":
            return read_once(candidates, [_path(tree) for tree in trees])
        # A mean over a solution's states reads every token of it for itself.
        return _prompts_once(candidates, trees)


class ProcessScorer:
    """Scores solutions by the probabilities of their steps under a process reward model.

    Args:
        model: folder or hub id of an exported process reward model; or a ``ProcessRewardModel``.
        aggregation: of the steps' probabilities: ``min``, ``product``, ``last``, ``mean``; the model's own by default.
        outcome_weight: share of the outcome head's probability at the last step, in [0, 1]; needs a model with an
            outcome head.
        micro_batch_tokens: tokens per forward, at least 1, 8192 by default; changes no score. Only with a folder or hub
            id, as the next one.
        dtype: of the weights, ``float32`` by default.

    Raises:
        ValueError: the folder holds no such model, or an option is out of range, or of no use to a loaded model.

    Example::

        MCTS(engine, scorer=ProcessScorer("runs/process_reward/model", aggregation="min"))
    """

    def __init__(
        self,
        model: str | ProcessRewardModel,
        *,
        aggregation: Aggregation | None = None,
        outcome_weight: float = 0.0,
        micro_batch_tokens: int | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        if aggregation is not None:
            check_choice("aggregation", aggregation, AGGREGATIONS)
        if not 0 <= outcome_weight <= 1:
            raise ValueError(f"outcome_weight is {outcome_weight}; it must be in [0, 1] (0 reads the steps alone)")
        if isinstance(model, ProcessRewardModel):
            check_unloaded(micro_batch_tokens=micro_batch_tokens, dtype=dtype)
            self.model = model
        else:
            options = loading_options(micro_batch_tokens, dtype)
            self.model = ProcessRewardModel.from_pretrained(locate(model, what="process reward model"), **options)
        # Of this scorer alone: others may score by the same model.
        self.aggregation: Aggregation = aggregation or self.model.options.aggregation
        if outcome_weight and not self.model.options.outcome_head:
            raise ValueError(
                f"outcome_weight is {outcome_weight}, and the process reward model has no outcome head: use 0, or "
                "train a ProcessRewardModule with outcome_head=True"
            )
        self.outcome_weight = outcome_weight
        self._tokenizer: Any = None
        self._same_tokens = False

    def attach(self, engine: Any) -> None:
        """Moves to an engine's device, and checks whether both tokenizers agree."""
        self._tokenizer = getattr(engine, "tokenizer", None)
        self._same_tokens = self._tokenizer is not None and same_tokens(self.model.rows.tokenizer, self._tokenizer)
        move(self.model, device_of(engine, self.model))

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores candidates; one without a step has the score of no mistake, 1.

        Raises:
            ValueError: one is too long.
        """
        places = [number for number, candidate in enumerate(candidates) if self._has_steps(candidate)]
        trees = [self._encoded(candidates[number]) for number in places]
        with computing_in(None, self.model.device):
            found = self.model.score_trees(trees)
        values = self.model.aggregated([value[:, 0].tolist() for value in found], self.aggregation)
        scores, tokens = [1.0] * len(candidates), [0] * len(candidates)
        counts = _prompts_once([candidates[number] for number in places], trees)
        for number, score, value, count in zip(places, values, found, counts, strict=True):
            outcome = float(value[-1, 2]) if self.outcome_weight else 0.0
            scores[number] = (1 - self.outcome_weight) * score + self.outcome_weight * outcome
            tokens[number] = count
        return Scores(scores, tokens)

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads."""
        return self._encoded(candidate).num_tokens if self._has_steps(candidate) else 0

    def _has_steps(self, candidate: Candidate) -> bool:
        return bool(self.model.split(candidate.text))

    def _encoded(self, candidate: Candidate) -> Segment:
        """Weighs the ends of the steps in the policy's tokens, or encodes the texts."""
        ids, text = list(candidate.answer_ids), candidate.text
        read = self._same_tokens and bool(ids) and not self.model.options.learns_boundaries
        if not read or not decode(self._tokenizer, ids).startswith(text):
            return self.model.encode(_prompt_of(candidate, self._tokenizer), text)
        separator = self.model.options.step_separator
        # In training every step ends with the separator, the last one too, and no end-of-sequence token follows.
        while ids and not decode(self._tokenizer, ids[-1:]):
            ids.pop()
        if not text.endswith(separator):
            text += separator
            if not decode(self._tokenizer, ids).endswith(separator):
                ids += encode(self._tokenizer, separator, continues=True)
        weights = [0.0] * len(ids)
        for end in step_ends(ids, text, separator, self._tokenizer):
            weights[end] = 1.0
        tree = Segment(list(candidate.query.token_ids), None, (Segment(ids, weights),))
        self.model.check_length(tree)
        return tree


def device_of(engine: Any, model: Any) -> torch.device:
    """Returns the device of an engine's model; of a remote engine, the scoring model's own."""
    policy = getattr(engine, "model", None)
    inner = getattr(engine, "engine", None)
    if isinstance(policy, torch.nn.Module):
        first: Tensor = next(policy.parameters())
        return first.device
    if inner is not None:
        return device_of(inner, model)
    own: Tensor = next(model.parameters())
    return own.device


def _prompt_of(candidate: Candidate, tokenizer: Any) -> Any:
    """Returns a query's prompt as text or messages; token ids are decoded."""
    prompt = candidate.query.prompt
    if isinstance(prompt, str) or tokenizer is None:
        return prompt
    ids = list(prompt)
    return tokenizer.decode(ids, skip_special_tokens=True) if ids and isinstance(ids[0], int) else prompt


def packed_values(model: RewardModel, trees: Sequence[Segment]) -> list[Tensor]:
    """Scores solutions with a reward model; those of one prompt share all tokens that they begin with.

    Returns:
        For each solution the scores by the ensemble's members, ``(M,)``.
    """
    with computing_in(None, model.device):
        if model.options.pooling != "last":
            # A mean over a solution's states reads every token of it for itself.
            values = model.score_trees(trees)
        else:
            examples, numbers = prefix_examples(trees, model.micro_batch_tokens)
            values = [torch.empty(0)] * len(trees)
            for places, found in zip(numbers, model.score_examples(examples), strict=True):
                for leaf, value in zip(places, found, strict=True):
                    for place in leaf:
                        values[place] = value
    return [model.options.combined(value).float() for value in values]


def _path(tree: Segment) -> list[int]:
    return [token for segment in next(tree.paths()) for token in segment.tokens.tolist()]


def _prompts_once(candidates: Sequence[Candidate], trees: Sequence[Segment]) -> list[int]:
    """Counts the tokens of each tree; a prompt, for the first of its query."""
    seen: set[tuple[int, bytes]] = set()
    counts = []
    for candidate, tree in zip(candidates, trees, strict=True):
        key = id(candidate.query), tree.tokens.tobytes()
        counts.append(tree.num_tokens - (len(tree.tokens) if key in seen else 0))
        seen.add(key)
    return counts
