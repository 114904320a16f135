"""Pairs of completions for reward models, DPO and SimPO."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ..data.files import RowSource
from ..data.formats import preference
from ..data.sources import Source
from ..data.tokenization import has_equal_sequences
from ..data.transformed_rows import PairedRows
from ..sequences.example import Example
from .base import ExampleDataModule, Split


class PreferenceDataModule(ExampleDataModule):
    """Serves prompts with a chosen and a rejected completion.

    Rows are as in :func:`~rlhf_lightning.data.formats.preference`. The prompt becomes a root with two children,
    chosen and rejected; a margin, if the row has one, is the field ``margin``. A rated completion becomes a root with
    one child and a field for each rating; or, with ``pair_by``, two of them become a pair, whose margin is the
    difference of their rating sums.

    Args:
        train: source of the training rows.
        pair_by: weights of the ratings (``{"helpfulness": 1.0}``) by which consecutive rated rows with the same prompt
            are paired; rows with equal sums make no pair. With ``streaming``, the number of pairs is unknown.
        kwargs: options of ``ExampleDataModule``: sources, batches, lengths, order, streaming.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``PreferenceDataModule(train="pairs.jsonl", val="more.jsonl", tokenizer="configs/models/nano", max_length=512)``
    """

    contract: ClassVar[str | None] = "PreferenceDataModule"

    def __init__(
        self,
        train: Source | None = None,
        *,
        pair_by: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, **kwargs)

        weights = None if pair_by is None else list(pair_by.values())
        if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
            raise ValueError(
                f"pair_by={pair_by!r}, expected finite numbers by rating, not all 0, such as {{'helpfulness': 1.0}}"
            )
        self.pair_by = pair_by

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        row = preference(columns)
        root = self.rows.answers(row)
        if has_equal_sequences(root):
            raise ValueError(
                "chosen and rejected have the same tokens: a pair needs two completions that differ in them"
            )
        return [Example(row_id, root, row.fields)]

    def _open(self, split: Split) -> RowSource:
        source = super()._open(split)
        return source if self.pair_by is None else PairedRows(source, self.pair_by)
