"""Outcome reward models: one scalar, or several, for a whole completion.

Legend: E examples, S sequences, N scored tokens, D hidden size, M members of an ensemble, K attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.exports import check_merge
from ..core.micro_batching import prompt_keys
from ..core.reward_ensemble import EnsembleKind, EnsembleModule
from ..core.reward_options import (
    RewardLossType,
    attribute_options,
    bootstrap_weights,
    check_rated,
    check_reward_options,
    ratings_of,
)
from ..core.scoring import TemplateSettings, Text, answer_trees, per_sequence, score_texts
from ..core.sequence_rows import check_pairs, num_scored, scored_positions
from ..distributed.collectives import Metrics, Rows
from ..losses.reward import bradley_terry_loss, centering_penalty, magnitude_penalty, rao_kupper_loss, rating_loss
from ..metrics.reward_model import pair_metrics, rating_metrics, spread
from ..models import hidden_states
from ..models import save_pretrained as export_pretrained
from ..models.reward_head import HeadKind, NoClassifier, classifier_from, head_files, pooled, whole, with_padding_token
from ..sequences import Example, ExampleBatch, SequenceBatch
from ..utils.validation import check_choice, check_count


class RewardModule(EnsembleModule):
    r"""A reward model: a decoder with a scalar head, read at the end of the completion.

    ``bradley_terry`` learns from pairs (Ouyang et al., 2022, arXiv:2203.02155), with r the reward and m the margin:

    .. math:: L = -\frac{1}{P} \sum \log \sigma\big(r(x, y_c) - r(x, y_r) - m\big)

    ``mse`` and ``huber`` learn from ratings (HelpSteer2, Wang et al., 2024, arXiv:2406.08673): the head has one output
    per attribute and regresses the columns ``attributes`` of rows with one completion, which ``PreferenceDataModule``
    and ``SFTDataModule`` read. Missing ratings (no such column, null or NaN) are ignored; an attribute without any
    rating is an error. With several attributes the reward is r = sum_k w_k r_k with the weights ``attribute_weights``,
    for pairs as well.

    An ensemble (``num_models`` above 1) has as many heads on one decoder, or as many LoRA adapters with a head each
    on one frozen decoder (``ensemble="adapters"``), which are computed one after the other. Members differ in their
    initial weights and in the weights of rows: in training, member j weights row i by a Poisson variable of mean 1
    drawn from (seed, j, the row's id), which is the online bootstrap (Oza and Russell, 2001); all see the rows in the
    same order. Losses and rewards are means over the members. Losses of pairs do not determine a member's mean reward,
    so rewards are comparable between members only after centring: reported rewards and their standard deviation over
    members use each member's reward minus its running mean over the training rows (decay 0.99 per step,
    bias-corrected).

    Args:
        model: Hugging Face id or folder: of a language model, of a sequence classifier, or of an exported reward model.
        head: ``linear``, or ``mlp`` with one hidden layer.
        num_attributes: outputs of the head, at least 1.
        num_models: members of the ensemble, at least 1.
        ensemble: members are ``heads``, or ``adapters`` with a head each; the latter need ``lora``, or a LoRA folder.
        pooling: read the ``last`` token's state, or the ``mean`` over the completion's tokens.
        loss_type: ``bradley_terry``, ``mse`` or ``huber``.
        label_smoothing: probability that a pair's label is flipped, in [0, 0.5).
        margin: default m of rows without a margin; any finite number.
        use_margins: take m from the rows' field ``margin`` if they have one.
        center_rewards_coefficient: weight of (r_c + r_r)^2, at least 0; 0.01 is usual.
        l2_coefficient: weight of r_c^2 + r_r^2, at least 0.
        tie_threshold: threshold, above 0, of Rao and Kupper's model of ties, in which rows whose field ``tie`` is true
            are ties, and neither margins nor label smoothing apply. Without it a tie is an error.
        average_over: average the loss over ``pairs``; or over ``prompts``, for each the mean over its pairs in the
            global batch, which is the weight 1 / C(K, 2) of InstructGPT if all pairs of K ranked completions are in it
            (``group_by_prompt`` of the datamodule). With several micro-batches pairs are then scored twice.
        huber_delta: error at which ``huber`` turns from quadratic to linear, above 0.
        attributes: names of the outputs, and of the columns that hold their ratings.
        attribute_weights: w, one per attribute; 1 / K each by default.
        bootstrap: whether members weight rows differently.
        seed: seed of the heads' initial weights and of the weights of rows.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = RewardModule("my-sft-model", center_rewards_coefficient=0.01)
        lightning.Trainer(max_epochs=1).fit(module, PreferenceDataModule(train="pairs.jsonl", global_batch_size=16))
        module.score(["2+2="], ["4"])
    """

    method: ClassVar[str] = "reward"
    default_learning_rate: ClassVar[float] = 1e-5
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "rewards/accuracies", "rewards/margins")
    contracts: ClassVar[tuple[str, ...]] = ("PreferenceDataModule", "SFTDataModule")

    def __init__(
        self,
        model: str,
        *,
        head: HeadKind = "linear",
        num_attributes: int = 1,
        num_models: int = 1,
        ensemble: EnsembleKind = "heads",
        pooling: Literal["last", "mean"] = "last",
        loss_type: RewardLossType = "bradley_terry",
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        use_margins: bool = True,
        center_rewards_coefficient: float = 0.0,
        l2_coefficient: float = 0.0,
        tie_threshold: float | None = None,
        average_over: Literal["pairs", "prompts"] = "pairs",
        huber_delta: float = 1.0,
        attributes: list[str] | None = None,
        attribute_weights: list[float] | None = None,
        bootstrap: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_choice("head", head, ("linear", "mlp"))
        check_choice("pooling", pooling, ("last", "mean"))
        check_choice("average_over", average_over, ("pairs", "prompts"))
        if average_over == "prompts" and loss_type != "bradley_terry":
            raise ValueError(
                f"average_over is 'prompts' with loss_type {loss_type!r}, which has no pairs: use 'bradley_terry', or "
                "average_over='pairs'"
            )
        check_count("num_attributes", num_attributes, "one output of the head per attribute")
        check_reward_options(
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            margin=margin,
            center_rewards_coefficient=center_rewards_coefficient,
            l2_coefficient=l2_coefficient,
            tie_threshold=tie_threshold,
            huber_delta=huber_delta,
            attributes=attributes,
        )
        names, weights = attribute_options(num_attributes, attributes, attribute_weights)
        super().__init__(
            model, num_models=num_models, ensemble=ensemble, head=head, num_attributes=len(names), seed=seed, **kwargs
        )
        self.pooling = pooling
        self.loss_type: RewardLossType = loss_type
        self.label_smoothing = label_smoothing
        self.margin = margin
        self.use_margins = use_margins
        self.center_rewards_coefficient = center_rewards_coefficient
        self.l2_coefficient = l2_coefficient
        self.tie_threshold = tie_threshold
        self.average_over = average_over
        self.huber_delta = huber_delta
        self.attributes = names
        self.attribute_weights = weights
        self.bootstrap = bootstrap

    def rewards(self, batch: SequenceBatch) -> Tensor:
        """Computes the rewards of a packed batch's sequences, by member and attribute: ``(S, M, K)``."""
        return self.member_outputs(batch, self._states)

    def _states(self, batch: SequenceBatch) -> Tensor:
        """Computes the hidden state of each sequence that a head reads: ``(S, D)``."""
        hidden = hidden_states(self.model, batch, self.layout)
        if self.pooling == "mean":
            flat_N, depth_N = scored_positions(batch)
            states_ND = hidden.read(flat_N, batch.source_path, depth_N)
            return pooled(states_ND, batch.sequence_index, batch.num_sequences)
        return hidden.read(batch.last_index, batch.last_path, batch.lengths[batch.last_path] - 1)

    def combined(self, rewards: Tensor) -> Tensor:
        """Combines attributes to the scalar reward: ``(..., K) -> (...)``."""
        return rewards @ rewards.new_tensor(self.attribute_weights)

    # Learning.

    @property
    def couples_rows(self) -> bool:
        """Whether a pair's weight depends on the number of pairs of its prompt in the global batch."""
        return self.average_over == "prompts"

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts pairs, or ratings that are not missing."""
        if self.loss_type == "bradley_terry":
            return {"pairs": float(len(examples))}
        return {
            "ratings": float(sum(not math.isnan(value) for e in examples for value in ratings_of(e, self.attributes)))
        }

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Collects margins and ties, or ratings, and each member's weights of rows."""
        rows: Rows = {}
        if self.loss_type == "bradley_terry":
            margins = [self._margin(example) for example in batch.examples]
            rows["margin"] = torch.tensor(margins, dtype=torch.float64, device=self.device)
            rows["tie"] = torch.tensor([bool(e.fields.get("tie")) for e in batch.examples], device=self.device)
            if self.average_over == "prompts":
                rows["prompt"] = prompt_keys(batch.examples, self.device)
        else:
            ratings = [ratings_of(example, self.attributes) for example in batch.examples]
            rows["ratings"] = torch.tensor(ratings, dtype=torch.float64, device=self.device)
        if self.bootstrap and self.num_models > 1 and self.training:
            row_ids = [example.row_id for example in batch.examples]
            rows["weights"] = bootstrap_weights(row_ids, self.num_models, self.seed)[:, self.in_turn].to(self.device)
        return rows

    def _margin(self, example: Example) -> float:
        own = example.fields.get("margin") if self.use_margins else None
        return self.margin if own is None else float(own)

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes rewards: ``(E, sequences of a row, M, K)``."""
        return {"rewards": self.rewards(batch).unflatten(0, (batch.num_examples, -1))}

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Averages over pairs or ratings and over members."""
        if self.loss_type == "bradley_terry":
            losses, count = self._pair_losses(rows), normalizers["pairs"]
        else:
            losses, count = self._rating_losses(rows), normalizers["ratings"]
            if count == 0:
                raise ValueError(
                    f"no row of this batch has a rating of {self.attributes}: name their columns with attributes="
                )
        if "weights" in rows:
            losses = losses * rows["weights"].to(losses.dtype)
        if "prompt" in rows:
            prompts, place, sizes = rows["prompt"].unique(return_inverse=True, return_counts=True)
            losses, count = losses / sizes[place][:, None], float(len(prompts))
        return losses.sum() / (count * self.num_models)

    def after_step(self, rows: Rows, normalizers: dict[str, float]) -> None:
        """Updates the running means of an ensemble that learns from pairs."""
        if self.num_models > 1 and self.loss_type == "bradley_terry":
            self.remember_means(rows["rewards"])

    def _pair_losses(self, rows: Rows) -> Tensor:
        """Computes the losses of pairs: ``(E, M)``."""
        chosen, rejected = self.combined(rows["rewards"]).unbind(dim=1)
        if self.tie_threshold is not None:
            losses = rao_kupper_loss(chosen, rejected, tie_P=rows["tie"], threshold=self.tie_threshold)
        else:
            margin = rows["margin"].to(chosen.dtype)
            losses = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=self.label_smoothing)
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * centering_penalty(chosen, rejected)
        if self.l2_coefficient:
            losses = losses + self.l2_coefficient * magnitude_penalty(chosen, rejected)
        return losses

    def _rating_losses(self, rows: Rows) -> Tensor:
        """Computes the losses of ratings, summed over the attributes: ``(E, M)``."""
        rewards = rows["rewards"].squeeze(1)
        ratings = rows["ratings"].to(rewards.dtype)[:, None].expand_as(rewards)
        kind: Any = self.loss_type
        return rating_loss(rewards, ratings, loss_type=kind, huber_delta=self.huber_delta).sum(dim=-1)

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes metrics of mean rewards: accuracy and margin of pairs, or correlation with ratings."""
        combined = self.combined(self.centred(rows["rewards"]))  # (E, sequences, M)
        rewards = combined.mean(dim=-1)
        values = spread(rewards)
        if self.num_models > 1:
            values["rewards/disagreement"] = combined.std(dim=-1, correction=0).mean()
        if self.loss_type == "bradley_terry":
            return values | pair_metrics(rewards, rows["tie"], calibration=not self.training)
        return values | rating_metrics(rows["rewards"].squeeze(1).mean(dim=1), rows["ratings"], self.attributes)

    def on_train_start(self) -> None:
        """Refuses an attribute that no training row rates, if all rows are in memory."""
        super().on_train_start()
        examples = getattr(self.trainer.train_dataloader, "examples", None)
        if examples is not None and self.loss_type != "bradley_terry":
            check_rated(examples, self.attributes)

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        if self.loss_type == "bradley_terry":
            check_pairs(examples)
            for example in examples:
                self._check_pair(example)
            return examples
        for example in examples:
            if len(num_scored(example)) != 1:
                raise ValueError(
                    f"row {example.row_id} has {len(num_scored(example))} completions; loss_type {self.loss_type!r} "
                    "rates one: give rows of prompt, completion and the ratings to PreferenceDataModule"
                )
        return examples

    def _check_pair(self, example: Example) -> None:
        margin = example.fields.get("margin") if self.use_margins else None
        number = isinstance(margin, int | float) and math.isfinite(margin)
        if margin is not None and not number:
            raise ValueError(
                f"row {example.row_id} has the margin {margin!r}; it must be a finite number: fix the column, or set "
                "use_margins=False"
            )
        if example.fields.get("tie") and self.tie_threshold is None:
            raise ValueError(f"row {example.row_id} is a tie: set tie_threshold (0.5 is usual), or leave such rows out")

    # Scoring.

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        chat_template_kwargs: TemplateSettings = None,
    ) -> list[float]:
        """Computes one reward per completion; completions of one prompt share its computation.

        Args:
            prompts: texts, or lists of chat messages.
            completions: one per prompt; texts, or lists of chat messages.
            chat_template_kwargs: arguments of the chat template, such as ``tools``: for all rows, or a list with one
                per row.

        Raises:
            ValueError: lists of different length, or an empty completion.
        """
        return self.score_with_std(prompts, completions, chat_template_kwargs)[0]

    def score_with_std(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        chat_template_kwargs: TemplateSettings = None,
    ) -> tuple[list[float], list[float]]:
        """Computes rewards and their standard deviation over the members (0 without an ensemble); see ``score``."""
        trees = answer_trees(self.tokenizer, prompts, completions, chat_template_kwargs)
        values = score_texts(self, trees, self._sequence_rewards)
        members = [self.combined(value) for value in values]
        return [float(m.mean()) for m in members], [float(m.std(correction=0)) for m in members]

    def _sequence_rewards(self, batch: SequenceBatch) -> Sequence[Tensor]:
        return self.centred(self.rewards(batch)).unbind()

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows with any number of completions.

        Returns:
            Per row ``row_id`` and lists with one entry per completion: ``rewards`` (means over the members), ``stds``
            (standard deviations over the members) and, with several attributes, ``attributes`` (K means each).
        """
        rows = []
        for example, values in zip(
            batch.examples, per_sequence(self, batch.examples, self._sequence_rewards), strict=True
        ):
            members = [self.combined(value) for value in values]
            row: dict[str, Any] = {
                "row_id": example.row_id,
                "rewards": [float(m.mean()) for m in members],
                "stds": [float(m.std(correction=0)) for m in members],
            }
            if len(self.attributes) > 1:
                row["attributes"] = [value.mean(dim=0).tolist() for value in values]
            rows.append(row)
        return rows

    # Export.

    def options(self) -> Mapping[str, Any]:
        """Returns the options that are stored with the head, from which ``from_pretrained`` rebuilds the module."""
        return {
            "head": self.head_kind,
            "num_attributes": len(self.attributes),
            "pooling": self.pooling,
            "attributes": self.attributes,
            "attribute_weights": self.attribute_weights,
            **self.ensemble_options(),
        }

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the reward model as a Hugging Face folder.

        A single linear head at the last token of a whole model (without adapter, or with the adapter merged) is written
        as an ``AutoModelForSequenceClassification`` with a label per attribute, which scores rows that end in the
        end-of-sequence token as this module does. Otherwise the language model or its adapter is written, with the
        head in ``reward_head.safetensors`` and its options in ``reward_head.json``. ``from_pretrained`` loads both.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
        """
        self.configure_model()
        if merge_adapter and self.trains_members_in_turn:
            check_merge(self)
        complete = merge_adapter or not hasattr(self.model, "peft_config")
        if complete and self.head_kind == "linear" and self.num_models == 1 and self.pooling == "last":
            tokenizer = with_padding_token(self._export_tokenizer())
            convert = classifier_from(whole(self.head.weight)[0], self.attributes, int(tokenizer.pad_token_id))
            files = head_files(None, {"method": self.method, **self.options()})
            with suppress(NoClassifier):
                export_pretrained(
                    self.model, tokenizer, folder, merge_adapter=merge_adapter, convert=convert, beside=files
                )
                return
        super().save_pretrained(folder, merge_adapter=merge_adapter)
