"""Checks of a batch against the model that it is for."""

from __future__ import annotations

from typing import Any

from ..models import base_model, num_positions
from ..sequences import Example, ExampleBatch
from ..sequences.example import check_contract


def check_batch(module: Any, batch: ExampleBatch) -> list[Example]:
    """Returns the batch's examples after checking that they fit a module's model.

    Args:
        module: a ``PostTrainingModule`` whose model is built.
        batch: this rank's part of a global batch.

    Raises:
        TypeError: something else than an ``ExampleBatch``.
        ValueError: rows of another datamodule, a row that is too long, or tokens of another vocabulary.
    """
    if not isinstance(batch, ExampleBatch):
        raise TypeError(
            f"{type(module).__name__} was given a {type(batch).__name__}; it needs an ExampleBatch: use one of "
            "rlhf_lightning.datamodules, or wrap your examples in rlhf_lightning.sequences.ExampleBatch"
        )
    check_contract(module, batch.contract)
    positions = num_positions(module.model)
    embeddings: Any = base_model(module.model).get_input_embeddings()
    vocab_size = int(embeddings.weight.shape[0])
    for example in batch.examples:
        for path in example.root.paths():
            length = sum(len(segment.tokens) for segment in path)
            if positions is not None and length > positions:
                raise ValueError(
                    f"row {example.row_id} has {length} tokens, the model has {positions} positions: set the "
                    f"datamodule's max_length to {positions} or less"
                )
            ends = [int(end) for segment in path for end in (segment.tokens.min(), segment.tokens.max())]
            if min(ends) < 0 or max(ends) >= vocab_size:
                wrong = min(ends) if min(ends) < 0 else max(ends)
                raise ValueError(
                    f"row {example.row_id} has token {wrong}, the model's vocabulary has {vocab_size}: the "
                    "tokenizer is not this model's"
                )
    return batch.examples
