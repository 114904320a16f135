"""Rewards of the steps of a completion, on the tokens at which steps end.

A step ends at the token that completes its separator; the last step ends with the completion.

Legend: E prompts, G completions of each, S trained completions, N their tokens, M steps of all completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..distributed.collectives import gather_rows
from ..inference import Completion
from ..inference.step_ends import step_ends
from .advantages import ScaleRewards, gae, group_advantages

StepsAtTokens = list[tuple[int, float]]  # (the token at which a step ends, its reward)


def place_steps(
    rewards: Sequence[float], completion: Completion, separator: str, tokenizer: PreTrainedTokenizerBase | None
) -> StepsAtTokens:
    """Places the rewards of a completion's steps on the tokens at which they end.

    Args:
        rewards: one per non-empty step of ``completion.text`` split at the separator; or empty.
        completion: the completion, with text and tokens.
        separator: text between steps.
        tokenizer: tokenizer that decodes the tokens.
    """
    if not rewards:
        return []
    ends = step_ends(completion.token_ids, completion.text, separator, tokenizer)
    return list(zip(ends, rewards, strict=True))


def at_tokens(steps: Sequence[Sequence[StepsAtTokens]], completion_index_S: Tensor, lengths_S: Tensor) -> Tensor:
    """Scatters step rewards to their tokens, with 0 elsewhere: ``(N,)`` in fp64.

    Args:
        steps: step rewards of every completion of the rollouts, E lists of G.
        completion_index_S: places of the trained completions.
        lengths_S: their numbers of tokens.

    Example:
        >>> steps = [[[(0, 0.5), (2, 1.0)], [(0, -1.0)]]]
        >>> at_tokens(steps, torch.tensor([1, 0]), torch.tensor([2, 3])).tolist()
        [-1.0, 0.0, 0.5, 0.0, 1.0]
    """
    flat = [sample for group in steps for sample in group]
    values = torch.zeros(int(lengths_S.sum()), dtype=torch.float64)
    start = 0
    for place, length in zip(completion_index_S.tolist(), lengths_S.tolist(), strict=True):
        for token, value in flat[place]:
            values[start + token] += value
        start += length
    return values


def steps_differ(steps: Sequence[Sequence[StepsAtTokens]]) -> Tensor:
    """Returns whether two steps of a group have different rewards, ``(E,)``; if not, it has no learning signal."""
    found = [len({value for sample in group for _, value in sample}) > 1 for group in steps]
    return torch.tensor(found, dtype=torch.bool)


def process_advantages(
    steps: Sequence[Sequence[StepsAtTokens]],
    completion_index_S: Tensor,
    index_N: Tensor,
    *,
    scale_rewards: ScaleRewards = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Computes the advantage of each token from the steps that end at it or later: ``(N,)``.

    Paper: DeepSeekMath (Shao et al., 2024, arXiv:2402.03300), section 4.1.3: with r the rewards of all steps of all
    completions of a prompt, the sum of (r - mean) / (std + eps) over the steps that end at the token or later.

    Args:
        steps: step rewards of every completion of the rollouts, E lists of G.
        completion_index_S: places of the trained completions.
        index_N: sequence of each token.
        scale_rewards: divide by the deviation of the ``group``'s steps, of all steps of the global ``batch``, or not
            at all (``none``); every rank must call this.
        eps: added to the deviation.

    Example:
        >>> steps = [[[(0, 1.0), (1, 0.0)], [(0, 2.0)]]]
        >>> process_advantages(steps, torch.tensor([0, 1]), torch.tensor([0, 0, 1]), scale_rewards="none").tolist()
        [-1.0, -1.0, 1.0]
    """
    values = [value for group in steps for sample in group for _, value in sample]
    groups = [number for number, group in enumerate(steps) for sample in group for _ in sample]
    rewards_M = torch.tensor(values, dtype=torch.float64)
    index_M = torch.tensor(groups, dtype=torch.long)
    scale: ScaleRewards = "group" if scale_rewards == "group" else "none"
    normalised_M = group_advantages(
        rewards_M, group_index_S=index_M, num_groups=len(steps), scale_rewards=scale, eps=eps
    ).advantages_S
    if scale_rewards == "batch":
        everyone_M = gather_rows({"rewards": rewards_M})["rewards"]
        normalised_M = normalised_M / (everyone_M.std() + eps if len(everyone_M) > 1 else 1.0)

    # A sum over all later steps is GAE with gamma = lambda = 1 and values of 0.
    rest = iter(normalised_M.tolist())
    normalised = [[[(token, next(rest)) for token, _ in sample] for sample in group] for group in steps]
    lengths_S = torch.bincount(index_N, minlength=len(completion_index_S))
    rewards_N = at_tokens(normalised, completion_index_S, lengths_S)
    return gae(
        rewards_N,
        values_N=torch.zeros_like(rewards_N),
        sequence_index_N=index_N,
        num_sequences=len(completion_index_S),
        gamma=1.0,
        gae_lambda=1.0,
    ).advantages_N
