"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from ..data.formats import demonstration
from ..data.sources import Source
from ..data.tokenization import Turns
from ..sequences.example import Example
from .base import ExampleDataModule


class SFTDataModule(ExampleDataModule):
    """Serves demonstrations: prompts with completions, conversations, or text.

    Rows are as in :func:`~rlhf_lightning.data.formats.demonstration`. A prompt with its completion becomes a root with
    one child, a conversation one sequence and a text one segment; tokens to be learned have weight 1.

    Args:
        train: source of the training rows.
        completion_only_loss: learn completions only; otherwise their prompts too, from the second token.
        assistant_only_loss: learn only the assistant's messages of a conversation, each turn in the context in which
            it is generated; otherwise all but the first token of the rendered conversation.
        turns: the assistant's turns to learn, in a conversation or a completion of several messages: ``all``, or the
            ``last``.
        kwargs: options of ``ExampleDataModule``: sources, batches, lengths, order, streaming.

    Raises:
        ValueError: for a value outside its range.

    Example:
        ``SFTDataModule(train="sums:demonstrations?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "SFTDataModule"

    def __init__(
        self,
        train: Source | None = None,
        *,
        completion_only_loss: bool = True,
        assistant_only_loss: bool = True,
        turns: Turns = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, **kwargs)

        self.completion_only_loss = completion_only_loss
        if turns not in get_args(Turns):
            raise ValueError(f"turns={turns!r}, expected one of {', '.join(get_args(Turns))}")
        if turns == "last" and not assistant_only_loss:
            raise ValueError("turns='last' says which answers are learnt: set assistant_only_loss=True with it")
        self.assistant_only_loss = assistant_only_loss
        self.turns = turns

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        row = demonstration(columns)
        if row.completions:
            root = self.rows.answers(
                row,
                assistant_only=self.assistant_only_loss,
                prompt_loss=not self.completion_only_loss,
                turns=self.turns,
            )
        else:
            root = self.rows.whole(row, assistant_only=self.assistant_only_loss, turns=self.turns)
        return [Example(row_id, root, row.fields)]
