"""Process reward models: a score at the end of every step of a solution.

Legend: S sequences, N scored tokens (the ends of steps), M steps, T tokens of completions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.formats import Row
from ..data.messages import Text
from ..losses.process_reward import AGGREGATIONS, Aggregation, aggregate_step_scores
from ..sequences import Segment, SequenceBatch
from ..utils.transfer import to_device
from ..utils.validation import check_choice, check_fraction
from .backbone import HiddenStates, Layout, base_model, hidden_states
from .fused_head import OutputHead, output_head
from .half_weights import read_exactly
from .headed_model import HeadedModel, HeadedModelOptions
from .scoring import TemplateSettings, check_texts, template_of

StepHead = Literal["linear", "mlp", "tokens"]
Solution = str | Sequence[str]  # a text, or a list of steps


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
    boundaries: Literal["separator", "learned"] = "separator"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_choice("labels", self.labels, ("hard", "soft"))
        check_choice("head", self.head, ("linear", "mlp", "tokens"))
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("boundaries", self.boundaries, ("separator", "learned"))
        check_fraction("threshold", self.threshold, "0.5 is usual")
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


class BoundaryLogits(NamedTuple):
    """Logits of a step ending at each token after the prompts.

    Args:
        logits_T: the logits.
        sequence_T: the sequences of these tokens.
        is_end_T: 1 where a step ends at the token, else 0.
    """

    logits_T: Tensor
    sequence_T: Tensor
    is_end_T: Tensor


class StepLogits(NamedTuple):
    """Logits of a packed batch; ``None`` where the head has no such output.

    Args:
        steps_N: of each step being right, at its last token.
        outcomes_S: of each solution being right, at its last step.
        boundaries: of a step ending.
    """

    steps_N: Tensor
    outcomes_S: Tensor | None
    boundaries: BoundaryLogits | None


class ProcessRewardModel(HeadedModel):
    r"""A decoder that scores every step of a solution, with a head or by its own logits of two label tokens.

    Args:
        model: a causal language model, with or without an adapter.
        options: the model's options.
        settings: see ``HeadedModel``; ``head="tokens"`` needs the tokenizer.

    Raises:
        ValueError: a label is not one known token.

    Example::

        model = ProcessRewardModel.from_pretrained("runs/process_reward/model")
        model.score_steps(["1+2+3=?"], ["1+2=3\n3+3=6"])
    """

    method: ClassVar[str] = "process_reward"
    trained_by: ClassVar[str] = "ProcessRewardModule"
    options_type = ProcessRewardModelOptions
    options: ProcessRewardModelOptions

    def __init__(self, model: nn.Module, options: ProcessRewardModelOptions | None = None, **settings: Any) -> None:
        super().__init__(model, options, **settings)
        labels = self.options.label_tokens if self.options.predicts_tokens else []
        self._label_ids = [self._label_id(text) for text in labels]
        if labels:
            read_exactly(base_model(model).get_output_embeddings())

    def _label_id(self, text: str) -> int:
        tokenizer = self.rows.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"label_tokens has {text!r}, which is {len(ids)} tokens of this tokenizer (or unknown to it); give two "
                "texts of one known token each, such as ['+', '-']"
            )
        return int(ids[0])

    # Logits of packed batches.

    def forward(self, batch: SequenceBatch, layout: Layout) -> StepLogits:
        """Computes the logits of a packed batch whose scored tokens are the ends of steps.

        Args:
            batch: the sequences.
            layout: how to run them.
        """
        hidden = hidden_states(self.model, batch, layout)
        states_ND = self._scored_states(hidden, batch)
        steps_N = self._step_logits(states_ND)
        outcomes_S, boundaries = None, None
        if self.options.outcome_head:
            outcomes_S = self._read(states_ND[batch.scored_lengths.cumsum(0) - 1], "outcome")
        if self.options.learns_boundaries:
            places = to_device(_completion_positions(batch), batch.input_ids.device)
            states_TD = hidden.read(places["flat"], places["sequence"], places["depth"])
            boundaries = BoundaryLogits(self._read(states_TD, "boundary"), places["sequence"], places["is_end"])
        return StepLogits(steps_N, outcomes_S, boundaries)

    def _scored_states(self, hidden: HiddenStates, batch: SequenceBatch) -> Tensor:
        flat_N, depth_N = batch.scored_positions()
        return hidden.read(flat_N, batch.source_path, depth_N)

    def _step_logits(self, states_ND: Tensor) -> Tensor:
        """Computes the logits of steps being right: ``(N, D) -> (N,)``."""
        if not self.options.predicts_tokens:
            return self._read(states_ND, "step")
        dtype = torch.promote_types(states_ND.dtype, torch.float32)
        whole = output_head(self.model)
        # Filled on the device: a list as index would be a copy to wait for.
        ids = torch.stack([torch.full((), n, device=states_ND.device) for n in self._label_ids])
        rows = {"weight": whole.weight, "bias": whole.bias, "lora_out": whole.lora_out}
        parts: dict[str, Any] = {n: None if t is None else t[ids].to(dtype) for n, t in rows.items()}
        parts["lora_in"] = None if whole.lora_in is None else whole.lora_in.to(dtype)
        head = OutputHead(**parts, lora_scaling=whole.lora_scaling, scale=whole.scale, softcap=whole.softcap)
        # A small difference of two large logits needs at least fp32, also under autocast.
        with torch.autocast(states_ND.device.type, enabled=False):
            right, wrong = head.logits(states_ND.to(dtype)).unbind(dim=1)
        return right - wrong

    def _read(self, states: Tensor, name: str) -> Tensor:
        """Reads one output of the head by name."""
        outputs: Tensor = self.head(states)
        return outputs[:, 0, self.options.outputs.index(name)]

    # Scoring.

    def sequence_values(self, batch: SequenceBatch, layout: Layout) -> Sequence[Tensor]:
        """Reads every scored token of each sequence: ``(n, 3)``.

        The columns are the probability that its step is right, the logit of a step ending there (1 where the model
        does not predict it), and the probability that the whole solution is right (NaN where it does not predict that).
        """
        states_ND = self._scored_states(hidden_states(self.model, batch, layout), batch)
        scores_N = self._step_logits(states_ND).sigmoid()
        ends_N = self._read(states_ND, "boundary") if self.options.learns_boundaries else torch.ones_like(scores_N)
        outcome_N = torch.full_like(scores_N, torch.nan)
        if self.options.outcome_head:
            outcome_N = self._read(states_ND, "outcome").sigmoid().to(scores_N)
        columns_N3 = torch.stack([scores_N, ends_N.to(scores_N), outcome_N], dim=1)
        return torch.split(columns_N3, batch.host["scored_lengths"].tolist())

    def encode(self, prompt: Text, completion: Solution, template: Mapping[str, Any] | None = None) -> Segment:
        """Tokenizes a prompt with a solution, weighted at the ends of its steps, or everywhere if these are predicted.

        Args:
            prompt: a text, or chat messages.
            completion: a list of steps, or a text; see ``score_steps``.
            template: settings of the chat template, such as ``tools``.

        Raises:
            ValueError: the row cannot be tokenised, has no steps, or too many tokens.
        """
        if self._finds_ends(completion):
            tokens = np.asarray(self.rows.continued(str(completion)))
            solution = Segment(tokens, np.ones(len(tokens), np.float32))
            prompt_ids = self.rows.prompt(Row(prompt, (), {}, dict(template or {})))
            tree = Segment(np.asarray(prompt_ids), children=(solution,))
        else:
            steps = self.split(completion)
            if not steps:
                raise ValueError("the completion has no steps: give at least one character between separators")
            tree = self.rows.steps(Row(prompt, tuple(steps), {}, dict(template or {})), self.options.step_separator)
        self.check_length(tree)
        return tree

    def split(self, completion: Solution) -> list[str]:
        """Returns the steps of a solution: those of a list, or of a text between separators, without empty ones."""
        separator = self.options.step_separator
        steps = completion.split(separator) if isinstance(completion, str) else completion
        return [step for step in steps if step]

    def _finds_ends(self, completion: Solution) -> bool:
        return self.options.learns_boundaries and isinstance(completion, str) and bool(completion)

    def score_steps(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Solution],
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
            ValueError: lists of different length, or a completion without steps, or one that is too long.
        """
        check_texts(prompts, completions)
        trees = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not self.split(completion) and not self._finds_ends(completion):
                raise ValueError(f"completion {number} has no steps: give at least one character between separators")
            try:
                trees.append(self.encode(prompt, completion, template_of(chat_template_kwargs, number)))
            except ValueError as error:
                raise ValueError(f"completion {number}: {error}") from error
        values = self.score_trees(trees)
        return [_at_ends(value, self._finds_ends(c)) for value, c in zip(values, completions, strict=True)]

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Solution],
        chat_template_kwargs: TemplateSettings = None,
    ) -> list[float]:
        """Computes one score per completion by aggregating its steps' probabilities; see ``score_steps``."""
        return self.aggregated(self.score_steps(prompts, completions, chat_template_kwargs))

    def aggregated(self, steps: Sequence[Sequence[float]], aggregation: Aggregation | None = None) -> list[float]:
        """Aggregates the probabilities of each solution's steps.

        Args:
            steps: one list per solution, of at least one probability.
            aggregation: instead of the model's own.
        """
        if not steps:
            return []
        index = torch.tensor([number for number, scores in enumerate(steps) for _ in scores], dtype=torch.long)
        values = torch.tensor([score for scores in steps for score in scores], dtype=torch.float64)
        rule = aggregation or self.options.aggregation
        return aggregate_step_scores(values, index, num_sequences=len(steps), aggregation=rule).tolist()


def _at_ends(values: Tensor, find_ends: bool) -> list[float]:
    """Returns the probabilities at all given ends of steps, or at the predicted ends and the last token."""
    scores, ends = values[:, 0], values[:, 1]
    if find_ends:
        is_end = ends > 0
        is_end[-1] = True
        scores = scores[is_end]
    return [float(score) for score in scores]


def _completion_positions(batch: SequenceBatch) -> dict[str, np.ndarray]:
    """Finds all tokens after the prompts: flat positions, sequences, depths, and whether a step ends; ``(T,)`` each."""
    host = batch.host
    lengths = host["lengths"]
    first = np.cumsum(lengths) - lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    depth = np.arange(len(sequence)) - first[sequence]
    is_end = np.zeros(len(sequence), np.int64)
    is_end[first[host["source_path"]] + host["source_depth"] + 1] = 1
    prompts = np.array([len(example.root.tokens) for example in batch.examples])[host["example_index"]]
    after = depth >= prompts[sequence]
    found = {"flat": host["path_index"], "sequence": sequence, "depth": depth, "is_end": is_end}
    return {name: array[after] for name, array in found.items()}
