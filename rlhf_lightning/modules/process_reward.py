"""Process reward models: a score at the end of every step of a solution.

Legend: E examples or pairs, S sequences, N scored tokens (the ends of steps), M steps, T tokens of completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.headed_module import HeadedModule
from ..core.sequence_rows import num_scored, pair_rows
from ..data.messages import Text
from ..distributed.collectives import Metrics, Rows
from ..losses.process_reward import Aggregation, aggregate_step_logits, step_bce_loss
from ..losses.reward import bradley_terry_loss
from ..metrics.functional import first_error_f1, first_errors
from ..metrics.rewards import pair_metrics, spread
from ..models import ProcessRewardModel
from ..models.headed_model import HeadedModel
from ..models.process_reward_model import BoundaryLogits, Solution, StepLogits
from ..models.process_reward_options import ProcessRewardModelOptions, StepHead
from ..models.scoring import TemplateSettings
from ..sequences import Example, ExampleBatch, SequenceBatch
from ..utils.validation import check_choice, check_not_negative


class ProcessRewardModule(HeadedModule):
    r"""Trains a process reward model (Lightman et al., 2023, arXiv:2305.20050), which scores every step of a solution.

    With z the logit read at the last token of a step and y in [0, 1] its label:

    .. math:: L = -\frac{1}{M} \sum y \log \sigma(z) + (1 - y) \log \sigma(-z)

    The logit is an output of a head on the hidden state (``linear``, ``mlp``), or the difference of the language
    model's own logits of two label tokens after the step (``tokens``, as in Math-Shepherd, Wang et al., 2023,
    arXiv:2312.08935).

    With ``learn_from="pairs"`` rows need no labels, but a chosen and a rejected solution in steps, and the scores of
    these are learned, with o the logit of the outcome head (0 without one) and a an ``aggregation`` of step logits
    (:func:`~rlhf_lightning.losses.process_reward.aggregate_step_logits`):

    .. math:: L = -\frac{1}{E} \sum \log \sigma(s_c - s_r), \quad s = o + w\, a(z)

    Steps end with a separator: a line break, or a marker such as ``" ки"``; ``StepwiseDataModule`` inserts the same
    one into the rows. With ``boundaries="learned"`` a second output learns at which tokens steps end, by binary
    cross-entropy over all tokens of the completions, and solutions without any separator can be scored.

    Args:
        model: Hugging Face id or folder: of a language model, or of an exported process reward model.
        step_separator: separator of steps in ``score_steps``; at least one character.
        learn_from: ``labels`` of steps, or ``pairs`` of solutions; pairs determine differences of scores alone.
        labels: ``hard`` (0 or 1), or ``soft`` (probabilities).
        head: ``linear``, ``mlp`` or ``tokens``.
        label_tokens: with ``tokens``, the texts that label right and wrong steps; one token each.
        aggregation: aggregation of step scores to a solution's score: ``min``, ``product``, ``last`` or ``mean``.
        train_on_last_step_only: learn only from the last step of each solution.
        outcome_head: also learn whether the whole solution is right, at its last token: from the field ``outcome`` (0
            to 1) if a row has one, else from its last label; or a part of the score that pairs compare.
        outcome_weight: weight of that loss, per solution, with labels; at least 0.
        step_weight: w; at least 0, and above 0 without an outcome head.
        boundaries: ``separator`` or ``learned``.
        boundary_weight: weight of the boundaries' loss, per token; at least 0.
        threshold: probability below which a step counts as wrong, in [0, 1).
        seed: seed of the head's initial weights.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = ProcessRewardModule("my-sft-model", labels="soft")
        lightning.Trainer(max_epochs=1).fit(module, StepwiseDataModule(train="steps.jsonl", global_batch_size=16))
        module.score_steps(["1+2+3=?"], ["1+2=3\n3+3=7"])
    """

    method: ClassVar[str] = "process_reward"
    model_type: ClassVar[type[HeadedModel]] = ProcessRewardModel
    default_learning_rate: ClassVar[float] = 1e-5
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "step_accuracy", "first_error_f1", "rewards/accuracies")
    contracts: ClassVar[tuple[str, ...]] = ("StepwiseDataModule",)

    def __init__(
        self,
        model: str,
        *,
        step_separator: str = "\n",
        learn_from: Literal["labels", "pairs"] = "labels",
        labels: Literal["hard", "soft"] = "hard",
        head: StepHead = "linear",
        label_tokens: tuple[str, str] = ("+", "-"),
        aggregation: Aggregation = "min",
        train_on_last_step_only: bool = False,
        outcome_head: bool = False,
        outcome_weight: float = 1.0,
        step_weight: float = 1.0,
        boundaries: Literal["separator", "learned"] = "separator",
        boundary_weight: float = 1.0,
        threshold: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = ProcessRewardModelOptions(
            head=head,
            label_tokens=label_tokens,
            step_separator=step_separator,
            labels=labels,
            aggregation=aggregation,
            outcome_head=outcome_head,
            step_weight=step_weight,
            boundaries=boundaries,
            threshold=threshold,
        )
        check_choice("learn_from", learn_from, ("labels", "pairs"))
        if learn_from == "pairs" and train_on_last_step_only:
            raise ValueError("train_on_last_step_only is of labels: with learn_from='pairs' set aggregation='last'")
        check_not_negative("outcome_weight", outcome_weight, "1 is usual")
        check_not_negative("boundary_weight", boundary_weight, "1 is usual")

        super().__init__(model, **kwargs)
        self.options = options
        self.seed = seed
        self.head = None
        self.learns_pairs = learn_from == "pairs"
        self.train_on_last_step_only = train_on_last_step_only
        self.outcome_weight = outcome_weight
        self.boundary_weight = boundary_weight

    # Learning.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts steps, trained steps, examples, and tokens of completions; of pairs, pairs and tokens."""
        if self.learns_pairs:
            count = sum(len(segment.tokens) for example in examples for segment in example.root.children)
            return {"examples": float(len(examples)), "tokens": float(count)}
        steps = float(sum(len(example.fields["labels"]) for example in examples))
        tokens = sum(len(segment.tokens) for example in examples for segment in example.root.children)
        learned = float(len(examples)) if self.train_on_last_step_only else steps
        return {"steps": steps, "learned": learned, "examples": float(len(examples)), "tokens": float(tokens)}

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Collects the labels of steps, and of solutions where these are learned; of pairs nothing."""
        if self.learns_pairs:
            return {}
        found = {"labels": np.array([float(label) for e in examples for label in e.fields["labels"]])}
        if self.options.outcome_head:
            found["outcomes"] = np.array([_outcome(example) for example in examples])
        return found

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes per example the sums of losses and of correct predictions, and the first errors; or both scores."""
        logits = self.reward_model(batch, self.layout)
        if self.learns_pairs:
            return self._pair_rows(logits, batch)
        steps_N = logits.steps_N
        labels_N = self.extra(batch)["labels"].to(steps_N.dtype)
        losses_N = step_bce_loss(steps_N, labels_N)
        last_S = batch.scored_lengths.cumsum(0) - 1
        threshold = self.options.threshold
        right_N = (steps_N.sigmoid() >= threshold) == (labels_N >= threshold)
        rows = {
            "loss": losses_N[last_S] if self.train_on_last_step_only else batch.sum_per_example(losses_N),
            "correct": batch.sum_per_example(right_N.to(losses_N.dtype)),
            "first_error": self._first_errors(labels_N, batch),
            "predicted_first_error": self._first_errors(steps_N.detach().sigmoid(), batch),
        }
        if logits.outcomes_S is not None:
            outcomes_S = self.extra(batch)["outcomes"].to(steps_N.dtype)
            rows["outcome_loss"] = step_bce_loss(logits.outcomes_S, outcomes_S)
            rows["outcome_correct"] = ((logits.outcomes_S > 0) == (outcomes_S >= 0.5)).to(losses_N.dtype)
        if logits.boundaries is not None:
            rows |= _boundary_rows(logits.boundaries, batch)
        return rows

    def _pair_rows(self, logits: StepLogits, batch: SequenceBatch) -> Rows:
        steps_S, rule = batch.scored_lengths, self.options.aggregation
        aggregated_S = aggregate_step_logits(logits.steps_N, batch.sequence_index, steps_S, aggregation=rule)
        scores_S = self.options.step_weight * aggregated_S
        if logits.outcomes_S is not None:
            scores_S = scores_S + logits.outcomes_S
        rows = pair_rows("{}_scores", scores_S)
        if logits.boundaries is not None:
            of_sequences = _boundary_rows(logits.boundaries, batch)
            rows |= {name: values_S.view(-1, 2).sum(dim=1) for name, values_S in of_sequences.items()}
        return rows

    def _first_errors(self, scores_N: Tensor, batch: SequenceBatch) -> Tensor:
        return first_errors(scores_N, batch.sequence_index, batch.num_sequences, self.options.threshold)

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Adds the mean over steps, or over pairs, and the weighted means over solutions and tokens."""
        if self.learns_pairs:
            losses = bradley_terry_loss(rows["chosen_scores"], rows["rejected_scores"])
            total = losses.sum() / normalizers["examples"]
        else:
            total = rows["loss"].sum() / normalizers["learned"]
        if self.options.outcome_head and not self.learns_pairs:
            total = total + self.outcome_weight * rows["outcome_loss"].sum() / normalizers["examples"]
        if self.options.learns_boundaries:
            total = total + self.boundary_weight * rows["boundary_loss"].sum() / normalizers["tokens"]
        return total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes step accuracy, and accuracies and F1 of the first error where they are defined; or of pairs."""
        values = self._pair_metrics(rows) if self.learns_pairs else self._label_metrics(rows, normalizers)
        if self.options.learns_boundaries:
            values["boundary_accuracy"] = rows["boundary_correct"].sum() / normalizers["tokens"]
        return values

    def _pair_metrics(self, rows: Rows) -> Metrics:
        scores_E2 = torch.stack([rows["chosen_scores"], rows["rejected_scores"]], dim=1)
        tie_E = torch.zeros(len(scores_E2), dtype=torch.bool, device=scores_E2.device)
        return spread(scores_E2) | pair_metrics(*scores_E2.unbind(dim=1), tie_P=tie_E, calibration=not self.training)

    def _label_metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        found = first_error_f1(rows["predicted_first_error"], rows["first_error"])
        values = {
            "step_accuracy": rows["correct"].sum() / normalizers["steps"],
            "first_error_f1": found.f1,
            "accuracy_with_error": found.with_error,
            "accuracy_without_error": found.without_error,
        }
        values = {name: value for name, value in values.items() if not value.isnan()}
        if self.options.outcome_head:
            values["outcome_accuracy"] = rows["outcome_correct"].sum() / normalizers["examples"]
        return values

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        if self.learns_pairs:
            _check_pairs(examples)
            return examples
        for example in examples:
            labels, steps = example.fields.get("labels"), num_scored(example)
            if not isinstance(labels, Sequence) or len(steps) != 1 or len(labels) != steps[0] or not labels:
                count = len(labels) if isinstance(labels, Sequence) else "no"
                raise ValueError(
                    f"row {example.row_id} has {' and '.join(map(str, steps))} steps and {count} labels; it must have "
                    "one label for each of at least one step: use StepwiseDataModule (for pairs learn_from='pairs')"
                )
            for number, label in enumerate(labels, start=1):
                self._check_label(example.row_id, number, label)
            _outcome(example)
        return examples

    def _check_label(self, row_id: str, number: int, label: Any) -> None:
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(f"row {row_id} has the label {label!r} at step {number}; it must be in [0, 1]")
        if self.options.labels == "hard" and label not in (0, 1):
            raise ValueError(
                f"row {row_id} has the label {label!r} at step {number}; hard labels are 0 or 1: set labels='soft'"
            )

    # Scoring.

    def score_steps(
        self, prompts: Sequence[Text], completions: Sequence[Solution], chat_template_kwargs: TemplateSettings = None
    ) -> list[list[float]]:
        """Computes the probability that each step is right, as ``ProcessRewardModel.score_steps`` does."""
        found: list[list[float]] = self.scorer().score_steps(prompts, completions, chat_template_kwargs)
        return found

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Solution], chat_template_kwargs: TemplateSettings = None
    ) -> list[float]:
        """Computes one score per completion by aggregating its steps' probabilities, as ``ProcessRewardModel`` does."""
        found: list[float] = self.scorer().score(prompts, completions, chat_template_kwargs)
        return found

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows.

        Returns:
            Per row ``row_id``, ``steps`` (probabilities) and ``score`` (their aggregation); of a pair two of each.
        """
        rows = []
        for example, values in zip(batch.examples, self.reward_model.score_examples(batch.examples), strict=True):
            steps = [solution[:, 0].tolist() for solution in values]
            scores = self.reward_model.aggregated(steps)
            single = len(steps) == 1
            own = {"steps": steps[0], "score": scores[0]} if single else {"steps": steps, "score": scores}
            rows.append({"row_id": example.row_id, **own})
        return rows


def _check_pairs(examples: Sequence[Example]) -> None:
    for example in examples:
        steps = num_scored(example)
        if len(steps) != 2 or 0 in steps:
            raise ValueError(
                f"row {example.row_id} has {' and '.join(map(str, steps))} steps; learn_from='pairs' needs a chosen "
                "and a rejected solution of at least one step each: use StepwiseDataModule with rows of prompt, chosen "
                "and rejected"
            )


def _boundary_rows(boundaries: BoundaryLogits, batch: SequenceBatch) -> Rows:
    """Computes losses and accuracy of the predicted ends of steps, per example."""
    logits_T, sequence_T, is_end_T = boundaries
    losses_T = step_bce_loss(logits_T, is_end_T)
    right_T = ((logits_T > 0) == (is_end_T > 0)).to(losses_T.dtype)
    zeros_S = losses_T.new_zeros(batch.num_sequences)
    return {
        "boundary_loss": zeros_S.index_add(0, sequence_T, losses_T),
        "boundary_correct": zeros_S.index_add(0, sequence_T, right_T),
    }


def _outcome(example: Example) -> float:
    """Returns whether a solution is right: the row's ``outcome``, else its last label."""
    outcome = example.fields.get("outcome")
    if outcome is None:
        return float(example.fields["labels"][-1])
    if not isinstance(outcome, int | float) or not 0 <= outcome <= 1:
        raise ValueError(f"row {example.row_id} has the outcome {outcome!r}; it must be true, false or in [0, 1]")
    return float(outcome)
