"""End tokens that are exported with a model, and the check that an adapter can be merged."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..data.tokenization import RowTokenizer
from ..models.merged_weights import check_mergeable


def trained_end_tokens(module: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that answers end with: those of the datamodule's rows, else of the tokenizer.

    Args:
        module: a ``PostTrainingModule``.
        tokenizer: the tokenizer that is exported with it.
    """
    trainer = module._trainer
    rows = None if trainer is None else getattr(getattr(trainer, "datamodule", None), "rows", None)
    return (rows if isinstance(rows, RowTokenizer) else RowTokenizer(tokenizer)).end_tokens


def check_merge(module: Any) -> None:
    """Checks that an adapter can be merged into the weights, before it is trained; every rank calls it.

    Args:
        module: a ``PostTrainingModule``.

    Raises:
        ValueError: the adapter cannot be merged.
    """
    module.configure_model()
    if isinstance(module.model, PeftModel):
        check_mergeable(module.model)
