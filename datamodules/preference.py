"""Pairs of completions for reward models, DPO and SimPO."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ..data.files import RowSource
from ..data.formats import preference
from ..data.row_reader import OnBadRow
from ..data.sources import Source
from ..data.tokenization import OnTooLong, TokenizerSource, has_equal_sequences
from ..data.transformed_rows import PairedRows, Transform
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
        val: source of the validation rows.
        test: source of the test rows.
        predict: source of the rows to predict.
        tokenizer: folder, hub id or tokenizer object; the module's if left out.
        global_batch_size: examples of one optimizer step, over all ranks; at least 1.
        eval_batch_size: the same for validation, test and prediction; ``global_batch_size`` if left out.
        max_length: maximum number of tokens of the longer sequence of a pair; unlimited if left out.
        on_too_long: ``drop`` the example, ``truncate_start`` (of the prompt), ``truncate_end`` (of the completions,
            with their end-of-sequence tokens), or ``error``.
        on_bad_row: ``error`` at the first row that cannot be used, or ``skip`` it.
        columns: new name of a column -> its name in the rows.
        transform: maps a row's columns (already renamed) to new ones, or to ``None`` to leave the row out; in YAML the
            function's dotted path.
        chat_template_kwargs: passed to the tokenizer's chat template (``enable_thinking: false``); a row's own
            ``chat_template_kwargs`` override them by name.
        pair_by: weights of the ratings (``{"helpfulness": 1.0}``) by which consecutive rated rows with the same prompt
            are paired; rows with equal sums make no pair. With ``streaming``, the number of pairs is unknown.
        seed: seed of the order of training rows, together with the epoch; at least 0.
        shuffle: draw a new order of training rows in each epoch.
        drop_last: leave out a last training batch of fewer than ``global_batch_size`` examples.
        group_by_prompt: keep training rows of the same prompt together in every order, and on one rank where the
            batch allows it, so that their prompt is computed once; not with ``streaming``.
        streaming: read training rows on demand instead of tokenising all of them first.
        shuffle_buffer: with ``streaming``, the rows among which the next one is drawn; at least 1. Rows move by about
            as many places; files (of a list or folder) and Parquet row groups are reordered in each epoch.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``PreferenceDataModule(train="pairs.jsonl", val="more.jsonl", tokenizer="configs/models/nano", max_length=512)``
    """

    contract: ClassVar[str | None] = "PreferenceDataModule"

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        global_batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        on_too_long: OnTooLong = "drop",
        on_bad_row: OnBadRow = "error",
        columns: dict[str, str] | None = None,
        transform: Transform | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        pair_by: dict[str, float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        group_by_prompt: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(
            train=train,
            val=val,
            test=test,
            predict=predict,
            tokenizer=tokenizer,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            on_too_long=on_too_long,
            on_bad_row=on_bad_row,
            columns=columns,
            transform=transform,
            chat_template_kwargs=chat_template_kwargs,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            group_by_prompt=group_by_prompt,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
        )

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
