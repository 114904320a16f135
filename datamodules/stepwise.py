"""Solutions in labelled steps, or pairs of solutions in steps, for process reward models."""

from __future__ import annotations

from typing import Any, ClassVar

from ..data.formats import stepwise
from ..data.sources import Source
from ..data.step_pairs import is_step_pair, step_pair
from ..data.tokenization import has_equal_sequences
from ..sequences.example import Example
from .base import ExampleDataModule


class StepwiseDataModule(ExampleDataModule):
    """Serves prompts with a solution in labelled steps, or with a chosen and a rejected one in steps.

    Rows are as in :func:`~rlhf_lightning.data.formats.stepwise`. The prompt becomes a root with one child, all steps
    one after the other, each tokenised separately and ended by the separator. The last token of each step has weight 1
    and all others 0; the field ``labels`` has one number for each step, in order. Rows of
    :func:`~rlhf_lightning.data.step_pairs.step_pair` (``prompt, chosen, rejected``) become a root with two children.

    Args:
        train: source of the training rows.
        step_separator: text that ends each step; the step is scored at its last token.
        kwargs: options of ``ExampleDataModule``: sources, batches, lengths, order, streaming.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``StepwiseDataModule(train="sums:stepwise?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "StepwiseDataModule"
    allowed_on_too_long: ClassVar[tuple[str, ...]] = ("drop", "truncate_start", "error")

    def __init__(self, train: Source | None = None, *, step_separator: str = "\n", **kwargs: Any) -> None:
        super().__init__(train, **kwargs)

        if not step_separator:
            raise ValueError("step_separator='' ends no step: write at least one character, such as a line's end")
        self.step_separator = step_separator

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        if is_step_pair(columns):
            chosen, rejected = step_pair(columns, self.step_separator)
            root = self.rows.step_pair(chosen, rejected, self.step_separator)
            if has_equal_sequences(root):
                raise ValueError("chosen and rejected have the same tokens: a pair needs two different solutions")
            return [Example(row_id, root, chosen.fields)]
        row = stepwise(columns)
        return [Example(row_id, self.rows.steps(row, self.step_separator), row.fields)]
