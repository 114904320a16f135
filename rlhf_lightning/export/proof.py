"""Compares what an export computes, and how it reads text, with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.text_tokens import prompt_tokens
from ..models import load_causal_lm, load_tokenizer, save_pretrained

# Logits of an export and of the rounded weights differ by what sums in another order do, relative to their spread.
TOLERANCE: Final = 1e-4
# Greedy tokens after each prompt.
_CONTINUATION: Final = 16


@dataclass(frozen=True)
class Expected:
    """A model's answers to the prompts of a check.

    Args:
        tokens: of each prompt with its greedy continuation.
        lengths: of each prompt.
        logits: after every token, in fp32.
    """

    tokens: list[list[int]]
    lengths: list[int]
    logits: list[Tensor]


@torch.no_grad()
def continued(model: PreTrainedModel, prompts: Sequence[Sequence[int]], positions: int) -> Expected:
    """Continues prompts greedily by full forwards, up to a number of positions; computes logits after every token."""
    tokens, logits = [], []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(min(_CONTINUATION, positions - len(row))):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        tokens.append(row)
        logits.append(model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float())
    return Expected(tokens, [len(prompt) for prompt in prompts], logits)


def encoded_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], positions: int) -> list[list[int]]:
    """Encodes the prompts of a check.

    Raises:
        ValueError: no prompt is given, or one is empty or too long.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p for p in prompts):
        raise ValueError(f"check_prompts is {prompts!r}; it must be a list of at least one text, as users will ask")
    found = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, found, strict=True):
        if len(tokens) >= positions:
            raise ValueError(
                f"the prompt {prompt[:40]!r} of check_prompts has {len(tokens)} tokens, and the model has {positions} "
                "positions: shorten it"
            )
    return found


def load_source(model: str | Path, scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in fp32, with an adapter merged.

    Args:
        model: the folder.
        scratch: a folder for the merged model.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trainable": False, "attn_implementation": "eager"}
    # The model first, which a wrong path is a mistake about.
    loaded: Any = load_causal_lm(model, **options)
    tokenizer = load_tokenizer(model)
    if isinstance(loaded, PeftModel):
        save_pretrained(loaded, tokenizer, scratch / "merged", merge_adapter=True)
        loaded = load_causal_lm(scratch / "merged", **options)
    return loaded.eval(), tokenizer


@torch.no_grad()
def compare_models(model: PreTrainedModel, expected: Expected, prompts: Sequence[str]) -> float:
    """Compares an export's logits and greedy answers.

    Args:
        model: the export, loaded.
        expected: of the model that it was made from, with weights rounded alike.
        prompts: texts, which errors name.

    Returns:
        The largest difference of logits, relative to their spread.

    Raises:
        ValueError: it computes something else.
    """
    worst = 0.0
    for row, logits_LV, prompt in zip(expected.tokens, expected.logits, prompts, strict=True):
        found_LV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        if found_LV.shape != logits_LV.shape:
            raise ValueError(f"it has {found_LV.shape[-1]} tokens, and the model {logits_LV.shape[-1]}")
        spread = float((logits_LV - logits_LV.mean(-1, keepdim=True)).square().mean().sqrt())
        error = float((found_LV - logits_LV).abs().max()) / max(spread, 1e-12)
        worst = max(worst, error)
        if not error <= TOLERANCE:
            raise ValueError(
                f"logits on the prompt {prompt[:40]!r} differ by {error:.2g} of their spread, and rounding alone is at "
                f"most {TOLERANCE:g}"
            )
    begun = [row[:length] for row, length in zip(expected.tokens, expected.lengths, strict=True)]
    again = continued(model, begun, int(model.config.max_position_embeddings))
    for prompt, row, other in zip(prompts, expected.tokens, again.tokens, strict=True):
        if row != other:
            raise ValueError(f"the greedy answer to {prompt[:40]!r} differs")
    return worst


def compare_tokenizers(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> None:
    """Compares an export's tokenizer with the model's.

    Raises:
        ValueError: it reads a prompt or names a special token differently, or has another chat template.
    """
    for role in ("bos", "eos", "unk", "pad"):
        numbers = getattr(tokenizer, f"{role}_token_id"), getattr(other, f"{role}_token_id")
        if numbers[0] != numbers[1]:
            raise ValueError(f"the {role} token is {numbers[0]} in the model and {numbers[1]} in the export")
    for prompt in prompts:
        rows = [list(each(prompt)["input_ids"]) for each in (tokenizer, other)]
        if rows[0] != rows[1]:
            raise ValueError(
                f"the prompt {prompt[:40]!r} is {rows[0][:12]} for the model and {rows[1][:12]} for the export"
            )
    if tokenizer.chat_template != other.chat_template:
        raise ValueError("the chat template differs")
