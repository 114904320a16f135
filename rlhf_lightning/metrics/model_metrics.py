"""Metrics of models as torchmetrics: divergence, perplexity, rewards of pairs, calibration, first errors.

Legend: N tokens, V vocabulary, B pairs or predictions, S solutions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.validation import check_count
from .functional import calibration_bins, error_of_bins, f1_of_counts, first_error_counts, token_divergences
from .intervals import wilson_interval
from .over_ranks import MeanMetric, Numbers, RankMetric, check_pairs, without_values


class TokenDivergence(RankMetric):
    """Computes how far a model's distributions are from a reference's, in nats per token, and both perplexities.

    ``compute`` returns ``forward`` KL(model || reference) and ``reverse`` KL(reference || model), both over the whole
    vocabulary; ``k1`` and ``k3``, estimates of ``forward`` on the model's own samples; ``perplexity`` and
    ``reference_perplexity`` of the given tokens. See ``functional.token_divergences``.

    Example:
        >>> metric = TokenDivergence()
        >>> metric.update(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}["forward"]
        0.1438
    """

    count: Tensor
    totals: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_sums(count=(), totals=(6,))

    def update(self, logits: Tensor, reference_logits: Tensor, target_ids: Tensor) -> None:
        """Adds tokens.

        Args:
            logits: (N, V), of the model.
            reference_logits: (N, V), of the reference.
            target_ids: (N,), the tokens.

        Raises:
            ValueError: shapes that differ.
        """
        own, other = (given.detach().to(self.device).double().log_softmax(-1) for given in (logits, reference_logits))
        self.totals += token_divergences(own, other, target_ids.to(self.device)).sum(1)
        self.count += len(target_ids)

    def compute(self) -> dict[str, Tensor]:
        """Returns six scalars, fp64; nan without tokens."""
        forward, reverse, k1, k3, own, other = self.totals / self.count
        kls = {"forward": forward, "reverse": reverse, "k1": k1, "k3": k3}
        return kls | {"perplexity": (-own).exp(), "reference_perplexity": (-other).exp()}


class Perplexity(MeanMetric):
    """Computes exp of the mean negative log-prob of tokens.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([0.5, 0.125]).log())
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, logprobs: Numbers, mask: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            logprobs: of tokens, any shape.
            mask: the same shape, 1 where a token counts; all by default.
        """
        values = self.as_tensor(logprobs)
        self.add(values if mask is None else values[mask.to(self.device).bool()])

    def compute(self) -> Tensor:
        """Returns a scalar of at least 1, fp64; nan without tokens."""
        return (-super().compute()).exp()


class PreferenceAccuracy(RankMetric):
    """Computes how often a reward model prefers the chosen completion, and by how much.

    ``compute`` returns ``accuracy`` with ``accuracy_low`` and ``accuracy_high`` (Wilson's interval; equal rewards are
    wrong), and mean and standard deviation of the margins, ``margin`` and ``margin_std``.

    Args:
        level: of confidence, in (0, 1).
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = PreferenceAccuracy()
        >>> metric.update([1.0, 0.0], [0.0, 3.0])
        >>> found = metric.compute()
        >>> float(found["accuracy"]), float(found["margin"]), float(found["margin_std"])
        (0.5, -1.0, 2.0)
    """

    higher_is_better = True
    count: Tensor
    right: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, level: float = 0.95, **settings: Any) -> None:
        super().__init__(**settings)
        wilson_interval(1, 1, level)  # refuses a level out of its range
        self.level = level
        self.add_sums(count=(), right=(), total=(), squares=())

    def update(self, chosen: Numbers, rejected: Numbers) -> None:
        """Adds pairs.

        Args:
            chosen: (B,), rewards of the better completions.
            rejected: (B,), rewards of the worse ones.

        Raises:
            ValueError: shapes that differ, or a reward that is nan.
        """
        better, worse = self.as_tensor(chosen), self.as_tensor(rejected)
        check_pairs(chosen=better, rejected=worse)
        margins = better - worse
        self.count += len(margins)
        self.right += (margins > 0).sum()
        self.total += margins.sum()
        self.squares += margins.square().sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns five scalars, fp64; nan without pairs."""
        names = ("accuracy", "accuracy_low", "accuracy_high", "margin", "margin_std")
        if not self.count:
            return self.scalars(without_values(names))
        found = wilson_interval(int(self.right), int(self.count), self.level)
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        return self.scalars(dict(zip(names, (found.value, found.low, found.high, mean, std), strict=True)))


class CalibrationError(RankMetric):
    """Computes the expected calibration error of probabilities; see ``functional.expected_calibration_error``.

    Args:
        num_bins: at least 1.
        settings: those of ``torchmetrics.Metric``.

    Example:
        >>> metric = CalibrationError(num_bins=10)
        >>> metric.update([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 0])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    bins: Tensor

    def __init__(self, num_bins: int = 15, **settings: Any) -> None:
        super().__init__(**settings)
        check_count("num_bins", num_bins, "15 is usual")
        self.num_bins = num_bins
        self.add_sums(bins=(3, num_bins))

    def update(self, confidence: Numbers, correct: Numbers) -> None:
        """Adds predictions.

        Args:
            confidence: (B,), in [0, 1].
            correct: (B,), 1 where the prediction was right.

        Raises:
            ValueError: shapes that differ, or a confidence outside [0, 1].
        """
        self.bins += calibration_bins(self.as_tensor(confidence), self.as_tensor(correct), self.num_bins)

    def compute(self) -> Tensor:
        """Returns a scalar in [0, 1], fp64; nan without predictions."""
        return error_of_bins(self.bins)


class FirstErrorF1(RankMetric):
    """Computes ProcessBench's F1 of first wrong steps with both accuracies; see ``functional.first_error_f1``.

    Example:
        >>> metric = FirstErrorF1()
        >>> metric.update(torch.tensor([1, 2, -1]), torch.tensor([1, 0, -1]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'f1': 0.6667, 'with_error': 0.5, 'without_error': 1.0}
    """

    higher_is_better = True
    state_dtype: ClassVar[torch.dtype] = torch.int64
    counts: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_sums(counts=(4,))

    def update(self, predicted: Tensor, expected: Tensor) -> None:
        """Adds solutions.

        Args:
            predicted: (S,), step numbers from 0; ``functional.NO_ERROR`` for none.
            expected: (S,), the right ones.

        Raises:
            ValueError: shapes that differ.
        """
        self.counts += first_error_counts(predicted.to(self.device), expected.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Returns three scalars, fp64; nan without solutions of a kind."""
        return dict(f1_of_counts(self.counts)._asdict())
