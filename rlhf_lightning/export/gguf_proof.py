"""Reads a GGUF file back, and compares what it computes and how it reads text with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.text_tokens import prompt_tokens
from .gguf_metadata import ROPE_FACTORS, read_config
from .gguf_tensors import default_frequencies, gguf_package

# Logits of the file and of the rounded weights differ by what sums in another order do, relative to their spread.
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
        ValueError: there is none, or one is empty or too long.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p for p in prompts):
        raise ValueError(f"check_prompts is {prompts!r}; it must be a list of at least one text, as users will ask")
    found = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, found, strict=True):
        if len(tokens) >= positions:
            raise ValueError(
                f"the prompt {prompt[:40]!r} of check_prompts has {len(tokens)} tokens, and the file has {positions} "
                "positions: shorten it"
            )
    return found


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file's metadata and tensors."""
    reader = gguf_package().GGUFReader(str(path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def load_file(path: Path) -> PreTrainedModel:
    """Loads a file with the loader of transformers, and the config that the file describes.

    Raises:
        ValueError: it does not load.
    """
    metadata, tensors = read_metadata(path)
    config = read_config(metadata, list(tensors))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the file does not load: {(str(error).splitlines() or [''])[0]}") from error
    if ROPE_FACTORS in tensors:
        factors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = default_frequencies(model) / factors
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def check_model(path: Path, expected: Expected, prompts: Sequence[str]) -> float:
    """Compares a file with what the rounded weights compute.

    Args:
        path: the file.
        expected: of the model that it was made from, with weights rounded as in the file.
        prompts: texts, which errors name.

    Returns:
        The largest difference of logits, relative to their spread.

    Raises:
        ValueError: it does not load, or computes something else.
    """
    model = load_file(path)
    try:
        return _compare(model, expected, prompts)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the file does not run: {(str(error).splitlines() or [''])[0]}") from error


def _compare(model: PreTrainedModel, expected: Expected, prompts: Sequence[str]) -> float:
    worst = 0.0
    for row, logits_LV, prompt in zip(expected.tokens, expected.logits, prompts, strict=True):
        found_LV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        if found_LV.shape != logits_LV.shape:
            raise ValueError(f"the file has {found_LV.shape[-1]} tokens, and the model {logits_LV.shape[-1]}")
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


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """Compares a file's tokenizer with the model's.

    Raises:
        ValueError: it does not load, or reads a prompt or names a special token differently.
    """
    try:
        other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer does not load: {(str(error).splitlines() or [''])[0]}") from error
    for role in ("bos", "eos", "unk", "pad"):
        numbers = getattr(tokenizer, f"{role}_token_id"), getattr(other, f"{role}_token_id")
        if numbers[0] != numbers[1]:
            raise ValueError(f"the {role} token is {numbers[0]} in the model and {numbers[1]} in the file")
    for prompt in prompts:
        rows = [list(each(prompt)["input_ids"]) for each in (tokenizer, other)]
        if rows[0] != rows[1]:
            raise ValueError(
                f"the prompt {prompt[:40]!r} is {rows[0][:12]} for the model and {rows[1][:12]} for the file"
            )
    if tokenizer.chat_template != other.chat_template:
        raise ValueError("the chat template differs")
