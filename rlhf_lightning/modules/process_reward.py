"""Process reward models: a score at the end of every step of a solution.

Legend: E examples, S sequences, N scored tokens (the ends of steps), M steps, T tokens of completions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.headed_module import HeadedModule
from ..core.scoring import TemplateSettings, Text, per_sequence, score_texts, template_of
from ..core.sequence_rows import num_scored, scored_lengths, scored_positions
from ..data.formats import Row
from ..data.tokenization import RowTokenizer
from ..distributed.collectives import Metrics, Rows
from ..losses.process_reward import AGGREGATIONS, Aggregation, aggregate_step_scores, step_bce_loss
from ..metrics.functional import first_error_f1, first_errors
from ..models import HiddenStates, OutputHead, hidden_states, output_head
from ..sequences import Example, ExampleBatch, Segment, SequenceBatch
from ..utils.validation import check_choice, check_fraction, check_not_negative

StepHead = Literal["linear", "mlp", "tokens"]


class ProcessRewardModule(HeadedModule):
    r"""A process reward model (Lightman et al., 2023, arXiv:2305.20050), which scores every step of a solution.

    With z the logit read at the last token of a step and y in [0, 1] its label:

    .. math:: L = -\frac{1}{M} \sum y \log \sigma(z) + (1 - y) \log \sigma(-z)

    The logit is an output of a head on the hidden state (``linear``, ``mlp``), or the difference of the language
    model's own logits of two label tokens after the step (``tokens``, as in Math-Shepherd, Wang et al., 2023,
    arXiv:2312.08935).

    Steps end with a separator: a line break, or a marker such as ``" ки"``; ``StepwiseDataModule`` inserts the same
    one into the rows. With ``boundaries="learned"`` a second output learns at which tokens steps end, by binary
    cross-entropy over all tokens of the completions, and solutions without any separator can be scored.

    Args:
        model: Hugging Face id or folder: of a language model, or of an exported process reward model.
        step_separator: separator of steps in ``score_steps``; at least one character.
        labels: ``hard`` (0 or 1), or ``soft`` (probabilities).
        head: ``linear``, ``mlp`` or ``tokens``.
        label_tokens: with ``tokens``, the texts that label right and wrong steps; one token each.
        aggregation: aggregation of step scores to a solution's score: ``min``, ``product``, ``last`` or ``mean``.
        train_on_last_step_only: learn only from the last step of each solution.
        outcome_head: also learn whether the whole solution is right, at its last token: from the field ``outcome`` (0
            to 1) if a row has one, else from its last label.
        outcome_weight: weight of that loss, per solution; at least 0.
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
    default_learning_rate: ClassVar[float] = 1e-5
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "step_accuracy", "first_error_f1")
    contracts: ClassVar[tuple[str, ...]] = ("StepwiseDataModule",)

    def __init__(
        self,
        model: str,
        *,
        step_separator: str = "\n",
        labels: Literal["hard", "soft"] = "hard",
        head: StepHead = "linear",
        label_tokens: tuple[str, str] = ("+", "-"),
        aggregation: Aggregation = "min",
        train_on_last_step_only: bool = False,
        outcome_head: bool = False,
        outcome_weight: float = 1.0,
        boundaries: Literal["separator", "learned"] = "separator",
        boundary_weight: float = 1.0,
        threshold: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_choice("labels", labels, ("hard", "soft"))
        check_choice("head", head, ("linear", "mlp", "tokens"))
        check_choice("aggregation", aggregation, AGGREGATIONS)
        check_choice("boundaries", boundaries, ("separator", "learned"))
        check_not_negative("outcome_weight", outcome_weight, "1 is usual")
        check_not_negative("boundary_weight", boundary_weight, "1 is usual")
        check_fraction("threshold", threshold, "0.5 is usual")
        if not step_separator:
            raise ValueError("step_separator is ''; it must have at least one character, such as a line's end")

        super().__init__(model, seed=seed, **kwargs)
        self.head_kind: StepHead = head
        self.step_separator = step_separator
        self.labels = labels
        self.label_tokens = (str(label_tokens[0]), str(label_tokens[1]))
        self.aggregation: Aggregation = aggregation
        self.train_on_last_step_only = train_on_last_step_only
        self.outcome_head = outcome_head
        self.outcome_weight = outcome_weight
        self.boundaries = boundaries
        self.boundary_weight = boundary_weight
        self.threshold = threshold

        # Names of the head's outputs in order; label tokens need no output for steps.
        own = [] if head == "tokens" else ["step"]
        self._outputs = own + ["outcome"] * outcome_head + ["boundary"] * (boundaries == "learned")
        self._label_ids: list[int] = []

    @property
    def predicts_tokens(self) -> bool:
        """Whether labels are tokens of the language model."""
        return self.head_kind == "tokens"

    def head_shape(self) -> dict[str, Any]:
        """Returns a head with one output for each of steps, outcome and boundaries that it predicts."""
        kind = "mlp" if self.head_kind == "mlp" else "linear"
        return {"kind": kind, "num_outputs": len(self._outputs)} if self._outputs else {}

    def configure_model(self) -> None:
        """Builds the decoder and its head, and looks up the label tokens."""
        super().configure_model()
        if self.predicts_tokens and not self._label_ids:
            self._label_ids = [self._label_id(text) for text in self.label_tokens]

    def _label_id(self, text: str) -> int:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"label_tokens has {text!r}, which is {len(ids)} tokens of this tokenizer (or unknown to it); give two "
                "texts of one known token each, such as ['+', '-']"
            )
        return int(ids[0])

    def _step_logits(self, states_ND: Tensor) -> Tensor:
        """Computes the logits of steps being right: ``(N, D) -> (N,)``."""
        if self.head_kind != "tokens":
            return self._read(states_ND, "step")
        dtype = torch.promote_types(states_ND.dtype, torch.float32)
        whole = output_head(self.model)
        rows = {"weight": whole.weight, "bias": whole.bias, "lora_out": whole.lora_out}
        parts: dict[str, Any] = {n: None if t is None else t[self._label_ids].to(dtype) for n, t in rows.items()}
        parts["lora_in"] = None if whole.lora_in is None else whole.lora_in.to(dtype)
        head = OutputHead(**parts, lora_scaling=whole.lora_scaling, scale=whole.scale, softcap=whole.softcap)
        # A small difference of two large logits needs at least fp32, also under autocast.
        with torch.autocast(states_ND.device.type, enabled=False):
            right, wrong = head.logits(states_ND.to(dtype)).unbind(dim=1)
        return right - wrong

    def _read(self, states: Tensor, name: str) -> Tensor:
        """Reads one output of the head by name."""
        return self.head_outputs(states)[:, 0, self._outputs.index(name)]

    # Learning.

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts steps, trained steps, examples, and tokens of completions."""
        steps = float(sum(len(example.fields["labels"]) for example in examples))
        tokens = sum(len(segment.tokens) for example in examples for segment in example.root.children)
        learned = float(len(examples)) if self.train_on_last_step_only else steps
        return {"steps": steps, "learned": learned, "examples": float(len(examples)), "tokens": float(tokens)}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes per example the sums of losses and of correct predictions, and the first errors."""
        hidden = hidden_states(self.model, batch, self.layout)
        flat_N, depth_N = scored_positions(batch)
        states_ND = hidden.read(flat_N, batch.source_path, depth_N)
        logits_N = self._step_logits(states_ND)
        labels_N = logits_N.new_tensor([label for e in batch.examples for label in e.fields["labels"]])
        losses_N = step_bce_loss(logits_N, labels_N)
        last_S = scored_lengths(batch).cumsum(0) - 1
        right_N = (logits_N.sigmoid() >= self.threshold) == (labels_N >= self.threshold)
        rows = {
            "loss": losses_N[last_S] if self.train_on_last_step_only else batch.sum_per_example(losses_N),
            "correct": batch.sum_per_example(right_N.to(losses_N.dtype)),
            "first_error": self._first_errors(labels_N, batch),
            "predicted_first_error": self._first_errors(logits_N.detach().sigmoid(), batch),
        }
        if self.outcome_head:
            outcomes_S = logits_N.new_tensor([_outcome(example) for example in batch.examples])
            logits_S = self._read(states_ND[last_S], "outcome")
            rows["outcome_loss"] = step_bce_loss(logits_S, outcomes_S)
            rows["outcome_correct"] = ((logits_S > 0) == (outcomes_S >= 0.5)).to(losses_N.dtype)
        if self.boundaries == "learned":
            rows |= self._boundary_rows(hidden, batch)
        return rows

    def _first_errors(self, scores_N: Tensor, batch: SequenceBatch) -> Tensor:
        return first_errors(scores_N, batch.sequence_index, batch.num_sequences, self.threshold)

    def _boundary_rows(self, hidden: HiddenStates, batch: SequenceBatch) -> Rows:
        """Computes losses and accuracy of the predicted ends of steps, per example."""
        logits_T, sequence_T, depth_T = self._boundary_logits(hidden, batch)
        ends = set(zip(batch.sequence_index.tolist(), (batch.source_depth + 1).tolist(), strict=True))
        places = zip(sequence_T.tolist(), depth_T.tolist(), strict=True)
        is_end_T = logits_T.new_tensor([float(place in ends) for place in places])
        losses_T = step_bce_loss(logits_T, is_end_T)
        right_T = ((logits_T > 0) == (is_end_T > 0)).to(losses_T.dtype)
        zeros_S = losses_T.new_zeros(batch.num_sequences)
        return {
            "boundary_loss": zeros_S.index_add(0, sequence_T, losses_T),
            "boundary_correct": zeros_S.index_add(0, sequence_T, right_T),
        }

    def _boundary_logits(self, hidden: HiddenStates, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Computes boundary logits of all completion tokens, with their sequences and depths; ``(T,)`` each."""
        flat_T, sequence_T, depth_T = _completion_positions(batch)
        return self._read(hidden.read(flat_T, sequence_T, depth_T), "boundary"), sequence_T, depth_T

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Adds the mean over steps and the weighted means over solutions and tokens."""
        total = rows["loss"].sum() / normalizers["learned"]
        if self.outcome_head:
            total = total + self.outcome_weight * rows["outcome_loss"].sum() / normalizers["examples"]
        if self.boundaries == "learned":
            total = total + self.boundary_weight * rows["boundary_loss"].sum() / normalizers["tokens"]
        return total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes step accuracy, and accuracies and F1 of the first error where they are defined."""
        found = first_error_f1(rows["predicted_first_error"], rows["first_error"])
        values = {
            "step_accuracy": rows["correct"].sum() / normalizers["steps"],
            "first_error_f1": found.f1,
            "accuracy_with_error": found.with_error,
            "accuracy_without_error": found.without_error,
        }
        values = {name: value for name, value in values.items() if not value.isnan()}
        if self.outcome_head:
            values["outcome_accuracy"] = rows["outcome_correct"].sum() / normalizers["examples"]
        if self.boundaries == "learned":
            values["boundary_accuracy"] = rows["boundary_correct"].sum() / normalizers["tokens"]
        return values

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        for example in examples:
            labels, steps = example.fields.get("labels"), num_scored(example)
            if not isinstance(labels, Sequence) or len(steps) != 1 or len(labels) != steps[0] or not labels:
                count = len(labels) if isinstance(labels, Sequence) else "no"
                raise ValueError(
                    f"row {example.row_id} has {' and '.join(map(str, steps))} steps and {count} labels; it must have "
                    "one label for each of at least one step: use StepwiseDataModule"
                )
            for number, label in enumerate(labels, start=1):
                self._check_label(example.row_id, number, label)
            _outcome(example)
        return examples

    def _check_label(self, row_id: str, number: int, label: Any) -> None:
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(f"row {row_id} has the label {label!r} at step {number}; it must be in [0, 1]")
        if self.labels == "hard" and label not in (0, 1):
            raise ValueError(
                f"row {row_id} has the label {label!r} at step {number}; hard labels are 0 or 1: set labels='soft'"
            )

    # Scoring.

    def score_steps(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str | Sequence[str]],
        chat_template_kwargs: TemplateSettings = None,
    ) -> list[list[float]]:
        """Computes the probability that each step is right.

        Args:
            prompts: texts, or lists of chat messages.
            completions: one per prompt: a list of steps, or a text that is split at ``step_separator`` (empty steps are
                dropped). With ``boundaries="learned"``, steps of a text end at predicted tokens and at its end.
            chat_template_kwargs: arguments of the chat template, such as ``tools``: for all rows, or a list with one
                per row.

        Returns:
            One list per completion, with one probability per step.

        Raises:
            ValueError: lists of different length, or a completion without steps.
        """
        if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
            raise ValueError(
                f"given {len(prompts)} prompts and {len(completions)} completions; give two lists of one length"
            )
        rows = RowTokenizer(self.tokenizer)
        trees = [
            self._solution(rows, number, prompt, completion, template_of(chat_template_kwargs, number))
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        values = score_texts(self, trees, self._sequence_steps)
        return [_at_ends(value, self._finds_ends(c)) for value, c in zip(values, completions, strict=True)]

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[str | Sequence[str]],
        chat_template_kwargs: TemplateSettings = None,
    ) -> list[float]:
        """Computes one score per completion by aggregating its steps' probabilities; see ``score_steps``."""
        steps = self.score_steps(prompts, completions, chat_template_kwargs)
        index = torch.tensor([number for number, scores in enumerate(steps) for _ in scores], dtype=torch.long)
        values = torch.tensor([score for scores in steps for score in scores], dtype=torch.float64)
        if not steps:
            return []
        return self._aggregated(values, index, len(steps)).tolist()

    def _aggregated(self, scores_M: Tensor, sequence_index_M: Tensor, num_sequences: int) -> Tensor:
        return aggregate_step_scores(
            scores_M, sequence_index_M, num_sequences=num_sequences, aggregation=self.aggregation
        )

    def _solution(
        self,
        rows: RowTokenizer,
        number: int,
        prompt: Text,
        completion: str | Sequence[str],
        template: dict[str, Any],
    ) -> Segment:
        """Builds a prompt with a solution, weighted at the ends of its steps (everywhere if they are predicted)."""
        if self._finds_ends(completion):
            tokens = np.asarray(rows.continued(str(completion)))
            solution = Segment(tokens, np.ones(len(tokens), np.float32))
            return Segment(np.asarray(rows.prompt(Row(prompt, (), {}, template))), children=(solution,))
        steps = completion.split(self.step_separator) if isinstance(completion, str) else list(completion)
        steps = [step for step in steps if step]
        if not steps:
            raise ValueError(f"completion {number} has no steps: give at least one character between separators")
        return rows.steps(Row(prompt, tuple(steps), {}, template), self.step_separator)

    def _finds_ends(self, completion: str | Sequence[str]) -> bool:
        return self.boundaries == "learned" and isinstance(completion, str) and bool(completion)

    def _sequence_steps(self, batch: SequenceBatch) -> Sequence[Tensor]:
        """Returns per sequence the scored tokens' probabilities of being right and boundary logits: ``(n, 2)``."""
        hidden = hidden_states(self.model, batch, self.layout)
        flat_N, depth_N = scored_positions(batch)
        states_ND = hidden.read(flat_N, batch.source_path, depth_N)
        scores_N = self._step_logits(states_ND).sigmoid()
        ends_N = self._read(states_ND, "boundary") if self.boundaries == "learned" else torch.ones_like(scores_N)
        both_N2 = torch.stack([scores_N, ends_N], dim=1)
        return torch.split(both_N2, scored_lengths(batch).tolist())

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows.

        Returns:
            Per row ``row_id``, ``steps`` (probabilities) and ``score`` (their aggregation).
        """
        rows = []
        for example, values in zip(
            batch.examples, per_sequence(self, batch.examples, self._sequence_steps), strict=True
        ):
            scores = values[0][:, 0]
            score = self._aggregated(scores, torch.zeros(len(scores), dtype=torch.long), 1)
            rows.append({"row_id": example.row_id, "steps": scores.tolist(), "score": float(score)})
        return rows

    # Export.

    def options(self) -> Mapping[str, Any]:
        """Returns the options that are stored with the head, from which ``from_pretrained`` rebuilds the module."""
        names = ("step_separator", "labels", "aggregation", "outcome_head", "boundaries", "threshold")
        rest = {"head": self.head_kind, "label_tokens": list(self.label_tokens)}
        return rest | {name: getattr(self, name) for name in names}


def _outcome(example: Example) -> float:
    """Returns whether a solution is right: the row's ``outcome``, else its last label."""
    outcome = example.fields.get("outcome")
    if outcome is None:
        return float(example.fields["labels"][-1])
    if not isinstance(outcome, int | float) or not 0 <= outcome <= 1:
        raise ValueError(f"row {example.row_id} has the outcome {outcome!r}; it must be true, false or in [0, 1]")
    return float(outcome)


def _at_ends(values: Tensor, find_ends: bool) -> list[float]:
    """Returns the probabilities at all given ends of steps, or at the predicted ends and the last token."""
    scores, ends = values.unbind(dim=1)
    if find_ends:
        is_end = ends > 0
        is_end[-1] = True
        scores = scores[is_end]
    return [float(score) for score in scores]


def _completion_positions(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns flat positions of all tokens after the prompts, their sequences and their depths; ``(T,)`` each."""
    device = batch.lengths.device
    prompt_S = torch.tensor([len(e.root.tokens) for e in batch.examples], device=device)[batch.example_index]
    sequence = torch.repeat_interleave(torch.arange(batch.num_sequences, device=device), batch.lengths)
    depth = torch.arange(len(sequence), device=device) - (batch.lengths.cumsum(0) - batch.lengths)[sequence]
    behind = depth >= prompt_S[sequence]
    return batch.path_index[behind], sequence[behind], depth[behind]
