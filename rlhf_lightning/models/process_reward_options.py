"""Options of process reward models, which are stored with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..losses.process_reward import AGGREGATIONS, Aggregation
from ..utils.validation import check_choice, check_fraction, check_not_negative
from .headed_model import HeadedModelOptions

StepHead = Literal["linear", "mlp", "tokens"]


@dataclass
class ProcessRewardModelOptions(HeadedModelOptions):
    """Options of a process reward model.

    Args:
        head: ``linear``, ``mlp`` or ``tokens``.
        label_tokens: with ``tokens``, the texts that label right and wrong steps; one token each.
        step_separator: separator of steps; at least one character.
        labels: the model was trained on ``hard`` labels (0 or 1), or on ``soft`` ones (probabilities).
        aggregation: aggregation of step scores to a solution's score: ``min``, ``product``, ``last`` or ``mean``.
        outcome_head: a further output predicts whether the whole solution is right.
        step_weight: weight of the aggregated steps next to the outcome in ``combined_scores``; at least 0, and above 0
            without an outcome head.
        boundaries: ``separator``, or ``learned``: a further output predicts at which tokens steps end.
        threshold: probability below which a step counts as wrong, in [0, 1).

    Raises:
        ValueError: an option is out of range.
    """

    head: StepHead = "linear"
    label_tokens: Sequence[str] = ("+", "-")
    step_separator: str = "\n"
    labels: Literal["hard", "soft"] = "hard"
    aggregation: Aggregation = "min"
    outcome_head: bool = False
    step_weight: float = 1.0
    boundaries: Literal["separator", "learned"] = "separator"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_choice("labels", self.labels, ("hard", "soft"))
        check_choice("head", self.head, ("linear", "mlp", "tokens"))
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("boundaries", self.boundaries, ("separator", "learned"))
        check_fraction("threshold", self.threshold, "0.5 is usual")
        check_not_negative("step_weight", self.step_weight, "1 is usual")
        if not self.step_weight and not self.outcome_head:
            raise ValueError("step_weight is 0 without an outcome head, which leaves no score: set outcome_head=True")
        if not self.step_separator:
            raise ValueError("step_separator is ''; it must have at least one character, such as a line's end")
        self.label_tokens = [str(self.label_tokens[0]), str(self.label_tokens[1])]

    @property
    def predicts_tokens(self) -> bool:
        """Whether labels are tokens of the language model."""
        return self.head == "tokens"

    @property
    def learns_boundaries(self) -> bool:
        """Whether the model predicts at which tokens steps end."""
        return self.boundaries == "learned"

    @property
    def outputs(self) -> list[str]:
        """Names of the head's outputs in order; label tokens need no output for steps."""
        steps = [] if self.predicts_tokens else ["step"]
        return steps + ["outcome"] * self.outcome_head + ["boundary"] * self.learns_boundaries

    def head_shape(self) -> dict[str, Any]:
        """Returns a head with one output for each of steps, outcome and boundaries that it predicts."""
        kind = "mlp" if self.head == "mlp" else "linear"
        return {"kind": kind, "num_outputs": len(self.outputs)} if self.outputs else {}
