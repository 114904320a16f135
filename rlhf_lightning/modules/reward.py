"""Outcome reward models: one scalar, or several, for a whole completion.

Legend: E examples, M members of an ensemble, K attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.headed_module import HeadedModule
from ..core.micro_batching import prompt_keys
from ..core.reward_rows import bootstrap_weights, check_pair, check_rated, ratings_of
from ..core.router_loss import AUX_LOSS, RouterLoss
from ..core.sequence_rows import check_pairs, num_scored
from ..data.messages import Text
from ..distributed.collectives import Metrics, Rows
from ..losses.reward_options import RewardLoss, RewardLossType
from ..metrics.rewards import pair_metrics, rating_metrics, spread
from ..models import RewardModel
from ..models.headed_model import HeadedModel
from ..models.reward_ensemble import using_member
from ..models.reward_head import HeadKind
from ..models.reward_model import EnsembleKind, Pooling, RewardModelOptions
from ..models.scoring import TemplateSettings
from ..sequences import Example, ExampleBatch, SequenceBatch


class RewardModule(HeadedModule):
    r"""Trains a reward model: a decoder with a scalar head, read at the end of the completion.

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
    model_type: ClassVar[type[HeadedModel]] = RewardModel
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
        pooling: Pooling = "last",
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
        options = RewardModelOptions(
            head=head,
            num_attributes=num_attributes,
            pooling=pooling,
            attributes=attributes,
            attribute_weights=attribute_weights,
            num_models=num_models,
            ensemble=ensemble,
        )
        criterion = RewardLoss(
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            margin=margin,
            center_rewards_coefficient=center_rewards_coefficient,
            l2_coefficient=l2_coefficient,
            tie_threshold=tie_threshold,
            huber_delta=huber_delta,
        )
        criterion.check_rows(average_over, attributes)
        super().__init__(model, **kwargs)
        self.options = options
        self.seed = seed
        self.head = None
        self._turn: int | None = None  # the member whose pass is running, if members take turns
        self.criterion = criterion
        self.use_margins = use_margins
        self.average_over = average_over
        self.bootstrap = bootstrap

    # Learning.

    @property
    def couples_rows(self) -> bool:
        """Whether a pair's weight depends on the number of pairs of its prompt in the global batch."""
        return self.average_over == "prompts"

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts pairs, or ratings that are not missing."""
        if self.criterion.compares_pairs:
            return {"pairs": float(len(examples))}
        ratings = [rating for example in examples for rating in ratings_of(example, self.options.names)]
        return {"ratings": float(sum(not math.isnan(rating) for rating in ratings))}

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Returns margins and ties, or ratings, and each member's weights of rows."""
        extra = self.extra(batch)
        return {name: extra[name] for name in ("margin", "tie", "prompt", "ratings", "weights") if name in extra}

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Collects margins and ties, or ratings, and each member's weights of rows."""
        found: dict[str, np.ndarray] = {}
        if self.criterion.compares_pairs:
            found["margin"] = np.array([self._margin(example) for example in examples], np.float64)
            found["tie"] = np.array([bool(example.fields.get("tie")) for example in examples])
            if self.average_over == "prompts":
                found["prompt"] = prompt_keys(examples)
        else:
            ratings = [ratings_of(example, self.options.names) for example in examples]
            found["ratings"] = np.array(ratings, np.float64)
        num_models = self.options.num_models
        if self.bootstrap and num_models > 1 and self.training:
            members = slice(None) if self._turn is None else slice(self._turn, self._turn + 1)
            row_ids = [example.row_id for example in examples]
            found["weights"] = bootstrap_weights(row_ids, num_models, self.seed)[:, members].numpy()
        return found

    def _margin(self, example: Example) -> float:
        own = example.fields.get("margin") if self.use_margins else None
        return self.criterion.margin if own is None else float(own)

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes rewards: ``(E, sequences of a row, M, K)``."""
        rewards_SMK = self.reward_model(batch, self.layout, self._turn)
        return {"rewards": rewards_SMK.unflatten(0, (batch.num_examples, -1))}

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Averages over pairs or ratings and over members."""
        if self.criterion.compares_pairs:
            chosen_EM, rejected_EM = self.options.combined(rows["rewards"]).unbind(dim=1)
            losses = self.criterion.of_pairs(chosen_EM, rejected_EM, margin_E=rows["margin"], tie_E=rows["tie"])
            count: float | Tensor = normalizers["pairs"]
        else:
            losses = self.criterion.of_ratings(rows["rewards"].squeeze(1), rows["ratings"])
            count = normalizers["ratings"]
            if count == 0:
                raise ValueError(
                    f"no row of this batch has a rating of {self.options.names}: name their columns with attributes="
                )
        if "weights" in rows:
            losses = losses * rows["weights"].to(losses.dtype)
        if "prompt" in rows:
            # How many pairs each pair's prompt has; their inverses add up to the number of prompts.
            sizes_E = (rows["prompt"][:, None] == rows["prompt"]).sum(dim=1)
            count = sizes_E.double().reciprocal().sum().round().to(losses.dtype)
            losses = losses / sizes_E[:, None]
        total: Tensor = losses.sum() / (count * self.options.num_models)
        return total

    def after_step(self, rows: Rows, normalizers: dict[str, float]) -> None:
        """Updates the running means of an ensemble that learns from pairs."""
        if self.options.num_models > 1 and self.criterion.compares_pairs:
            self.reward_model.means.update(rows["rewards"])

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes metrics of mean rewards: accuracy and margin of pairs, or correlation with ratings."""
        combined = self.options.combined(self.reward_model.means.centred(rows["rewards"]))  # (E, sequences, M)
        rewards = combined.mean(dim=-1)
        values = spread(rewards)
        if self.options.num_models > 1:
            values["rewards/disagreement"] = combined.std(dim=-1, correction=0).mean()
        if self.criterion.compares_pairs:
            return values | pair_metrics(*rewards.unbind(dim=1), tie_P=rows["tie"], calibration=not self.training)
        return values | rating_metrics(rows["rewards"].squeeze(1).mean(dim=1), rows["ratings"], self.options.names)

    # Members that take turns.

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss, averaged over members that take turns, as is the method's own loss."""
        loss = super().router_loss
        if loss is None or not self.options.members_take_turns:
            return loss
        return replace(loss, coef=loss.coef / self.options.num_models)

    def backward_examples(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, Any]]:
        """Accumulates the gradient of the global batch's loss, for all members at once or one after the other."""
        if not self.options.members_take_turns:
            return super().backward_examples(examples)
        parts: list[Rows] = []
        normalizers: dict[str, Any] = {}
        balance: Any = 0.0
        for member in range(self.options.num_models):
            self._turn = member
            try:
                with using_member(self.model, member):
                    rows, normalizers = super().backward_examples(examples)
            finally:
                self._turn = None
            parts.append(rows)
            balance += normalizers.get(AUX_LOSS, 0.0) / self.options.num_models

        # The parts hold the same examples in the same order.
        joined = dict(parts[0])
        for name, dim in (("rewards", 2), ("weights", 1)):
            if name in joined:
                joined[name] = torch.cat([part[name] for part in parts], dim=dim)
        return joined, normalizers | ({AUX_LOSS: balance} if AUX_LOSS in normalizers else {})

    # Checks of rows.

    def on_train_start(self) -> None:
        """Refuses an attribute that no training row rates, if all rows are in memory."""
        super().on_train_start()
        examples = getattr(self.trainer.train_dataloader, "examples", None)
        if examples is not None and not self.criterion.compares_pairs:
            check_rated(examples, self.options.names)

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        if self.criterion.compares_pairs:
            check_pairs(examples)
            for example in examples:
                check_pair(example, use_margins=self.use_margins, allow_ties=self.criterion.tie_threshold is not None)
            return examples
        for example in examples:
            if len(num_scored(example)) != 1:
                raise ValueError(
                    f"row {example.row_id} has {len(num_scored(example))} completions; loss_type "
                    f"{self.criterion.loss_type!r} rates one: give rows of prompt, completion and the ratings to "
                    "PreferenceDataModule"
                )
        return examples

    # Scoring.

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], chat_template_kwargs: TemplateSettings = None
    ) -> list[float]:
        """Computes one reward per completion, as ``RewardModel.score`` does."""
        return self.score_with_std(prompts, completions, chat_template_kwargs)[0]

    def score_with_std(
        self, prompts: Sequence[Text], completions: Sequence[Text], chat_template_kwargs: TemplateSettings = None
    ) -> tuple[list[float], list[float]]:
        """Computes rewards and their standard deviation over the members, as ``RewardModel.score_with_std`` does."""
        found: tuple[list[float], list[float]] = self.scorer().score_with_std(
            prompts, completions, chat_template_kwargs
        )
        return found

    def predict_step(self, batch: ExampleBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Scores rows with any number of completions.

        Returns:
            Per row ``row_id`` and lists with one entry per completion: ``rewards`` (means over the members), ``stds``
            (standard deviations over the members) and, with several attributes, ``attributes`` (K means each).
        """
        rows = []
        for example, values in zip(batch.examples, self.reward_model.score_examples(batch.examples), strict=True):
            rewards, stds = self.reward_model.summarized(values)
            row: dict[str, Any] = {"row_id": example.row_id, "rewards": rewards, "stds": stds}
            if self.options.num_attributes > 1:
                row["attributes"] = [value.mean(dim=0).tolist() for value in values]
            rows.append(row)
        return rows

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the running means of the members."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward"] = self.reward_model.means.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the running means of the members."""
        super().on_load_checkpoint(checkpoint)
        if "reward" in checkpoint:
            self.reward_model.means.load_state_dict(checkpoint["reward"])
