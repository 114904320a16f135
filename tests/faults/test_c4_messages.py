"""Mistakes are told in one line that says what to write instead, whichever door they come by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from rlhf_lightning import DPOModule, GRPOModule, SFTModule, cli
from rlhf_lightning.cli import main
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.manifest import Manifest
from rlhf_lightning.pipeline.report import results_table
from rlhf_lightning.utils.files import mark

from ..helpers import tiny_model

Folder = Callable[[str], Path]
TINY = "configs/dpo/tiny.yaml"


def said(capsys: pytest.CaptureFixture[str], *args: str, code: int | None = None) -> str:
    """Returns the last line of a command that must fail."""
    with pytest.raises(SystemExit) as info:
        main(args)
    assert info.value.code == code if code is not None else info.value.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert not [line for line in lines if "Traceback" in line]
    assert lines[-1].startswith("rlhf-lightning: ")
    assert len(lines[-1]) < 500
    return lines[-1].removeprefix("rlhf-lightning: ")


OPTIONS = {
    "--model.optimizer=SGD": "several classes are called SGD: write torch.optim.SGD or bitsandbytes.optim.SGD",
    "--model.optimizer=Adamm": "Adamm",
    "--trainer.max_epoch=2": "no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
    "--modell=x": "no option 'modell'; did you mean 'model'?",
    "--model.lr=0.1": "no option 'lr'; use optimizer (in Python optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5); in",
    "--data.batch_size=3": "no option 'batch_size'; use the datamodule's global_batch_size",
    "--data.max_seq_length=3": "no option 'max_seq_length'; use the datamodule's max_length",
    "--trainer.callbacks+=nowhere.Mine": "cannot import 'nowhere.Mine': No module named 'nowhere'",
    "--ckpt_path=nowhere.ckpt": "nowhere.ckpt",
    "--trainer.logger=TensorBoardLogger --trainer.logger.save_dir=x": "TensorBoardLogger needs tensorboard: pip",
    "--trainer.callbacks+=TrainingCheckpoint --trainer.callbacks.folder=x --trainer.callbacks.keep=0": "keep is 0; it",
    "--trainer.accelerator=gpuu": "accelerator='gpuu'",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_on_the_command_line(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert OPTIONS[option] in said(capsys, "fit", "--config", TINY, *option.split())
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "."], "is not a file: give --config with a YAML file"),
        (["fit", "--config", "configs/dpo/defalt.yaml"], "did you mean 'configs/dpo/default.yaml'?"),
        (
            ["pipeline", "--config", "configs/pipelines/quikstart.yaml"],
            "did you mean 'configs/pipelines/quickstart.yaml'?",
        ),
        (["pipeline", "--config", "configs/pipelines/quickstart.yaml", "--run=x"], "no option 'run'"),
        (["pipeline", "--config", "configs/pipelines/quickstart.yaml", "--run_dirr=x"], "did you mean 'run_dir'?"),
    ],
)
def test_files_and_options_of_commands(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, *args, code=2)


def test_a_model_that_is_not_there_is_no_row_s_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1", "chosen": "2", "rejected": "3"}) + "\n")
    args = ["--model=DPOModule", "--model.model=nobody/nothing", "--data=PreferenceDataModule"]
    args += ["--data.train=pairs.jsonl", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    message = said(capsys, "fit", *args)
    assert message.startswith("no tokenizer in 'nobody/nothing'")
    assert "pairs.jsonl" not in message


def test_places_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    quick = ["pipeline", "--config", "configs/pipelines/quickstart.yaml"]
    assert "'file' is a file; choose another folder" in said(capsys, *quick, "--run_dir=file")
    logger = ["--trainer.logger.path=file/history.jsonl"]
    assert "cannot be written (File exists): choose another folder" in said(capsys, "fit", "--config", TINY, *logger)
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_bytes(b"\0\0\0")
    mark(run, "pipeline", ["manifest.json"])
    message = said(capsys, *quick, f"--run_dir={run}")
    assert f"the manifest '{run}/manifest.json' is damaged" in message
    assert (run / "manifest.json").read_bytes() == b"\0\0\0"
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stages": 3}', b'{"stages": {"x": 3}}', b"\xff\xfe"])
def test_a_damaged_manifest_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"the manifest '.*manifest.json' is damaged \(.*\): restore it, or delete it"):
        Manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "x"), "[Errno 28] No space left on device: 'x'"),
        (PermissionError(13, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
        (
            ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available"),
            "needs tensorboard: pip install",
        ),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory: lower the module's micro_batch_tokens"),
        (RuntimeError("one\ntwo"), "RuntimeError: one two (--debug shows where)"),
    ],
)
def test_whatever_happens_is_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "PostTrainingCLI", fail)
    assert message in said(capsys, "fit", code=1)
    with pytest.raises(type(error)):
        main(["fit", "--debug"])


def test_own_callbacks_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script has not the current folder on its path, as ``python -m`` has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in __import__("sys").path if place not in ("", str(tmp_path))])
    Path("my_callbacks.py").write_text(
        "from pathlib import Path\nimport lightning\n\n"
        "class Mine(lightning.Callback):\n"
        "    def on_fit_start(self, trainer, module):\n        Path('seen').write_text('yes')\n"
    )
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=true"]
    main(["fit", "--config", TINY, "--trainer.callbacks+=my_callbacks.Mine", *quiet])
    assert Path("seen").read_text() == "yes"


def test_a_timer_can_be_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:00:00"]
    trainer = cli.PostTrainingCLI(["--config", TINY, *timer], run=False).trainer
    assert [callback._duration for callback in trainer.callbacks if isinstance(callback, Timer)] == [0.0]


def test_markup_in_what_a_user_writes(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("title: '[/red] [bold'\nrun_dir: run\nstages: {a: {kind: fit, config: []}}\n")
    pipeline = load_pipeline(file)
    manifest = Manifest(tmp_path / "none.json")
    manifest.content["versions"] = {}
    metrics = {"steps": 1.0, "exported_step": 1.0}
    manifest.stages["a"] = {"kind": "fit", "ran": True, "seconds": 1.0, "metrics": metrics, "outputs": {}}
    console = Console(width=100, record=True)
    console.print(results_table(pipeline, manifest))
    assert "[/red] [bold" in console.export_text()


# In Python.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPOModule("x", betta=0.1), r"^DPOModule has no option 'betta'; did you mean 'beta'\?$"),
        (lambda: DPOModule("x", lr=0.1), "^DPOModule has no option 'lr'; use optimizer"),
        (
            lambda: SFTModule("x", batch_size=4),
            "^SFTModule has no option 'batch_size'; use the datamodule's global_batch",
        ),
        (
            lambda: GRPOModule("x", rewards=[], reward_funcs=[]),
            "^GRPOModule has no option 'reward_funcs'; use rewards$",
        ),
        (lambda: SFTDataModule("x", batch_size=4), "^SFTDataModule has no option 'batch_size'; use the datamodule's"),
        (
            lambda: PreferenceDataModule(trian="x"),
            r"^PreferenceDataModule has no option 'trian'; did you mean 'train'\?$",
        ),
        (lambda: PromptDataModule(nonsense="x"), "^PromptDataModule has no option 'nonsense'$"),
        (
            lambda: SFTModule(tiny_model("llama")),
            "^model is a LlamaForCausalLM; pass the folder or hub id that it came",
        ),
    ],
)
def test_keywords_that_are_none(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_own_subclasses_take_their_own_options(tiny_model_folder: Folder) -> None:
    class Mine(DPOModule):
        def __init__(self, model: str, *, strength: int = 1, **kwargs: Any) -> None:
            super().__init__(model, **kwargs)
            self.strength = strength

    module = Mine(str(tiny_model_folder("llama")), strength=3, beta=0.5)
    assert (module.strength, module.beta) == (3, 0.5)
    with pytest.raises(TypeError, match=r"^Mine has no option 'strenght'; did you mean 'strength'\?$"):
        Mine("x", strenght=3)


def lengths(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_reward_functions_in_checkpoints(tiny_model_folder: Folder, tmp_path: Path) -> None:
    """A function of a module is found again by its path; of another, the message says how to pass it."""
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for function, name in ((lengths, f"{__name__}.lengths"), (lambda prompts, completions, **c: [0.0], "<lambda>")):
        module = GRPOModule(str(tiny_model_folder("llama")), rewards=[function])
        assert module.hparams["rewards"] == module.hparams_initial["rewards"] == [name]
        trainer.strategy.connect(module)
        module.configure_model()
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        if function is lengths:
            loaded = GRPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
            assert list(loaded.rewards.names) == ["lengths"]
            continue
        with pytest.raises(
            ValueError, match=r"is not a dotted path: .*load_from_checkpoint\(path, rewards=\[function\]"
        ):
            GRPOModule.load_from_checkpoint(tmp_path / "x.ckpt")
        again = GRPOModule.load_from_checkpoint(tmp_path / "x.ckpt", rewards=[function])
        assert len(again.rewards.functions) == 1
