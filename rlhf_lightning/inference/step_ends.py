"""Finds the tokens at which the steps of a completion end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .completion import decode


def step_ends(
    token_ids: Sequence[int], text: str, separator: str, tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """Returns the index of the token at which each non-empty step ends.

    A step ends at the token that completes its separator; the last one ends with the completion.

    Args:
        token_ids: tokens of the completion.
        text: their text, perhaps cut before a stop string.
        separator: text between steps.
        tokenizer: decodes the tokens.
    """
    ends: list[int] = []
    end = 0
    for part in text.split(separator):
        end += len(part) + len(separator)
        if part:
            ends.append(_token_at(token_ids, text[:end], tokenizer))
    if ends:
        ends[-1] = len(token_ids) - 1
    return ends


def _token_at(token_ids: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Returns the index of the token that completes the first characters of a text."""

    def is_there(count: int) -> bool:
        return decode(tokenizer, token_ids[:count]).startswith(text)

    return min(max(bisect_left(range(len(token_ids)), True, key=is_there), 1), len(token_ids)) - 1
