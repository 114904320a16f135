"""Direct preference optimisation and its family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..core.logging import store_options
from ..core.module import PostTrainingModule
from ..core.reference_policy import ReferencePolicy
from ..core.sequence_rows import check_pairs, num_scored, pair_rows
from ..distributed.collectives import Metrics, Rows
from ..losses.preference import (
    FDivergenceType,
    PreferenceLoss,
    ld_alpha_logps,
    load_loss,
    loss_spec,
    preference_loss,
    validate_preference_loss,
    wpo_weights,
)
from ..metrics.rewards import pair_metrics
from ..sequences import Example, SequenceBatch
from ..utils.imports import dotted_path


class DPOModule(PostTrainingModule):
    r"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290) and related losses.

    .. math:: L = -\frac{1}{P} \sum \log \sigma\big(\beta \log\tfrac{\pi(y_c|x)}{\pi_{ref}(y_c|x)}
              - \beta \log\tfrac{\pi(y_r|x)}{\pi_{ref}(y_r|x)}\big)

    ``losses.preference.preference_loss`` documents formula, paper and departures of every ``loss_type``. Losses
    that couple the pairs of a batch (``aot``, ``aot_unpaired``, ``bco_pair``) couple those of the *global* batch.

    Args:
        model: Hugging Face id or folder.
        beta: strength of the regularisation towards the reference, above 0.
        loss_type: one loss, or a list that is summed with ``loss_weights`` (``["sigmoid", "sft"]`` is RPO). A loss of
            one's own is a function from ``losses.preference.PreferencePairs`` to one loss per pair, or its dotted path.
        loss_weights: one weight per loss; 1 each by default.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        f_divergence_type: divergence from the reference (f-DPO).
        f_alpha_divergence_coef: alpha of the alpha-divergence, in [0, 1].
        discopop_tau: temperature of ``discopop``, above 0.
        ld_alpha: weight of tokens beyond the shorter completion's length (LD-DPO), in [0, 1]; ``None`` is 1.
        use_weighting: weight pairs by their likelihood under the policy (WPO); the ``sft`` term is not weighted.
        reference: see ``core.ReferencePolicy``.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = DPOModule("my-sft-model", beta=0.1)
        lightning.Trainer(max_epochs=1).fit(module, PreferenceDataModule(train="pairs.jsonl", global_batch_size=8))
    """

    default_learning_rate: ClassVar[float] = 1e-6
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "rewards/accuracies", "rewards/margins")
    reference: ReferencePolicy
    contracts: ClassVar[tuple[str, ...]] = ("PreferenceDataModule",)

    def __init__(
        self,
        model: str,
        *,
        beta: float = 0.1,
        loss_type: PreferenceLoss | list[PreferenceLoss] = "sigmoid",
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence_type: FDivergenceType = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        reference: Literal["auto", "frozen", "adapter", "precomputed"] = "auto",
        **kwargs: Any,
    ) -> None:
        loss_types = [load_loss(name) for name in (loss_type if isinstance(loss_type, list | tuple) else [loss_type])]
        validate_preference_loss(
            loss_types,
            loss_weights,
            beta=beta,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            discopop_tau=discopop_tau,
            ld_alpha=ld_alpha,
            use_weighting=use_weighting,
        )

        super().__init__(model, **kwargs)
        self.reference = ReferencePolicy(self, reference)
        # Checkpoints must load without the script that defined a function, so store its path.
        names = [name if isinstance(name, str) else dotted_path(name) for name in loss_types]
        store_options(self, loss_type=names if isinstance(loss_type, list | tuple) else names[0])
        self.beta = beta
        self.loss_types = loss_types
        self.loss_weights = loss_weights or [1.0] * len(self.loss_types)
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self._loss_options: dict[str, Any] = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "discopop_tau": discopop_tau,
        }

    @property
    def couples_rows(self) -> bool:
        """Whether any of the losses sorts or centres over the batch."""
        return any(loss_spec(loss_type).couples_pairs for loss_type in self.loss_types)

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts pairs, and tokens of the chosen completions."""
        check_pairs(examples)
        tokens = sum(num_scored(example)[0] for example in examples)
        return {"pairs": float(len(examples)), "chosen_tokens": float(tokens)}

    def example_arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Looks precomputed log-probs of the reference up."""
        return self.reference.arrays(examples)

    def reference_rows(self, batch: SequenceBatch, model: nn.Module) -> Rows:
        """Computes log-probs of both completions under the reference."""
        logps = self._sequence_logps(batch, self.token_stats(batch, model).logprobs)
        return pair_rows("ref_{}_logps", logps)

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes lengths, and log-probs under the reference."""
        return self.reference.rows(batch) | pair_rows("{}_lengths", batch.scored_lengths)

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes log-probs of both completions under the policy, and further values of some losses."""
        stats = self.token_stats(batch, power=self.use_weighting)
        rows = pair_rows("{}_logps", self._sequence_logps(batch, stats.logprobs))
        if any(loss_type == "sft" or callable(loss_type) for loss_type in self.loss_types):
            rows["sft_logps"] = pair_rows("{}", batch.sum_per_sequence(stats.logprobs))["chosen"]
        if self.use_weighting:
            weights = wpo_weights(
                stats.logprobs, stats.log_sum_p2, batch.sequence_index, num_sequences=batch.num_sequences
            )
            rows["weights"] = weights.view(-1, 2).prod(dim=1)
        correct = batch.sum_per_sequence(stats.correct.to(stats.logprobs.dtype))
        rows["correct"] = pair_rows("{}", correct)["chosen"]
        return rows

    def _sequence_logps(self, batch: SequenceBatch, logprobs: Tensor) -> Tensor:
        """Sums log-probs per completion, ``(S,)``, with ``ld_alpha`` as length-desensitised DPO does."""
        if self.ld_alpha is None:
            return batch.sum_per_sequence(logprobs)
        lengths = batch.scored_lengths
        first = (lengths.cumsum(0) - lengths)[batch.sequence_index]
        position = torch.arange(len(logprobs), device=logprobs.device) - first
        public = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
        return ld_alpha_logps(logprobs, batch.sequence_index, position, public_lengths_S=public, ld_alpha=self.ld_alpha)

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Computes the weighted sum of the losses, each divided by its own global total."""
        names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        total = rows["chosen_logps"].new_zeros(())
        for loss_type, weight in zip(self.loss_types, self.loss_weights, strict=True):
            values = preference_loss(
                *(rows[name] for name in names),
                chosen_lengths=rows["chosen_lengths"],
                rejected_lengths=rows["rejected_lengths"],
                loss_type=loss_type,
                sft_logps=rows.get("sft_logps"),
                **self._loss_options,
            )
            normalizer = loss_spec(loss_type).divided_by
            if self.use_weighting and normalizer == "pairs":
                values = values * rows["weights"].detach()
            total = total + weight * values.sum() / normalizers[normalizer]
        return total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes implicit rewards beta * log(policy / reference), their margin and accuracy, and log-probs."""
        chosen = self.beta * (rows["chosen_logps"] - rows["ref_chosen_logps"])
        rejected = self.beta * (rows["rejected_logps"] - rows["ref_rejected_logps"])
        return pair_metrics(chosen, rejected) | {
            "logps/chosen": rows["chosen_logps"].mean(),
            "logps/rejected": rows["rejected_logps"].mean(),
            "mean_token_accuracy": rows["correct"].sum() / normalizers["chosen_tokens"],
        }
