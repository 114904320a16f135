"""Replaces the training rows of a datamodule while a trainer runs."""

from __future__ import annotations

from ..data.sources import Source, open_source
from .base import ExampleDataModule


def replace_train(data: ExampleDataModule, source: Source, *, continues: bool = False) -> None:
    """Trains on other rows from the next time that the trainer asks for its loader.

    They are complete: ``columns``, ``transform`` and ``pair_by`` are of the datamodule's own rows.

    Args:
        data: the trainer's datamodule, without ``streaming``.
        source: of the rows.
        continues: whether a checkpoint's position in these rows is still to be restored.
    """
    _forget(data)
    data._made["train"] = open_source(source, split="train")
    data._train_loader = None
    if not continues:
        data._train_state = None


def restore_train(data: ExampleDataModule) -> None:
    """Gives the next trainer the datamodule's own rows again; the loader of this one keeps rows and position.

    Args:
        data: a datamodule, whose rows may have been replaced.
    """
    if "train" in data._made:
        _forget(data)


def forget_train(data: ExampleDataModule) -> None:
    """Forgets the rows of the datamodule, its own or others, and the position in them, as in a new process.

    A position that is restored next is one in rows that are still to be named, or in the datamodule's own.

    Args:
        data: the trainer's datamodule.
    """
    _forget(data)
    data._train_loader = data._train_state = None


def _forget(data: ExampleDataModule) -> None:
    data._made.pop("train", None)
    data._stores.pop("train", None)
    data._coupled.pop("train", None)
