"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..core.module import PostTrainingModule
from ..distributed.collectives import Metrics, Rows
from ..losses.sft import SFTLossType, sft_loss, validate_sft_loss
from ..sequences import Example, ExampleBatch, SequenceBatch


class SFTModule(PostTrainingModule):
    r"""Supervised fine-tuning: maximum likelihood of the demonstrated tokens.

    .. math:: L = \frac{1}{\sum_i w_i} \sum_i w_i\, \ell_i, \qquad \ell_i = -\log p(y_i \mid y_{<i}, x)

    The sums run over every scored token of the global batch, so that all tokens count the same.

    Args:
        model: Hugging Face id or folder.
        loss_type: ``"nll"``; or ``"dft"``, dynamic fine-tuning, which weights a token by its own probability.
        label_smoothing: share of the target spread over the vocabulary, in [0, 1); only with ``nll``.
        kwargs: options of ``PostTrainingModule``.

    Example::

        module = SFTModule("my-model", micro_batch_tokens=4096)
        lightning.Trainer(max_epochs=1).fit(module, SFTDataModule(train="rows.jsonl", global_batch_size=16))
    """

    keeps_dropout: ClassVar[bool] = True
    default_learning_rate: ClassVar[float] = 2e-5
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss", "mean_token_accuracy")
    contracts: ClassVar[tuple[str, ...]] = ("SFTDataModule", "ContextDataModule")

    def __init__(
        self, model: str, *, loss_type: SFTLossType = "nll", label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        validate_sft_loss(loss_type, label_smoothing=label_smoothing)
        super().__init__(model, **kwargs)
        self.loss_type: SFTLossType = loss_type
        self.label_smoothing = label_smoothing

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts the weighted tokens of all sequences."""
        weights = (weights for example in examples for weights in example.weights_per_sequence())
        return {"tokens": sum(float(part.sum()) for part in weights)}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Computes per example the weighted sums of losses, log-probs and correctly predicted tokens."""
        stats = self.token_stats(batch, mean=self.label_smoothing > 0)
        losses = sft_loss(
            stats.logprobs,
            mean_logprobs_N=stats.mean_logprobs if self.label_smoothing > 0 else None,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
        )
        weights = batch.weights.to(losses.dtype)
        return {
            "loss": batch.sum_per_example(losses * weights),
            "logps": batch.sum_per_example((stats.logprobs * weights).detach()),
            "correct": batch.sum_per_example(stats.correct * weights),
        }

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Divides the sum over tokens by the global batch's tokens."""
        return rows["loss"].sum() / max(normalizers["tokens"], 1e-12)  # a batch without a scored token has loss 0

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Computes token accuracy, and the negative log-likelihood unless it is the loss."""
        values = {"mean_token_accuracy": rows["correct"].sum() / max(normalizers["tokens"], 1e-12)}
        if self.loss_type != "nll" or self.label_smoothing > 0:
            values["nll"] = -rows["logps"].sum() / max(normalizers["tokens"], 1e-12)
        return values

    def validate_batch(self, batch: ExampleBatch) -> list[Example]:
        """Checks the rows of a batch, also against the method's own requirements."""
        examples = super().validate_batch(batch)
        for example in examples:
            if all(segment.weights is None for path in example.root.paths() for segment in path):
                raise ValueError(
                    f"row {example.row_id} has no weights, so nothing of it is learnt: use SFTDataModule, or give the "
                    "segments to be learnt weights of 1"
                )
        return examples
