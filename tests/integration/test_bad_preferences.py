"""Preference data that is wrong: one line with the file, the row, the value and what is allowed; or a stated policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main

PAIR = {"prompt": "1+1=?", "chosen": "#2", "rejected": "#3"}
JUDGED = {"prompt": "1+1=?", "completion": "#2", "label": True}
STEPS = {"prompt": "1+2+3=?", "completions": ["1+2=3", "3+3=6"], "labels": [True, True]}
RATED = {"prompt": "1+1=?", "response": "#2", "ratings": {"right": 3, "short": 1}}
ATTRIBUTES = ("--model.loss_type=mse", "--model.attributes=[right, short]")

Fit = Callable[..., str]


@pytest.fixture
def fit(tiny_model_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Runs ``fit`` on rows through the command line; returns the one line that it ended with, empty where it worked."""

    def run(module: str, data: str, rows: list[Any], *extra: str) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        settings = [
            f"--model={module}",
            f"--model.model={tiny_model_folder()}",
            f"--data={data}",
            f"--data.train={file}",
            f"--trainer.default_root_dir={tmp_path / 'out'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.enable_checkpointing=false",
        ]
        capsys.readouterr()
        code: Any = 0
        try:
            main(["fit", *settings, *extra])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in said)
        assert sum(line.startswith("rlhf-lightning: ") for line in said) == (code == 1)
        return said[-1] if code else ""

    return run


@pytest.mark.parametrize("module", ["DPOModule", "SimPOModule", "RewardModule"])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_equal_completions(module: str, streaming: str, fit: Fit) -> None:
    rows = [PAIR, {**PAIR, "rejected": "#2"}, PAIR]
    said = fit(module, "PreferenceDataModule", rows, f"--data.streaming={streaming}", "--data.shuffle=false")
    assert "rows.jsonl:2: chosen and rejected are equal ('#2')" in said
    assert said.endswith("a pair needs two different completions")
    skipped = fit(module, "PreferenceDataModule", rows, "--data.on_bad_row=skip", f"--data.streaming={streaming}")
    assert skipped == "", "the policy of on_bad_row=skip"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('"high"', "'high'"),
        ("NaN", "nan"),
        ("Infinity", "inf"),
        ("true", "True"),
        ("[1]", "[1]"),
        ('{"by": 1}', "{'by': 1}"),
    ],
)
@pytest.mark.parametrize("module", ["DPOModule", "RewardModule"])
def test_margins_that_are_no_numbers(module: str, written: str, shown: str, fit: Fit) -> None:
    bad = json.dumps({**PAIR, "margin": "here"}).replace('"here"', written)
    said = fit(module, "PreferenceDataModule", [PAIR, {**PAIR, "margin": 1}, bad])
    assert f"rows.jsonl:3: 'margin' is {shown}, expected a finite number" in said


def test_margins_may_be_absent_or_text_that_is_a_number(fit: Fit) -> None:
    margins: list[Any] = [None, 1, -0.5, "0.25"]
    assert fit("RewardModule", "PreferenceDataModule", [PAIR, *({**PAIR, "margin": m} for m in margins)]) == ""


@pytest.mark.parametrize("label", [True, False])
def test_verdicts_that_are_all_the_same(label: bool, fit: Fit) -> None:
    rows = [{**JUDGED, "prompt": f"{n}+1=?", "label": label} for n in range(4)]
    said = fit("KTOModule", "UnpairedDataModule", rows)
    name = "undesirable_weight" if label else "desirable_weight"
    assert f"all 4 training rows (from {rows_file(said)}:1 to {rows_file(said)}:4) are labelled {label}".lower() in (
        said.lower()
    )
    assert f"set {name}=0 if that is meant" in said
    assert fit("KTOModule", "UnpairedDataModule", rows, f"--model.{name}=0") == ""


def rows_file(said: str) -> str:
    return next(word for word in said.replace("(", " ").split() if "rows.jsonl" in word).rpartition(":")[0]


@pytest.mark.parametrize(("label", "shown"), [("maybe", "'maybe'"), (2, "2"), (0.5, "0.5"), ([True], "[True]")])
def test_verdicts_that_are_none(label: Any, shown: str, fit: Fit) -> None:
    said = fit("KTOModule", "UnpairedDataModule", [JUDGED, {**JUDGED, "label": label}])
    assert f"rows.jsonl:2: 'label' is {shown}, expected true or false" in said


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True], "2 completions but 1 labels: write one label for each of at least one step"),
        ([True, False, True], "2 completions but 3 labels: write one label for each of at least one step"),
        ([], "2 completions but 0 labels: write one label for each of at least one step"),
        ("++", "'labels' is str ('++'), expected a list of labels, one per step"),
        ([True, "good"], "'label 2' is 'good', expected"),
        ([True, -1], "'label 2' is -1, expected"),
    ],
)
def test_labels_that_do_not_match_the_steps(labels: Any, message: str, fit: Fit) -> None:
    said = fit("ProcessRewardModule", "StepwiseDataModule", [STEPS, {**STEPS, "labels": labels}])
    assert f"rows.jsonl:2: {message}" in said


def test_attributes_that_some_rows_lack_cost_nothing(fit: Fit) -> None:
    rows = [RATED, {**RATED, "ratings": {"right": 2}}, {**RATED, "ratings": {"short": None, "right": 1}}]
    assert fit("RewardModule", "PreferenceDataModule", rows, *ATTRIBUTES) == "", "the stated policy of RewardModule"


@pytest.mark.parametrize(("rating", "shown"), [("high", "'high'"), (True, "True")])
def test_attributes_that_are_no_numbers(rating: Any, shown: str, fit: Fit) -> None:
    rows = [RATED, {**RATED, "ratings": {"right": rating, "short": 1}}]
    said = fit("RewardModule", "PreferenceDataModule", rows, *ATTRIBUTES)
    assert f"rows.jsonl:2: 'rating right' is {shown}, expected a finite number" in said


def test_an_attribute_that_no_row_has_is_pointed_out(fit: Fit) -> None:
    rows = [RATED, {**RATED, "ratings": {"right": 2}}]
    said = fit("RewardModule", "PreferenceDataModule", rows, ATTRIBUTES[0], "--model.attributes=[right, shrt]")
    assert "none of the 2 training rows" in said
    assert "rows.jsonl:1" in said
    assert "has a number 'shrt' (found: right, short; did you mean 'short'?)" in said
    assert "name attributes after columns of ratings" in said
