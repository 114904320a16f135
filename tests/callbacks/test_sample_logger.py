from __future__ import annotations

import re
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from rlhf_lightning import DPOModule
from rlhf_lightning.callbacks import SampleLogger
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import char_tokenizer, save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import pairs
from ..rl.fixed_rollouts import FixedGRPO, fixed_completions, options, picky, remainder


class Tables(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[str], list[list[Any]]]] = []
        self.steps: list[int] = []

    name = version = "tables"

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables.append((key, columns, data))
        self.steps.append(step)


def batches(count: int) -> Batches:
    tokenizer = char_tokenizer()
    rows = [Example(f"rows:{n}", Segment(tokenizer(f"[{n}]?")["input_ids"]), {"prompt": f"[{n}]?"}) for n in range(6)]
    return Batches(*(ExampleBatch([rows[2 * n % 6], rows[2 * n % 6 + 1]]) for n in range(count)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def fit(folder: str, callback: SampleLogger, val: Batches | None = None) -> Tables:
    tables = Tables()
    run = trainer("32-true", max_epochs=1, logger=tables, num_sanity_val_steps=0)
    run.callbacks.append(callback)
    run.fit(FixedGRPO(folder, **options(num_generations=3)), batches(5), val)
    return tables


def expected(row: int, step: int) -> list[list[Any]]:
    found = []
    for sample in fixed_completions(f"rows:{row}", 3)[:2]:
        first, second = remainder([sample.token_ids])[0], picky([sample.token_ids])[0]
        total = first + 0.5 * (second or 0.0)
        ended = sample.finish_reason == "stop"
        found.append([step, f"[{row}]?", sample.text, len(sample.token_ids), ended, total, first, second])
    return found


def test_tables_hold_the_current_samples(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = fit(folder, SampleLogger(every_n_batches=3, num_prompts=1, num_samples=2))
    found = tables.tables
    assert tables.steps == [0, 3]  # as Lightning counts batches
    columns = ["step", "prompt", "completion", "tokens", "ended", "reward", "remainder", "picky"]
    assert [(key, names) for key, names, _ in found] == [("train/samples", columns)] * 2
    # The first iteration and the fourth, which has the first prompt again.
    for (_, _, rows), step in zip(found, (1, 4), strict=True):
        for row, want in zip(rows, expected(0, step), strict=True):
            assert row[:-1] == want[:-1]
            assert row[-1] == want[-1] or (want[-1] is None and row[-1] != row[-1])
    shown = capsys.readouterr().out
    assert "train samples, step 1" in shown
    assert "[0]?" in shown


def test_after_validation(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(folder, SampleLogger(every_n_batches=100, screen=False), batches(2)).tables
    assert [key for key, _, _ in found] == ["train/samples", "val/samples"]
    assert [row[1] for row in found[1][2]] == ["[2]?"] * 3 + ["[3]?"] * 3
    assert "samples" not in capsys.readouterr().out


def test_a_module_that_writes_nothing(folder: str) -> None:
    run = trainer("32-true", max_steps=1)
    run.callbacks.append(SampleLogger())
    with pytest.raises(ValueError, match="SampleLogger needs GRPOModule or PPOModule; DPOModule writes nothing"):
        run.fit(DPOModule(folder), Batches(ExampleBatch(pairs(2))))


@pytest.mark.parametrize("name", ["every_n_batches", "num_prompts", "num_samples"])
def test_bad_options(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} is 0; it must be at least 1")):
        SampleLogger(**{name: 0})
