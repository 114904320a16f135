"""Checks of a batch against the model that it is for."""

from __future__ import annotations

from typing import Any

from ..models.backbone import check_fits
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
    check_fits(module.model, batch.examples)
    return batch.examples
