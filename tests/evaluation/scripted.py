"""An engine that answers from a script, for tests of what is made of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.inference import Completion, SamplingParams

from ..helpers import char_tokenizer


class ScriptedEngine:
    """Answers each prompt with its texts in turn.

    Args:
        answers: texts by prompt; a text that ends with ``...`` was truncated.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        self.answers = answers
        self.tokenizer = char_tokenizer()
        self.calls: list[tuple[str, list[int]]] = []

    def generate(
        self,
        prompts: Sequence[Any],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        assert seeds is not None
        found = []
        for prompt, row in zip(prompts, seeds, strict=True):
            text = self.tokenizer.decode(prompt)
            self.calls.append((text, list(row)))
            texts = [self.answers[text][n % len(self.answers[text])] for n in range(num_samples)]
            found.append([_completion(self.tokenizer, text) for text in texts])
        return found


def _completion(tokenizer: Any, text: str) -> Completion:
    ids = tokenizer(text.removesuffix("..."), add_special_tokens=False)["input_ids"]
    return Completion(ids, text, [0.0] * len(ids), "length" if text.endswith("...") else "stop")
