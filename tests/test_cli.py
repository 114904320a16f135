"""The command line, run in-process: what it says about mistakes, what wins over what, and where configs come from."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from rlhf_lightning import __version__, datamodules, modules
from rlhf_lightning.cli import PostTrainingCLI, main
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.utils.messages import explain

REPOSITORY = Path(__file__).parent.parent
NANO = str(REPOSITORY / "configs/models/nano")
TINY_DPO = str(REPOSITORY / "configs/dpo/tiny.yaml")


def refused(capsys, *args: str) -> tuple[int, str]:
    """Exit status and message of a command that must fail."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rlhf-lightning: ")
    assert not any("Traceback" in line for line in lines)
    return exit_info.value.code, lines[-1].removeprefix("rlhf-lightning: ")


def printed_config(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit) as exit_info:
        main([*args, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}+1=?", "chosen": f"#{n + 1}", "rejected": f"#{n}"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dpo_args(folder: Path, pairs: Path, root: Path) -> list[str]:
    return [
        "--model=DPOModule",
        f"--model.model={folder}",
        "--data=PreferenceDataModule",
        f"--data.train={pairs}",
        f"--data.val={pairs}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
    ]


def test_version_and_usage(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
    main([])
    usage = capsys.readouterr().out
    assert "fit|validate|test|predict" in usage
    assert "rlhf-lightning pipeline" in usage
    assert "rlhf-lightning label-steps" in usage


METHODS = ("SFT", "Reward", "ProcessReward", "DPO", "SimPO", "KTO", "GRPO", "PPO")
CONTRACTS = ("SFT", "Preference", "Unpaired", "Stepwise", "Prompt")


@pytest.mark.parametrize(
    ("group", "cls"),
    [("model", getattr(modules, f"{name}Module")) for name in METHODS]
    + [("data", getattr(datamodules, f"{name}DataModule")) for name in CONTRACTS],
)
def test_help_says_something_of_every_option(capsys, group, cls):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--{group}.help={cls.__name__}"])
    assert exit_info.value.code == 0
    options = capsys.readouterr().out.split("\noptions:")[-1].split(f"\n  --{group}.")[1:]
    said = {}
    for option in options:
        name, _, text = " ".join(option.split()).partition(" ")
        said[name.rstrip(",")] = text.partition("(type:")[0].partition("(required")[0]
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            # Behind the option's place-holder there are words.
            assert re.search(r"(?<![{,])\b[a-z]{2,}\b(?![},])", said[name]), name


def test_help_of_the_other_commands(capsys):
    for command, option in (("pipeline", "--run_dir"), ("label-steps", "--num_completions"), ("fit", "--model.help")):
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--help"])
        assert exit_info.value.code == 0
        shown = capsys.readouterr().out
        assert option in shown
        assert "Traceback" not in shown


def test_the_module_is_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "pipeline", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("rlhf_lightning", run_name="__main__")
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: rlhf-lightning pipeline")
    assert sys.argv[0] == "rlhf-lightning"


def test_seed_defaults_to_zero(capsys):
    config = printed_config(capsys, "fit", "--model=SFTModule", "--model.model=x", "--data=SFTDataModule")
    assert config["seed_everything"] == 0
    assert config["model"]["class_path"].endswith("SFTModule")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "no subcommand 'fitt'; did you mean 'fit'?"),
        (["label_steps"], "no subcommand 'label_steps'; did you mean 'label-steps'?"),
        (["frobnicate"], "use one of fit, validate, test, predict, pipeline, label-steps"),
        (["fit"], " given: pass --config with a file"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml'"),
        (["fit", "--config", TINY_DPO, "--trainer.max_stepz=3"], "did you mean 'trainer.max_steps'?"),
        (["fit", "--config", TINY_DPO, "--model.betta=3"], "no option 'betta'; did you mean 'beta'?"),
        (["fit", "--config", TINY_DPO, "--model.beta=much"], "beta: 'much' is not allowed: expected float"),
        (["pipeline"], "no configuration is given: pass --config with a file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(capsys, args, message):
    code, said = refused(capsys, *args)
    assert code == 2
    assert message in said


MODEL = {"class_path": "DPOModule", "init_args": {"model": "x"}}
DATA = {"class_path": "PreferenceDataModule", "init_args": {"train": "rows.jsonl"}}


def model(**init_args) -> dict:
    return {"model": {"class_path": "DPOModule", "init_args": {"model": "x", **init_args}}}


def callback(class_path: str, **init_args) -> dict:
    return {"trainer": {"callbacks": [{"class_path": class_path, "init_args": init_args}]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modelx": 3}, "no option 'modelx'; did you mean 'model'?"),
        ({"trainer": {"max_epoch": 3}}, "no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (model(betta=1), "no option 'betta'; did you mean 'beta'?"),
        ({"model": {**MODEL, "class_path": "DPOModul"}}, "no class 'DPOModul'; did you mean 'DPOModule'?"),
        (model(loss_type="sigmod"), "did you mean 'sigmoid'?"),
        (model(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lrr": 1}}), "'lrr'; did you mean 'lr'?"),
        (callback("EarlyStopping", monitor="x", pattience=1), "no option 'pattience'; did you mean 'patience'?"),
        (callback("EarlyStoping"), "no class 'EarlyStoping'; did you mean 'EarlyStopping'?"),
        ({"trainer": {"logger": [{"class_path": "JSONLLogger", "init_args": {"pathh": "x"}}]}}, "did you mean 'path'?"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(capsys, tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": MODEL, "data": DATA} | content))
    code, said = refused(capsys, "fit", "--config", str(file))
    assert code == 2
    assert message in said
    assert len(said) < 400


def test_invalid_yaml(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: [\n")
    code, said = refused(capsys, "fit", "--config", str(file))
    assert code == 2
    assert "line 2" in said


@pytest.mark.parametrize(
    ("flag", "instead"),
    [("accumulate_grad_batches=2", "global_batch_size"), ("gradient_clip_val=0.5", "max_grad_norm")],
)
def test_trainer_flags_that_cannot_be_honoured(capsys, tiny_model_folder, pairs, tmp_path, flag, instead):
    code, said = refused(capsys, "fit", *dpo_args(tiny_model_folder(), pairs, tmp_path / "run"), f"--trainer.{flag}")
    assert code == 1
    assert flag.partition("=")[0] in said
    assert instead in said
    assert not (tmp_path / "run").exists()


def test_debug_raises(tiny_model_folder, pairs, tmp_path, monkeypatch):
    args = ["fit", *dpo_args(tiny_model_folder(), pairs, tmp_path), "--trainer.accumulate_grad_batches=2"]
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        main([*args, "--debug"])
    monkeypatch.setenv("RLHF_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        main(args)


@pytest.mark.parametrize("flag", ["--config {}", "-c {}", "--config={}"])
def test_packaged_configs_are_found_from_anywhere(capsys, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    args = flag.format("configs/dpo/tiny.yaml").split()
    assert printed_config(capsys, "fit", *args)["model"]["class_path"] == "rlhf_lightning.modules.DPOModule"


def test_a_file_here_wins_over_the_packaged_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs/dpo/tiny.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(Path(TINY_DPO).read_text().replace("max_steps: 8", "max_steps: 77"))
    assert printed_config(capsys, "fit", "--config", "configs/dpo/tiny.yaml")["trainer"]["max_steps"] == 77


def test_later_configs_and_options_win(capsys, tmp_path):
    (tmp_path / "second.yaml").write_text("model: {init_args: {beta: 0.3}}\ntrainer: {max_steps: 5}\n")
    config = printed_config(
        capsys, "fit", "--config", TINY_DPO, "--config", str(tmp_path / "second.yaml"), "--trainer.max_steps=6"
    )
    assert config["model"]["init_args"]["beta"] == 0.3
    assert config["model"]["init_args"]["model"] == "configs/models/nano"
    assert config["trainer"]["max_steps"] == 6


def test_the_command_line_wins_over_a_checkpoint(tiny_model_folder, pairs, tmp_path):
    args = dpo_args(tiny_model_folder(), pairs, tmp_path)
    first = PostTrainingCLI(["fit", *args, "--model.beta=0.1"])
    checkpoint = tmp_path / "last.ckpt"
    first.trainer.save_checkpoint(checkpoint)
    with pytest.warns(UserWarning, match=r"beta=0\.7 \(the checkpoint: 0\.1\)"):
        second = PostTrainingCLI(["validate", *args, "--model.beta=0.7", f"--ckpt_path={checkpoint}"])
    assert isinstance(second.model, DPOModule)
    assert second.model.beta == 0.7
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint was made with.*")
        third = PostTrainingCLI(["validate", *args, "--model.beta=0.1", f"--ckpt_path={checkpoint}"])
    assert third.model.beta == 0.1


def test_explain_keeps_what_it_does_not_know():
    assert explain("something\n  else   happened") == "something else happened"
    assert explain("Option 'x.y' is not accepted", ["x.z"]) == "no option 'x.y'; did you mean 'x.z'?"
    assert explain("unrecognized arguments: --modle=3", ["model"]) == "no option 'modle'; did you mean 'model'?"


def test_causes_are_looked_for_only_where_types_were_tried():
    tried = """\
Parser key "model.lr":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'float'>, <class 'Schedule'>]
  Errors:
    - Expected a <class 'float'>
    - lr=-1.0 is not allowed: it must be above 0
  Given value type: <class 'str'>
  Given value: -1"""
    assert explain(tried) == "lr=-1.0 is not allowed: it must be above 0"
    listed = "two things are wrong:\n  - the rows\n  - the model"
    assert explain(listed) == "two things are wrong: - the rows - the model"


@pytest.mark.parametrize("callback", ["TrainingCheckpoint", "lightning.pytorch.callbacks.ModelCheckpoint"])
def test_checkpoints_that_the_trainer_is_told_not_to_make(capsys, tmp_path, callback):
    """The tiny configs make none: whoever adds a callback for them is told which option to write."""
    args = ["fit", "--config", TINY_DPO, f"--trainer.callbacks+={callback}", f"--trainer.default_root_dir={tmp_path}"]
    args += [f"--trainer.callbacks.{'folder' if callback.startswith('Training') else 'dirpath'}={tmp_path}/checkpoints"]
    status, message = refused(capsys, *args)
    assert status == 1
    assert message == (
        f"trainer.enable_checkpointing is false, and {callback.rpartition('.')[2]} makes checkpoints: write "
        "--trainer.enable_checkpointing=true (in YAML, enable_checkpointing: true under trainer), or remove the "
        "callback"
    )
    built = PostTrainingCLI([*args[1:], "--trainer.enable_checkpointing=true"], run=False).trainer
    assert callback.rpartition(".")[2] in {type(each).__name__ for each in built.checkpoint_callbacks}
