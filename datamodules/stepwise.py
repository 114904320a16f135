"""Solutions in labelled steps, for process reward models."""

from __future__ import annotations

from typing import Any, ClassVar

from ..data.formats import stepwise
from ..data.row_reader import OnBadRow
from ..data.sources import Source
from ..data.tokenization import OnTooLong, TokenizerSource
from ..data.transformed_rows import Transform
from ..sequences.example import Example
from .base import ExampleDataModule


class StepwiseDataModule(ExampleDataModule):
    """Serves prompts with a solution in labelled steps.

    Rows are as in :func:`~rlhf_lightning.data.formats.stepwise`. The prompt becomes a root with one child, all steps
    one after the other, each tokenised separately and ended by the separator. The last token of each step has weight 1
    and all others 0; the field ``labels`` has one number for each step, in order.

    Args:
        train: source of the training rows.
        val: source of the validation rows.
        test: source of the test rows.
        predict: source of the rows to predict.
        tokenizer: folder, hub id or tokenizer object; the module's if left out.
        global_batch_size: examples of one optimizer step, over all ranks; at least 1.
        eval_batch_size: the same for validation, test and prediction; ``global_batch_size`` if left out.
        max_length: maximum number of tokens of a sequence; unlimited if left out.
        on_too_long: ``drop`` the example, ``truncate_start`` (of the prompt) or ``error``; steps are not cut, since
            each has its label.
        on_bad_row: ``error`` at the first row that cannot be used, or ``skip`` it.
        columns: new name of a column -> its name in the rows.
        transform: maps a row's columns (already renamed) to new ones, or to ``None`` to leave the row out; in YAML the
            function's dotted path.
        chat_template_kwargs: passed to the tokenizer's chat template (``enable_thinking: false``); a row's own
            ``chat_template_kwargs`` override them by name.
        step_separator: text that ends each step; the step is scored at its last token.
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
        ``StepwiseDataModule(train="sums:stepwise?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "StepwiseDataModule"
    allowed_on_too_long: ClassVar[tuple[str, ...]] = ("drop", "truncate_start", "error")

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
        step_separator: str = "\n",
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

        if not step_separator:
            raise ValueError("step_separator='' ends no step: write at least one character, such as a line's end")
        self.step_separator = step_separator

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        row = stepwise(columns)
        return [Example(row_id, self.rows.steps(row, self.step_separator), row.fields)]
