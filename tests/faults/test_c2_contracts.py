"""A module takes the rows of its own contract and refuses all others, before they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest

from rlhf_lightning import datamodules, modules
from rlhf_lightning.cli import main
from rlhf_lightning.datamodules import ExampleDataModule
from rlhf_lightning.sequences import Example, Segment

pytestmark = pytest.mark.filterwarnings("ignore")

NANO = str(Path(__file__).parents[2] / "configs/models/nano")
EXACT = {"rewards": ["rlhf_lightning.rewards.exact_answer"]}
OWN = {
    "SFTModule": ("SFTDataModule",),
    "RewardModule": ("PreferenceDataModule", "SFTDataModule"),  # rated completions are rows of either
    "ProcessRewardModule": ("StepwiseDataModule",),
    "DPOModule": ("PreferenceDataModule",),
    "SimPOModule": ("PreferenceDataModule",),
    "KTOModule": ("UnpairedDataModule",),
    "GRPOModule": ("PromptDataModule",),
    "PPOModule": ("PromptDataModule",),
}
TASKS = {
    "SFTDataModule": "demonstrations",
    "PreferenceDataModule": "preference",
    "UnpairedDataModule": "unpaired",
    "StepwiseDataModule": "stepwise",
    "PromptDataModule": "prompts",
}


def module_of(name: str) -> Any:
    return getattr(modules, name)(NANO, init="random", **(EXACT if name in ("GRPOModule", "PPOModule") else {}))


def data_of(name: str, source: str | None = None) -> Any:
    source = source or f"sums:{TASKS[name]}?rows=8"
    return getattr(datamodules, name)(train=source, val=source, tokenizer=NANO, global_batch_size=4)


def trainer_of(root: Path, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    return lightning.Trainer(
        accelerator="cpu", max_steps=1, enable_checkpointing=False, default_root_dir=str(root), **quiet, **options
    )


@pytest.mark.parametrize("data", TASKS)
@pytest.mark.parametrize("module", OWN)
def test_every_module_with_every_datamodule(module: str, data: str, tmp_path: Path) -> None:
    own = data in OWN[module]
    if own:
        datamodule = data_of(data)
        datamodule.trainer = trainer_of(tmp_path)
        datamodule.trainer.strategy._lightning_module = module_of(module)
        datamodule.setup("fit")
        assert len(datamodule.val_dataloader()) == 2
        return
    # The source does not exist: nothing of it is read before it is refused.
    for run in (trainer_of(tmp_path).fit, trainer_of(tmp_path).validate):
        with pytest.raises(ValueError, match=f"{module} does not take the rows of {data}: use {OWN[module][0]}"):
            run(module_of(module), datamodule=data_of(data, str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(("module", "data"), [("SFTModule", "PreferenceDataModule"), ("SFTModule", "PromptDataModule")])
def test_loaders_alone(module: str, data: str, tmp_path: Path) -> None:
    datamodule = data_of(data)
    for loaders in ({"train_dataloaders": datamodule.train_dataloader()}, {"train_dataloaders": None}):
        run = trainer_of(tmp_path).fit if loaders["train_dataloaders"] else trainer_of(tmp_path).validate
        given = loaders if loaders["train_dataloaders"] else {"dataloaders": datamodule.val_dataloader()}
        with pytest.raises(ValueError, match=f"{module} does not take the rows of {data}"):
            run(module_of(module), **given)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_on_the_command_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                *(
                    command,
                    "--model=SFTModule",
                    f"--model.model={NANO}",
                    "--model.init=random",
                    "--trainer.accelerator=cpu",
                ),
                *("--data=PreferenceDataModule", "--data.train=sums:preference", "--data.val=sums:preference"),
                *(f"--data.tokenizer={NANO}", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"),
            ]
        )
    assert "SFTModule does not take the rows of PreferenceDataModule: use SFTDataModule" in capsys.readouterr().err


class OwnRows(datamodules.PreferenceDataModule):
    """A datamodule of one's own, of a contract."""


class OwnContract(ExampleDataModule):
    """A datamodule of one's own, of none."""

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        return [Example(row_id, Segment([3, 4, 5], [0.0, 1.0, 1.0]))]


def test_subclasses_keep_their_contract_and_others_have_none(tmp_path: Path) -> None:
    data = OwnRows(val="sums:preference?rows=4", tokenizer=NANO)
    with pytest.raises(ValueError, match="does not take the rows of PreferenceDataModule"):
        trainer_of(tmp_path).validate(module_of("SFTModule"), datamodule=data)
    trainer_of(tmp_path).validate(module_of("DPOModule"), datamodule=data)
    trainer_of(tmp_path).validate(module_of("SFTModule"), datamodule=OwnContract(val=[{"a": 1}] * 3, tokenizer=NANO))


class Unweighted(OwnContract):
    """Rows from which nothing can be learned."""

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        return [Example(row_id, Segment([3, 4]))]


def test_rows_of_no_contract_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    data = Unweighted(val=[{"a": 1}], tokenizer=NANO)
    with pytest.raises(ValueError, match="row memory:1 has no weights, so nothing of it is learnt"):
        trainer_of(tmp_path).validate(module_of("SFTModule"), datamodule=data)
