"""Kahneman-Tversky optimisation: preferences from completions that are labelled good or bad individually.

Legend: S sequences, E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.module import PostTrainingModule
from ..core.reference_policy import ReferencePolicy
from ..core.sequence_rows import num_scored
from ..distributed.collectives import Metrics, Rows, gather_objects, sum_over_ranks
from ..losses.kto import COUPLED, KTOLossType, kto_kl, kto_loss, validate_kto_loss
from ..metrics.rewards import reward_metrics
from ..models import evaluating, num_positions
from ..sequences import (
    Example,
    ExampleBatch,
    Segment,
    SequenceBatch,
    grow_tree,
    split_answer,
    unfold_tree,
    with_answer,
)
from ..utils.validation import check_fraction

_FALLBACK = "_borrowed"  # the field of an example whose partner comes from an earlier batch


class KTOModule(PostTrainingModule):
    r"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306) and unpaired APO-zero.

    .. math:: L = \frac{1}{B} \sum w_y\, \sigma\big(\mp\beta(h - z)\big), \qquad
              h = \log\tfrac{\pi(y|x)}{\pi_{ref}(y|x)}, \quad
              z = \max\big(0, \tfrac{1}{M} \sum \log\tfrac{\pi(y'|x)}{\pi_{ref}(y'|x)}\big)

    The sign is minus for desirable and plus for undesirable completions. The estimate z of the KL divergence is a mean
    over the *global* batch's prompts, each with a completion y' of another prompt (its partner), which
    ``UnpairedDataModule`` assigns before the batch is split over ranks and micro-batches; it carries no gradient.

    If no row of a global batch has a partner (batches of one row, or of one prompt), every row borrows a completion of
    the last batch without partners, and z is the running estimate of all estimates so far, at least 0: with the
    estimate m_t of step t and d = ``kl_ema_decay``, sum_i d^(t-i) m_i / sum_i d^(t-i). Before the first estimate the
    policy is the reference, and z is 0.

    Args:
        model: Hugging Face id or folder.
        beta: strength of the regularisation towards the reference, above 0.
        desirable_weight: weight of completions labelled true, at least 0.
        undesirable_weight: weight of completions labelled false, at least 0.
        loss_type: ``kto``; or ``apo_zero_unpaired``, which uses 0 instead of z and needs no partners.
        kl_ema_decay: decay of the running estimate per step, in [0, 1); 0 uses the newest estimate alone.
        reference: see ``core.ReferencePolicy``; ``precomputed`` is for ``apo_zero_unpaired``, since partners change.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = KTOModule("my-sft-model", beta=0.1, undesirable_weight=1.5)
        lightning.Trainer(max_epochs=1).fit(module, UnpairedDataModule(train="rows.jsonl", global_batch_size=16))
    """

    default_learning_rate: ClassVar[float] = 1e-6
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "kl", "rewards/margins")
    reference: ReferencePolicy
    contracts: ClassVar[tuple[str, ...]] = ("UnpairedDataModule",)

    def __init__(
        self,
        model: str,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: KTOLossType = "kto",
        kl_ema_decay: float = 0.95,
        reference: Literal["auto", "frozen", "adapter", "precomputed"] = "auto",
        **kwargs: Any,
    ) -> None:
        validate_kto_loss(
            loss_type, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        )
        check_fraction("kl_ema_decay", kl_ema_decay, "0.95 is usual; 0 keeps the newest estimate alone")
        if reference == "precomputed" and loss_type in COUPLED:
            raise ValueError(
                f"reference is 'precomputed', but the partners of loss_type {loss_type!r} change with every batch: use "
                "'frozen', or 'adapter' with lora, or loss_type='apo_zero_unpaired'"
            )
        super().__init__(model, **kwargs)
        self.reference = ReferencePolicy(self, reference)
        self.beta = beta
        self.loss_type: KTOLossType = loss_type
        self.kl_ema_decay = kl_ema_decay
        self._weights = {True: desirable_weight, False: undesirable_weight}
        # The running estimate before division by its weight, which corrects the initial bias.
        self._kl_sum = 0.0
        self._kl_weight = 0.0
        self._fallback_partner: tuple[str, list[int], list[int]] | None = None  # row id, prompt, completion
        self._local_examples: list[Example] = []

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether rows share the estimate of the KL divergence."""
        return self.loss_type in COUPLED

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts examples, and those with a partner of their own batch."""
        partners = sum(_has_partner(e) and _FALLBACK not in e.fields for e in examples)
        return {"examples": float(len(examples)), "partners": float(partners)}

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Collects labels, each example's first and last sequence, which have a partner, and the reference's rows."""
        has_partner = np.array([_has_partner(example) for example in examples], bool)
        last = np.cumsum(has_partner + 1) - 1
        return {
            "label": np.array([bool(example.fields["label"]) for example in examples]),
            "first_sequence": last - has_partner,
            "last_sequence": last,
            "has_partner": has_partner,
            "paired": np.flatnonzero(has_partner),
            **self.reference.arrays(examples),
        }

    def example_parts(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """Separates completions from their partners: the policy scores both, but only one of them with gradient."""
        paired = [example for example in examples if _has_partner(example)]
        if not self.uses_batch_statistics or not paired:
            return {}
        partners = [_only(example, 1) for example in paired]
        return {"partners": partners, "own": [_only(example, 0) for example in examples]}

    def reference_rows(self, batch: SequenceBatch, model: nn.Module) -> Rows:
        """Computes log-probs of completions and partners under the reference."""
        logps_S = batch.sum_per_sequence(self.token_stats(batch, model).logprobs)
        extra = self.extra(batch)
        rows = {"ref_logps": logps_S[extra["first_sequence"]]}
        if self.uses_batch_statistics:
            rows["ref_kl_logps"] = torch.where(extra["has_partner"], logps_S[extra["last_sequence"]], 0.0)
        return rows

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes labels, log-probs under the reference, and log-probs of the partners under the policy."""
        extra = self.extra(batch)
        rows = {"label": extra["label"]} | self.reference.rows(batch)
        if not self.uses_batch_statistics:
            return rows
        kl_logps = torch.zeros_like(rows["ref_kl_logps"])
        partners = self.micro_batching.part(batch, "partners")
        if partners is not None:
            with evaluating(self.model):
                logps = partners.sum_per_sequence(self.token_stats(partners).logprobs).to(kl_logps.dtype)
            kl_logps = kl_logps.index_copy(0, extra["paired"], logps)
        return rows | {"kl_logps": kl_logps, "has_partner": extra["has_partner"]}

    def batch_statistics(self, no_grad_rows: Rows, normalizers: dict[str, float]) -> dict[str, float]:
        """Computes the estimate of the KL divergence, its number of partners, and the newest estimate."""
        paired = no_grad_rows["has_partner"]
        count = float(paired.sum())
        if count == 0:
            return {"kl": max(0.0, self._running_kl()), "kl_samples": 0.0}
        policy, reference = (no_grad_rows[name][paired].double() for name in ("kl_logps", "ref_kl_logps"))
        newest = float((policy - reference).mean())
        if normalizers["partners"] > 0:
            return {"kl": float(kto_kl(policy, reference)), "kl_samples": count, "kl_newest": newest}
        return {"kl": max(0.0, self._running_kl(newest)), "kl_samples": count, "kl_newest": newest}

    def _running_kl(self, newest: float | None = None) -> float:
        """Returns the running estimate, optionally updated by a new one without storing it."""
        total, weight = self._kl_sum, self._kl_weight
        if newest is not None:
            total, weight = self.kl_ema_decay * total + newest, self.kl_ema_decay * weight + 1
        return total / weight if weight else 0.0

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes log-probs of the completions under the policy."""
        # Without the partners, whose log-probs carry no gradient.
        batch = self.micro_batching.part(batch, "own") or batch
        return {"logps": batch.sum_per_sequence(self.token_stats(batch).logprobs)}

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Averages the loss over the examples of the global batch."""
        losses = kto_loss(
            rows["logps"],
            rows["ref_logps"],
            label_B=rows["label"],
            kl=normalizers.get("kl"),
            beta=self.beta,
            desirable_weight=self._weights[True],
            undesirable_weight=self._weights[False],
            loss_type=self.loss_type,
        )
        return losses.sum() / normalizers["examples"]

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes implicit rewards and log-probs of the completions of each label, and the KL estimate."""
        label, rewards = rows["label"], self.beta * (rows["logps"] - rows["ref_logps"])
        right = (rewards > self.beta * normalizers.get("kl", 0.0)) == label
        values = {"rewards/accuracies": right.double().mean(), "desirable": label.double().mean()}
        values |= reward_metrics(rewards[label], rewards[~label])
        for name, mask in (("chosen", label), ("rejected", ~label)):
            if mask.any():
                values[f"logps/{name}"] = rows["logps"][mask].mean()
        if "kl" in normalizers:
            values |= {name: torch.tensor(normalizers[name], dtype=torch.float64) for name in ("kl", "kl_samples")}
        return values

    # Batches without partners.

    def training_step(self, batch: ExampleBatch, batch_idx: int) -> Metrics | None:
        """Makes one step; rows of a batch without partners borrow one."""
        if isinstance(batch, ExampleBatch) and self.uses_batch_statistics:
            if self.front is not None:  # what is borrowed follows contexts as well
                batch = self.front.follow(batch, batch.mark_consumed)
            self._local_examples = batch.examples
            batch = self._add_fallback_partner(batch)
        return super().training_step(batch, batch_idx)

    def _add_fallback_partner(self, batch: ExampleBatch) -> ExampleBatch:
        """Gives rows a partner from an earlier batch, if no row of any rank has one."""
        paired = {"partners": float(sum(map(_has_partner, batch.examples)))}
        if sum_over_ranks(paired)["partners"] or self._fallback_partner is None:
            return batch
        row_id, prompt, completion = self._fallback_partner
        positions = num_positions(self.model)
        extended = []
        for example in batch.examples:
            tokens, _ = split_answer(example)
            length = example.root.first_position + len(tokens) + len(completion)
            fits = positions is None or length <= positions
            if fits and not _has_partner(example) and tokens.tolist() != prompt:
                partner = Segment(np.asarray(completion), np.ones(len(completion), np.float32))
                root = with_answer(example.root, tokens, partner)
                example = Example(example.row_id, root, {**example.fields, "partner": row_id, _FALLBACK: True})
            extended.append(example)
        return ExampleBatch(extended, on_consumed=batch.mark_consumed)

    def after_step(self, rows: Rows, normalizers: dict[str, float]) -> None:
        """Updates the running estimate, and chooses the completion that the next batch without partners may borrow."""
        if not self.uses_batch_statistics:
            return
        if normalizers["kl_samples"]:
            self._kl_sum = self.kl_ema_decay * self._kl_sum + normalizers["kl_newest"]
            self._kl_weight = self.kl_ema_decay * self._kl_weight + 1
        if normalizers["partners"]:
            return
        offers = [offer for part in gather_objects([_as_partner(e) for e in self._local_examples]) for offer in part]
        self._fallback_partner = min(offers, key=lambda offer: blake2b(offer[0].encode(), digest_size=8).digest())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the running estimate and the completion that may be borrowed."""
        super().on_save_checkpoint(checkpoint)
        partner = None if self._fallback_partner is None else list(self._fallback_partner)
        checkpoint["kto"] = {"kl_sum": self._kl_sum, "kl_weight": self._kl_weight, "fallback_partner": partner}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the running estimate and the completion that may be borrowed."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("kto", {"kl_sum": 0.0, "kl_weight": 0.0, "fallback_partner": None})
        self._kl_sum, self._kl_weight = state["kl_sum"], state["kl_weight"]
        self._fallback_partner = None if state["fallback_partner"] is None else tuple(state["fallback_partner"])

    # Checks of rows.

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        for example in examples:
            label, scored = example.fields.get("label"), num_scored(example)
            if not isinstance(label, bool):
                raise ValueError(
                    f"row {example.row_id} has the label {label!r}; it must be true or false: use UnpairedDataModule, "
                    "which reads prompt, completion and label, or splits pairs"
                )
            if not example.root.children or len(scored) > 2 or 0 in scored:
                raise ValueError(
                    f"row {example.row_id} has {len(scored)} sequences with {scored} scored tokens; it needs a "
                    "completion and at most one partner, with at least one each: use UnpairedDataModule"
                )
        return examples if self.uses_batch_statistics else [_only(example, 0) for example in examples]

    def on_train_start(self) -> None:
        """Refuses training data with a single label, if all rows are in memory."""
        super().on_train_start()
        examples = getattr(self.trainer.train_dataloader, "examples", None)
        if examples is None:
            return
        seen: set[bool] = set()
        for example in examples:
            seen.add(bool(example.fields.get("label")))
            if len(seen) == 2:
                return
        for label in seen:
            other, name = not label, "undesirable_weight" if label else "desirable_weight"
            if self._weights[other] > 0:
                raise ValueError(
                    f"all {len(examples)} training rows (from {examples[0].row_id} to {examples[-1].row_id}) are "
                    f"labelled {str(label).lower()}; KTO needs both labels: add rows labelled {str(other).lower()}, or "
                    f"set {name}=0 if that is meant"
                )


def _has_partner(example: Example) -> bool:
    return len(example.sequences) > 1


def _only(example: Example, number: int) -> Example:
    """Returns an example with only one of its completions."""
    if not _has_partner(example):
        return example
    root = grow_tree([unfold_tree(example.root)[number]], example.root.tokens)
    return Example(example.row_id, replace(root, after=example.root.after), example.fields)


def _as_partner(example: Example) -> tuple[str, list[int], list[int]]:
    """Returns row id, prompt and completion of an example, for another prompt to borrow."""
    prompt, completion = split_answer(example)
    return example.row_id, prompt.tolist(), completion.tokens.tolist()
