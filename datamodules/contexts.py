"""Demonstrations that follow a long context, for context compression and for models that see the whole context."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..data.cell_checks import describe_columns, is_missing, wrong_type
from ..data.text_tokens import prompt_tokens
from ..sequences.example import Example, Segment
from .sft import SFTDataModule


class ContextDataModule(SFTDataModule):
    """Serves contexts, each with a demonstration that follows it.

    Rows are those of ``SFTDataModule`` with a column ``context``, a text. The context becomes the root, encoded as a
    text that begins a sequence, and the row's prompt its child, without the tokens that open every text. An example's
    fields keep the context's text. ``SFTModule`` trains on the whole context, ``ContextCompressionModule`` on its
    summaries.

    Args:
        train: source of the training rows.
        kwargs: options of ``SFTDataModule``. Rows that are too long are dropped or an error, but not cut, which would
            take tokens from the context alone.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``ContextDataModule(train="rows.jsonl", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "ContextDataModule"
    allowed_on_too_long: ClassVar[tuple[str, ...]] = ("drop", "error")

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        rest = dict(columns)
        context = rest.pop("context", None)
        if is_missing(context) or context == "":
            raise ValueError(
                f"no column 'context'{describe_columns(columns, 'context')}, expected context, prompt and completion; "
                "name a column that is called otherwise with columns="
            )
        if not isinstance(context, str):
            raise wrong_type(context, "context", "a string")
        tokens = np.asarray(prompt_tokens(self.tokenizer, context))
        examples = []
        for each in super().make_examples(row_id, rest):
            root = Segment(tokens, None, [self._continued(each.root)])
            examples.append(Example(each.row_id, root, {**each.fields, "context": context}))
        return examples

    def _continued(self, root: Segment) -> Segment:
        """Takes the tokens that open every text from a tree that comes after a context."""
        opening = self.rows.opening
        count = len(opening)
        if not count or len(root.tokens) == count or root.tokens[:count].tolist() != opening:
            return root
        weights = None if root.weights is None else root.weights[count:]
        return Segment(root.tokens[count:], weights, root.children, continued=root.continued)
