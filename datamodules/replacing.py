"""Replaces the training rows of a datamodule while a trainer runs."""

from __future__ import annotations

from ..data.sources import Source
from .base import ExampleDataModule


def replace_train(data: ExampleDataModule, source: Source, *, continues: bool = False) -> None:
    """Trains on other rows from the next time that the trainer asks for its loader.

    Args:
        data: the trainer's datamodule, without ``streaming``.
        source: of the rows.
        continues: whether a checkpoint's position in these rows is still to be restored.
    """
    data.sources["train"] = source
    data._stores.pop("train", None)
    data._coupled.pop("train", None)
    data._train_loader = None
    if not continues:
        data._train_state = None
