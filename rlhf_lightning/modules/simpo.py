"""Preference optimisation without a reference model: SimPO, AlphaPO, CPO and ORPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..core.module import PostTrainingModule
from ..core.sequence_rows import check_pairs, num_scored, pair_rows
from ..distributed.collectives import Metrics, Rows
from ..losses.simpo import NLL_WEIGHTS, SimPOLossType, alphapo_reward, simpo_loss, validate_simpo_loss
from ..metrics.rewards import pair_metrics
from ..sequences import Example, ExampleBatch, SequenceBatch


class SimPOModule(PostTrainingModule):
    r"""Simple preference optimisation (Meng et al., 2024, arXiv:2405.14734) and its reference-free relatives.

    .. math:: L = -\frac{1}{P} \sum \log \sigma\big(\tfrac{\beta}{|y_c|} \log \pi(y_c|x)
              - \tfrac{\beta}{|y_r|} \log \pi(y_r|x) - \gamma\big)

    ``losses.simpo.simpo_loss`` documents formula, paper and departures of every ``loss_type``. Only one model is in
    memory: none of these losses uses a reference.

    Args:
        model: Hugging Face id or folder.
        beta: factor of the rewards, above 0: 2 to 10 for ``simpo`` and ``alphapo``, 0.1 for the others.
        gamma: target margin of the rewards, at least 0; of ``simpo`` and ``alphapo``.
        loss_type: ``simpo``, ``alphapo``, ``cpo``, ``cpo_hinge``, ``cpo_ipo`` or ``orpo``.
        alpha: shape of the reward of ``alphapo``, in [-10, 10]; 0 is ``simpo``.
        label_smoothing: probability that a label is flipped, in [0, 0.5); of ``simpo``, ``alphapo`` and ``cpo``.
        nll_weight: weight of the chosen completion's negative log-likelihood per token, at least 0; by default the
            paper's: 0 for ``simpo`` and ``alphapo``, 1 for the others.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = SimPOModule("my-sft-model", beta=2.5, gamma=1.0)
        lightning.Trainer(max_epochs=1).fit(module, PreferenceDataModule(train="pairs.jsonl", global_batch_size=8))
    """

    default_learning_rate: ClassVar[float] = 1e-6
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "rewards/accuracies", "rewards/margins")
    contracts: ClassVar[tuple[str, ...]] = ("PreferenceDataModule",)

    def __init__(
        self,
        model: str,
        *,
        beta: float = 2.0,
        gamma: float = 0.5,
        loss_type: SimPOLossType = "simpo",
        alpha: float = 0.25,
        label_smoothing: float = 0.0,
        nll_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        validate_simpo_loss(
            loss_type, beta=beta, gamma=gamma, alpha=alpha, label_smoothing=label_smoothing, nll_weight=nll_weight
        )
        super().__init__(model, **kwargs)
        self.beta = beta
        self.loss_type: SimPOLossType = loss_type
        self.alpha = alpha
        self.nll_weight = NLL_WEIGHTS[loss_type] if nll_weight is None else nll_weight
        self._loss_options: dict[str, Any] = {
            "loss_type": loss_type,
            "beta": beta,
            "gamma": gamma,
            "alpha": alpha,
            "label_smoothing": label_smoothing,
        }

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts pairs, and tokens of the chosen completions."""
        tokens = sum(num_scored(example)[0] for example in examples)
        return {"pairs": float(len(examples)), "chosen_tokens": float(tokens)}

    def no_grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes the lengths of both completions."""
        return pair_rows("{}_lengths", batch.scored_lengths)

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes log-probs of both completions under the policy."""
        stats = self.token_stats(batch)
        rows = pair_rows("{}_logps", batch.sum_per_sequence(stats.logprobs))
        correct = batch.sum_per_sequence(stats.correct.to(stats.logprobs.dtype))
        rows["correct"] = pair_rows("{}", correct)["chosen"]
        return rows

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Adds the preference loss per pair and the weighted negative log-likelihood per token."""
        preference, nll = simpo_loss(
            rows["chosen_logps"],
            rows["rejected_logps"],
            chosen_lengths=rows["chosen_lengths"],
            rejected_lengths=rows["rejected_lengths"],
            **self._loss_options,
        )
        total = preference.sum() / normalizers["pairs"]
        return total + self.nll_weight * nll.sum() / normalizers["chosen_tokens"] if self.nll_weight else total

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes implicit rewards (beta times the values that the loss compares), margin, accuracy and log-probs."""
        chosen, rejected = (self._rewards(rows, name) for name in ("chosen", "rejected"))
        values = pair_metrics(chosen, rejected) | {
            "logps/chosen": rows["chosen_logps"].mean(),
            "logps/rejected": rows["rejected_logps"].mean(),
            "mean_token_accuracy": rows["correct"].sum() / normalizers["chosen_tokens"],
        }
        if self.nll_weight:
            values["nll"] = -rows["chosen_logps"].sum() / normalizers["chosen_tokens"]
        return values

    def _rewards(self, rows: Rows, name: str) -> Tensor:
        logps = rows[f"{name}_logps"]
        if self.loss_type in ("cpo", "cpo_hinge"):
            return self.beta * logps
        mean_logps = logps / rows[f"{name}_lengths"]
        return self.beta * (alphapo_reward(mean_logps, self.alpha) if self.loss_type == "alphapo" else mean_logps)

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        check_pairs(examples)
        return examples
