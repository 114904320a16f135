"""Divergence of a model from a reference on given texts, exactly over the vocabulary, and on the model's own samples.

Legend: N scored tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..inference import LocalEngine, SamplingParams
from ..metrics.functional import token_divergences
from ..metrics.intervals import Interval, mean_interval
from ..models import output_head
from ..models.backbone import check_fits
from ..models.loading import first_difference
from ..sequences import Example, Segment, SequenceBatch
from ..utils.validation import check_count
from .logits import batches, log_probs


@dataclass(frozen=True)
class Divergence:
    """How far a model's distributions are from a reference's, in nats.

    Attributes:
        forward: KL(model || reference), mean over tokens.
        reverse: KL(reference || model), mean over tokens.
        k1: mean of log p(x) - log q(x) over the given tokens x: an estimate of ``forward`` on the model's own samples.
        k3: mean of q(x)/p(x) - 1 - log(q(x)/p(x)): never negative, the same expectation on its own samples.
        per_sequence: the sum of ``forward`` over a sequence's tokens, mean over sequences with its 95 % interval.
        perplexity: exp of the model's mean negative log-probability of the tokens.
        reference_perplexity: the reference's.
        tokens: number of tokens.
        sequences: number of sequences.
    """

    forward: float
    reverse: float
    k1: float
    k3: float
    per_sequence: Interval
    perplexity: float
    reference_perplexity: float
    tokens: int
    sequences: int

    @property
    def symmetric(self) -> float:
        """Jeffreys' divergence: the sum of both directions."""
        return self.forward + self.reverse


def divergence(
    model: nn.Module | LocalEngine,
    reference: nn.Module | LocalEngine,
    examples: Sequence[Example],
    *,
    micro_batch_tokens: int = 8192,
) -> Divergence:
    r"""Computes the divergence of a model from a reference on the scored tokens of examples.

    At each token, over the whole vocabulary: :math:`\sum_v p_v (\log p_v - \log q_v)` with the model's p and the
    reference's q, and the same with both exchanged. Logits exist for a few tokens at a time, in fp32.

    Args:
        model: a causal language model, or an engine: tokenizers of two engines are compared, so that the same numbers
            are the same tokens.
        reference: another with the same vocabulary.
        examples: rows with scored tokens, such as those of ``SFTDataModule``; see ``own_samples`` for samples.
        micro_batch_tokens: tokens of a forward, above 0; changes no result.

    Raises:
        ValueError: vocabularies of different sizes or tokens, a row that does not fit a model, or no scored token.

    Example::

        data = SFTDataModule(train="rows.jsonl", tokenizer=tokenizer)
        print(divergence(model, reference, rows).forward)
    """
    check_count("micro_batch_tokens", micro_batch_tokens, "8192 is usual")
    tokenizers = [part.tokenizer for part in (model, reference) if isinstance(part, LocalEngine) and part.tokenizer]
    if len(tokenizers) == 2:
        check_tokens(tokenizers[0], tokenizers[1])
    model, reference = (part.model if isinstance(part, LocalEngine) else part for part in (model, reference))
    heads = [output_head(part) for part in (model, reference)]
    sizes = [head.weight.shape[0] for head in heads]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the model has a vocabulary of {sizes[0]} tokens and the reference one of {sizes[1]}: their distributions "
            "cannot be compared"
        )
    for part in (model, reference):
        check_fits(part, examples)
    sums, totals, tokens = torch.zeros(6, dtype=torch.float64), [], 0
    for _, batch in batches(examples, micro_batch_tokens, next(model.parameters()).device):
        values_6N = _of_batch(model, reference, batch)
        sums += values_6N.sum(1).cpu()
        totals += batch.sum_per_sequence(values_6N[0]).tolist()
        tokens += values_6N.shape[1]
    if tokens == 0:
        raise ValueError(f"none of the {len(examples)} rows has a scored token: give rows with completions")
    forward, reverse, k1, k3, own, other = (sums / tokens).tolist()
    per_sequence = mean_interval(totals) if len(totals) > 1 else Interval(totals[0], math.nan, math.nan)
    return Divergence(forward, reverse, k1, k3, per_sequence, math.exp(-own), math.exp(-other), tokens, len(totals))


def check_tokens(tokenizer: Any, reference: Any, advice: str = "give a reference with the model's tokenizer") -> None:
    """Refuses tokenizers that give a number to different tokens.

    Args:
        tokenizer: of the model.
        reference: that of the reference.
        advice: ends the message.

    Raises:
        ValueError: naming the first such token.
    """
    if (odd := first_difference(tokenizer.get_vocab(), reference.get_vocab())) is not None:
        raise ValueError(
            f"the tokenizers of the model and the reference differ: {odd}; distributions over different tokens cannot "
            f"be compared: {advice}"
        )


def own_samples(
    engine: LocalEngine, examples: Sequence[Example], *, num_samples: int = 1, sampling: SamplingParams | None = None
) -> list[Example]:
    """Samples completions of prompts, as examples whose completions are scored.

    Args:
        engine: samples from the model.
        examples: prompts, such as those of ``evaluation.answers.read_prompts``.
        num_samples: per prompt, at least 1.
        sampling: by default 256 tokens at temperature 1 without filters, for which k1 and k3 estimate the divergence.

    Returns:
        One example per prompt, with a child per sample.
    """
    params = sampling or SamplingParams(max_new_tokens=256)
    groups = engine.generate([row.root.tokens.tolist() for row in examples], num_samples, params)
    found = []
    for example, group in zip(examples, groups, strict=True):
        children = [Segment(sample.token_ids, [1.0] * len(sample.token_ids)) for sample in group if sample.token_ids]
        if children:
            found.append(Example(example.row_id, Segment(example.root.tokens, children=children), example.fields))
    return found


def _of_batch(model: nn.Module, reference: nn.Module, batch: SequenceBatch) -> Tensor:
    """Returns both divergences, k1, k3 and both log-probabilities of each scored token, ``(6, N)`` in fp64."""
    found = [
        token_divergences(log_p, log_q, batch.target_ids[part])
        for part, (log_p, log_q) in log_probs([model, reference], batch)
    ]
    return torch.cat(found, dim=1) if found else torch.zeros(6, 0, dtype=torch.float64)
