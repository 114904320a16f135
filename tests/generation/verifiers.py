"""Reward functions that commands in tests name by their dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def letters(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Counts how often the row's answer is in the completion, and checks that prompts are texts or messages."""
    assert all(isinstance(prompt, str) or isinstance(prompt[0], dict) for prompt in prompts)
    return [float(text.count(wanted)) for text, wanted in zip(completions, answer, strict=True)]
