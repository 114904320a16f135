"""Process reward models: a score at the end of every step of a solution.

Legend: S sequences, N scored tokens (the ends of steps), M steps, T tokens of completions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.formats import Row
from ..data.messages import Text
from ..losses.process_reward import AGGREGATIONS, Aggregation, aggregate_step_logits, aggregate_step_scores
from ..sequences import Segment, SequenceBatch
from ..utils.transfer import to_device
from ..utils.validation import check_choice, check_not_negative, check_same_length
from .backbone import HiddenStates, Layout, base_model, hidden_states
from .fused_head import OutputHead, output_head
from .half_weights import read_exactly
from .headed_model import HeadedModel
from .process_reward_options import ProcessRewardModelOptions
from .scoring import TemplateSettings, check_texts, template_of

Solution = str | Sequence[str]  # a text, or a list of steps


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
        """Reads every scored token of each sequence: ``(n, 5)``.

        The columns are the probability that its step is right, the logit of a step ending there (1 where the model
        does not predict it), the probability that the whole solution is right (NaN where it does not predict that),
        and the logits of these two probabilities.
        """
        states_ND = self._scored_states(hidden_states(self.model, batch, layout), batch)
        steps_N = self._step_logits(states_ND)
        ends_N = self._read(states_ND, "boundary") if self.options.learns_boundaries else torch.ones_like(steps_N)
        outcome_N = torch.full_like(steps_N, torch.nan)
        if self.options.outcome_head:
            outcome_N = self._read(states_ND, "outcome").to(steps_N)
        columns = [steps_N.sigmoid(), ends_N.to(steps_N), outcome_N.sigmoid(), steps_N, outcome_N]
        return torch.split(torch.stack(columns, dim=1), batch.host["scored_lengths"].tolist())

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
        return [values[:, 0].tolist() for values in self._step_values(prompts, completions, chat_template_kwargs)]

    def _step_values(
        self, prompts: Sequence[Text], completions: Sequence[Solution], chat_template_kwargs: TemplateSettings
    ) -> list[Tensor]:
        """Reads the end of every step of each completion: ``(steps, 5)``, the columns of ``sequence_values``."""
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

    def combined_scores(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Solution],
        chat_template_kwargs: TemplateSettings = None,
        *,
        aggregation: Aggregation | None = None,
        step_weight: float | None = None,
    ) -> list[float]:
        """Computes a score of any sign per completion, partial ones too: outcome + w * aggregate of its steps.

        The outcome is the logit of the whole solution being right, 0 without an outcome head; of the steps' logits, see
        ``aggregate_step_logits``. A model that was trained with ``learn_from="pairs"`` has learned their differences.

        Args:
            prompts: texts, or lists of chat messages.
            completions: see ``score_steps``.
            chat_template_kwargs: see ``score_steps``.
            aggregation: instead of the model's own.
            step_weight: w, instead of the model's own; at least 0.

        Raises:
            ValueError: as ``score_steps``, or an option out of range.
        """
        weight = self.options.step_weight if step_weight is None else step_weight
        check_not_negative("step_weight", weight, "1 is usual")
        rule = aggregation or self.options.aggregation
        check_choice("aggregation", rule, AGGREGATIONS)
        values = self._step_values(prompts, completions, chat_template_kwargs)
        if not values:
            return []
        counts_S = torch.tensor([len(value) for value in values])
        index_M = torch.repeat_interleave(torch.arange(len(values)), counts_S)
        columns_M5 = torch.cat(values).double()
        scores_S = weight * aggregate_step_logits(columns_M5[:, 3], index_M, counts_S, aggregation=rule)
        if self.options.outcome_head:
            scores_S = scores_S + columns_M5[counts_S.cumsum(0) - 1, 4]
        found: list[float] = scores_S.tolist()
        return found

    def preferences(
        self,
        prompts: Sequence[Text],
        first: Sequence[Solution],
        second: Sequence[Solution],
        chat_template_kwargs: TemplateSettings = None,
        **options: Any,
    ) -> list[float]:
        """Computes the probability, by Bradley and Terry, that the first of two branches of each prompt is preferred.

        Args:
            prompts: texts, or lists of chat messages.
            first: solutions or parts of them, one per prompt; see ``score_steps``.
            second: the others.
            chat_template_kwargs: see ``score_steps``.
            options: ``aggregation`` and ``step_weight`` of ``combined_scores``.

        Returns:
            Logistic function of the difference of combined scores, one per prompt.

        Raises:
            ValueError: as ``combined_scores``, or lists of different length.
        """
        check_same_length(prompts=prompts, first=first, second=second)
        templates = chat_template_kwargs
        if isinstance(templates, Sequence):
            templates = [*templates, *templates]
        # In one batch, where equal prompts are computed once.
        scores = self.combined_scores([*prompts, *prompts], [*first, *second], templates, **options)
        of_first, of_second = torch.tensor(scores, dtype=torch.float64).view(2, -1)
        found: list[float] = (of_first - of_second).sigmoid().tolist()
        return found

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


def _at_ends(values: Tensor, find_ends: bool) -> Tensor:
    """Returns the values at all given ends of steps, or at the predicted ends and the last token."""
    if not find_ends:
        return values
    is_end = values[:, 1] > 0
    is_end[-1] = True
    return values[is_end]


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
