"""Pairs of completions for reward models, DPO and SimPO."""

from __future__ import annotations

from typing import Any

from ..sequences.example import Example
from .base import ExampleDataModule
from .formats import preference


class PreferenceDataModule(ExampleDataModule):
    """A prompt with a chosen and a rejected completion.

    Rows are as in :func:`~rlhf_lightning.datamodules.formats.preference`. The prompt becomes a root with two children,
    chosen and rejected; a margin, if the row has one, is the field ``margin``. A rated completion becomes a root with
    one child, and the field ``ratings``. The arguments are those of
    :class:`~rlhf_lightning.datamodules.base.ExampleDataModule`.

    Example:
        ``PreferenceDataModule(train="pairs.jsonl", val="more.jsonl", tokenizer="configs/models/nano", max_length=512)``
    """

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        row = preference(columns)
        root = self.rows.answers(row)
        if len({child.tokens.tobytes() for child in root.children}) < len(root.children):
            raise ValueError(
                "chosen and rejected have the same tokens: a pair needs two completions that differ in them"
            )
        return [Example(row_id, root, row.fields)]
