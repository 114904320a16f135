"""Leaving out the last batch never leaves a run without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.datamodules import (
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    UnpairedDataModule,
)

from ..datamodules.toys import chars, complaint

ROW: dict[str, Any] = {
    "prompt": "q",
    "completion": "a",
    "chosen": "a",
    "rejected": "b",
    "label": True,
    "completions": ["x"],
    "labels": [1],
}
MODULES = [SFTDataModule, PreferenceDataModule, UnpairedDataModule, StepwiseDataModule, PromptDataModule]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cls", MODULES)
def test_fewer_rows_than_a_batch_are_refused_at_the_start(cls: Any, streaming: bool, tmp_path: Path) -> None:
    columns = {name: value for name, value in ROW.items() if cls is not UnpairedDataModule or name != "chosen"}
    options = {"train": [columns] * 3, "tokenizer": chars(), "streaming": streaming}
    data = cls(**options, global_batch_size=4, drop_last=True)
    kind = "rows" if streaming else "examples"
    assert complaint(data.train_dataloader) == (
        f"drop_last=True leaves no batch of 3 training {kind} with global_batch_size=4: set drop_last=False, or a "
        "global_batch_size of at most 3"
    )
    assert len(cls(**options, global_batch_size=3, drop_last=True).train_dataloader()) == 1
    assert len(cls(**options, global_batch_size=4).train_dataloader()) == 1


def test_rows_that_were_dropped_do_not_count() -> None:
    rows = [{"prompt": "q", "completion": text} for text in ("a", "b", "much too long")]
    data = SFTDataModule(train=rows, tokenizer=chars(), global_batch_size=3, drop_last=True, max_length=4)
    assert complaint(data.train_dataloader).startswith("drop_last=True leaves no batch of 2 training examples")
