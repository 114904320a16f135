"""The distribution of the next token after any number of prompts.

Legend: P prompts, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .decoder import Decoder


def next_token_logprobs(decoder: Decoder, prompts: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Tensor:
    """Computes log-probabilities of all tokens after each prompt, under the unmodified model: ``(P, V)`` in fp32.

    Args:
        decoder: the model.
        prompts: token ids, at least one of each.
        max_batch_tokens: tokens computed at once, padding included; one prompt always fits.
    """
    # Equal prompts are computed once; models that do not agree on padded rows get prompts of one length at a time.
    distinct = sorted(set(prompts), key=len)
    rows: dict[tuple[int, ...], Tensor] = {}
    for group in _groups(distinct, max_batch_tokens, mixed=decoder.agrees()):
        logits_PV = decoder.after(group)
        rows |= dict(zip(group, torch.log_softmax(logits_PV.float(), dim=-1), strict=True))
    return torch.stack([rows[prompt] for prompt in prompts])


def _groups(
    prompts: Sequence[tuple[int, ...]], max_batch_tokens: int, *, mixed: bool
) -> Iterator[list[tuple[int, ...]]]:
    """Splits prompts, shortest first, into groups of at most ``max_batch_tokens`` with padding."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        full = (len(group) + 1) * len(prompt) > max_batch_tokens
        if group and (full or not (mixed or len(prompt) == len(group[0]))):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
