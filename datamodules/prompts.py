"""Prompts for sampling, for GRPO, PPO and generation."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..data.formats import prompt_only
from ..sequences.example import Example, Segment
from .base import ExampleDataModule


class PromptDataModule(ExampleDataModule):
    """Serves prompts with the columns that reward functions need.

    Rows are as in :func:`~rlhf_lightning.data.formats.prompt_only`. The prompt becomes a root without children;
    the fields are all other columns and ``prompt`` as it was written, with a chat's ``tools`` and
    ``chat_template_kwargs`` (those of the datamodule included), for rewards that render it again. ``max_length`` limits
    the prompt alone, and ``truncate_end``, which would cut off the question, is not allowed. The other arguments are
    those of :class:`~rlhf_lightning.datamodules.base.ExampleDataModule`.

    Example:
        ``PromptDataModule(train="sums:prompts?rows=1000", tokenizer="configs/models/nano", global_batch_size=16)``
    """

    contract: ClassVar[str | None] = "PromptDataModule"
    allowed_on_too_long: ClassVar[tuple[str, ...]] = ("drop", "truncate_start", "error")

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the example of one row."""
        row = prompt_only(columns)
        # Rewards may render the chat themselves, so that they get the tools and settings of the template.
        settings = self.rows.chat.merged(row.template) if not isinstance(row.prompt, str) else row.template
        tools = {"tools": settings.pop("tools")} if settings.get("tools") else {}
        fields = {**row.fields, **tools, **({"chat_template_kwargs": settings} if settings else {})}
        return [Example(row_id, Segment(np.asarray(self.rows.prompt(row))), fields)]
