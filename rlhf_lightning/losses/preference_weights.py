"""Weights of the tokens or the pairs of a preference loss: LD-DPO and WPO.

Shapes: N scored completion tokens of all sequences, flat; S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.transfer import count_index


def _sum_by_sequence(values_N: Tensor, sequence_index_N: Tensor, num_sequences: int) -> Tensor:
    return values_N.new_zeros(num_sequences).index_add(0, sequence_index_N, values_N)


def ld_alpha_logps(
    logprobs_N: Tensor,
    sequence_index_N: Tensor,
    position_N: Tensor,
    *,
    public_lengths_S: Tensor,
    ld_alpha: float,
) -> Tensor:
    """Computes sequence log-probs that downweight tokens of the longer completion beyond the shorter one's length.

    Paper: Length Desensitization in DPO (Liu et al., 2024, arXiv:2409.06411): with l = min(|y_c|, |y_r|), the
    public length::

        sum_{t <= l} log p(y_t) + ld_alpha * sum_{t > l} log p(y_t)

    Policy and reference are both summed this way. The gradient goes to the given log-probs.

    Args:
        logprobs_N: log-probability of each completion token, (N,).
        sequence_index_N: the sequence of each token, (N,), integer.
        position_N: index of each token in its completion, from 0, (N,), integer.
        public_lengths_S: tokens of the shorter completion of the sequence's pair, (S,), integer.
        ld_alpha: in [0, 1]; 1 is the plain sum.

    Returns:
        Weighted sums (S,).

    Raises:
        ValueError: ``ld_alpha`` out of range.

    Example:
        >>> index, position = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
        >>> logprobs = torch.tensor([-1.0, -2.0, -4.0])
        >>> ld_alpha_logps(logprobs, index, position, public_lengths_S=torch.tensor([1, 1]), ld_alpha=0.5)
        tensor([-1., -4.])
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha} is outside [0, 1]: 1 keeps every token, 0 drops the longer tail")
    public_N = position_N < public_lengths_S[sequence_index_N]
    weighted_N = torch.where(public_N, logprobs_N, ld_alpha * logprobs_N)
    return _sum_by_sequence(weighted_N, sequence_index_N, len(public_lengths_S))


def wpo_weights(
    logprobs_N: Tensor, log_sum_sq_probs_N: Tensor, sequence_index_N: Tensor, *, num_sequences: int
) -> Tensor:
    """Computes the weights of WPO, how likely the current policy is to write each completion, as constants.

    Paper: WPO (Zhou et al., 2024, arXiv:2406.11827), eq. 2 with its "sampled alignment"::

        w(y) = exp( 1/|y| * sum_t [ log p(y_t) - log sum_v p(v)^2 ] )

    A completion sampled from the policy has a weight of about 1, whatever the policy's entropy. A pair's loss is
    multiplied by w(y_c) * w(y_r). The paper's code caps that product at 1; its equation and this function do not.

    Args:
        logprobs_N: the policy's log-probability of each completion token, (N,).
        log_sum_sq_probs_N: log of the sum of squared probabilities over the vocabulary at each token, (N,).
        sequence_index_N: the sequence of each token, (N,), integer.
        num_sequences: S.

    Returns:
        Weights (S,), without gradient; 1 for a sequence without tokens.

    Example:
        >>> uniform = torch.full((3,), 0.25).log()
        >>> wpo_weights(uniform, uniform, torch.tensor([0, 0, 1]), num_sequences=2)
        tensor([1., 1.])
    """
    aligned_N = (logprobs_N - log_sum_sq_probs_N).detach()
    lengths_S = count_index(sequence_index_N, num_sequences).clamp(min=1)
    return (_sum_by_sequence(aligned_N, sequence_index_N, num_sequences) / lengths_S).exp()
