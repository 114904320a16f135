"""The command line, run in-process: what it says about mistakes, what wins over what, and where configs come from."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
import warnings
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_lightning import __version__, datamodules, modules
from rlhf_lightning.cli import PostTrainingCLI, main
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.rl import PolicyLoss, PPOLoss
from rlhf_lightning.utils.keywords import keyword_parameters
from rlhf_lightning.utils.messages import explain

from .helpers import nested

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
    assert "rlhf-lightning generate" in usage
    assert "rlhf-lightning chat" in usage


DATA = [name for name in datamodules.__all__ if name.endswith("DataModule") and name != "ExampleDataModule"]


@pytest.mark.parametrize(
    ("group", "cls"),
    [("model", getattr(modules, name)) for name in modules.__all__]
    + [("data", getattr(datamodules, name)) for name in DATA],
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
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        # A group is its options; one that may be a subclass is an option as well.
        group = fields(parameter.default) if is_dataclass(parameter.default) and name not in said else []
        for option in [f"{name}.{field.name}" for field in group] or [name]:
            # Behind the option's place-holder there are words.
            assert re.search(r"(?<![{,])\b[a-z]{2,}\b(?![},])", said[option]), option


@pytest.mark.parametrize(("cls", "group"), [("GRPOModule", PolicyLoss), ("PPOModule", PPOLoss)])
def test_help_of_a_group_with_subclasses(capsys, cls, group):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", f"--model={cls}", f"--model.loss.help={group.__name__}"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for field in fields(group):
        assert re.search(rf"--loss\.{field.name}\b", shown), field.name


def test_help_of_the_other_commands(capsys):
    for command, option in (
        ("pipeline", "--run_dir"),
        ("label-steps", "--num_completions"),
        ("generate", "--prompts_at_once"),
        ("chat", "--system"),
        ("fit", "--model.help"),
    ):
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


TINY_GRPO = str(REPOSITORY / "configs/grpo/tiny.yaml")
HERE = __name__


@dataclass(frozen=True)
class MyLoss(PolicyLoss):
    scale: float = 1.0


# As options of the command line, and the same as YAML.
MISTAKES_IN_GROUPS = [
    ("loss.epsilonn", 0.3, 2, "no option 'loss.epsilonn'; did you mean 'loss.epsilon'?"),
    ("kl.estimatr", "k1", 2, "did you mean 'kl.estimator'?"),
    ("entrop.coef", 0.1, 2, "no option 'entrop.coef'; did you mean 'entropy.coef'?"),
    ("loss.epsilon", "much", 2, "loss.epsilon: 'much' is not allowed: expected float"),
    ("sampling.top_k", "a", 2, "sampling.top_k: 'a' is not allowed: expected int"),
    ("sampling.stop", "a", 2, "sampling.stop: 'a' is not allowed: expected a list"),
    ("loss.loss_type", "dappo", 2, "did you mean 'dapo'?"),
    ("kl.estimator", "k4", 2, "kl.estimator: 'k4' is not allowed: expected one of k1, k2, k3"),
    ("loss.epsilon", 3.0, 1, "loss.epsilon=3.0 is outside (0, 1): the ratio is clipped at 1 - epsilon, 0.2 is usual"),
    ("loss.delta", 1.1, 1, "loss.delta=1.1 is not above 1 + epsilon_high = 1.2"),
    ("off_policy.min", 4.0, 1, "off_policy.min=4.0 and off_policy.max=3.0 bound no weight"),
    ("sampling.top_p", 0.0, 1, "sampling.top_p=0.0 is not allowed: it must be in (0, 1]"),
    ("loss", "text", 2, "loss: no class 'text': write the path of a class, package.module.CLASS, or options"),
    ("loss", "dapo", 2, "loss: no class 'dapo'; did you mean loss.loss_type: dapo?"),
    ("kl", "text", 2, "kl: 'text' is not allowed: expected a group of options, NAME: VALUE"),
    ("loss.class_path", "nowhere.MyLoss", 2, "loss: cannot import 'nowhere.MyLoss': No module named 'nowhere'"),
    ("loss.class_path", f"{HERE}.MyLos", 2, f"loss: cannot import '{HERE}.MyLos': {HERE} has nothing called 'MyLos'"),
    ("loss.class_path", "builtins.dict", 2, "loss: 'builtins.dict' is not allowed: expected a subclass of PolicyLoss"),
    ("epsilon", 0.3, 2, "no option 'epsilon'; did you mean 'loss.epsilon'?"),
    ("top_p", 0.3, 2, "no option 'top_p'; did you mean 'sampling.top_p'?"),
    ("kl_estimator", "k1", 2, "no option 'kl_estimator'; did you mean 'kl.estimator'?"),
]


@pytest.mark.parametrize(("name", "value", "status", "message"), MISTAKES_IN_GROUPS)
def test_mistakes_in_groups(capsys, tmp_path, name, value, status, message):
    code, said = refused(capsys, "fit", "--config", TINY_GRPO, f"--model.{name}={value}")
    assert (code, message in said, len(said) < 400) == (status, True, True), said
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": {"init_args": nested({name: value})}}))
    code, said = refused(capsys, "fit", "--config", TINY_GRPO, "--config", str(file))
    assert (code, message in said, len(said) < 400) == (status, True, True), said


# For each group of GRPO and PPO: a typo and the option that is suggested, and a bad value with what is said of it.
GROUPS_OF_METHODS = {
    "grpo": {
        "sampling": ("top_kk", "top_k", {"top_p": 1.5}, "sampling.top_p=1.5 is not allowed: it must be in (0, 1]"),
        "loss": ("epsilonn", "epsilon", {"dual_clip": 0.5}, "loss.dual_clip=0.5"),
        "advantages": ("scale_reward", "scale_rewards", {"scale_rewards": "batches"}, "advantages.scale_rewards: "),
        "tree": ("comparisn", "comparison", {"depth_discount": 2.0}, "tree.depth_discount"),
        "kl": ("estimatr", "estimator", {"estimator": "k4"}, "kl.estimator: 'k4' is not allowed"),
        "off_policy": ("mx", "max", {"min": 4.0}, "off_policy.min=4.0"),
        "entropy": ("coeff", "coef", {"top_quantile": 0.0}, "entropy.top_quantile=0.0 is outside (0, 1]"),
    },
    "ppo": {
        "sampling": ("min_pp", "min_p", {"min_p": -1.0}, "sampling.min_p=-1.0 is not allowed"),
        "loss": ("epsilon_hi", "epsilon_high", {"epsilon_high": 0.0}, "loss.epsilon_high is 0.0; it must be"),
        "gae": ("gama", "gamma", {"gamma": 2.0}, "gae.gamma=2.0 is outside [0, 1]"),
        "value": ("cliprang", "cliprange", {"cliprange": 0.0}, "value.cliprange is 0.0; it must be"),
        "tree": ("rolouts", "rollouts", {"rollouts": []}, "tree.rollouts is empty"),
        "off_policy": ("corection", "correction", {"max": -1.0}, "off_policy.max=-1.0 bound no weight"),
        "kl": ("targt", "target", {"horizon": 0}, "kl.horizon is 0; it must be"),
        "entropy": ("coeff", "coef", {"coef": "much"}, "entropy.coef: 'much' is not allowed: expected float"),
    },
}
CASES_OF_GROUPS = [
    (method, group, options, message)
    for method, groups in GROUPS_OF_METHODS.items()
    for group, (typo, meant, bad, said) in groups.items()
    for options, message in (
        ({typo: 1}, f"no option '{group}.{typo}'; did you mean '{group}.{meant}'?"),
        (bad, said),
    )
]


@pytest.mark.parametrize("written", ["flag", "yaml"])
@pytest.mark.parametrize(("method", "group", "options", "message"), CASES_OF_GROUPS)
def test_messages_of_all_groups_are_alike(capsys, tmp_path, method, group, options, message, written):
    """A typo and a bad value in every group, as an option and in a file: one line, which names the group."""
    tiny = str(REPOSITORY / f"configs/{method}/tiny.yaml")
    ((name, value),) = options.items()
    arguments = [f"--model.{group}.{name}={value}"]
    if written == "yaml":
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({"model": {"init_args": {group: options}}}))
        arguments = ["--config", str(file)]
    code, said = refused(capsys, "fit", "--config", tiny, *arguments)
    assert code in (1, 2)
    assert message in said
    assert len(said) < 400


def test_the_matrix_of_messages_has_every_group():
    for method, module in (("grpo", modules.GRPOModule), ("ppo", modules.PPOModule)):
        options = keyword_parameters(module)
        groups = {name for name, parameter in options.items() if is_dataclass(parameter.default)}
        assert groups == set(GROUPS_OF_METHODS[method])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3, "loss: 3 is not allowed: expected options of PolicyLoss, NAME: VALUE, or a class_path"),
        (None, "loss is None; it must be a PolicyLoss or a mapping of its options"),
        (
            {"class_path": f"{HERE}.MyLoss", "init_args": {"scal": 1}},
            "'loss.scal'; did you mean 'loss.scale'?",
        ),
        ({"class_path": f"{HERE}.MyLoss", "scale": 1}, "class_path stands next to other options"),
    ],
)
def test_mistakes_of_a_group_in_a_file(capsys, tmp_path, loss, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": {"init_args": {"loss": loss}}}))
    _, said = refused(capsys, "fit", "--config", TINY_GRPO, "--config", str(file))
    assert message in said
    assert len(said) < 400


def test_a_group_that_is_null(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {kl: null}}\n")
    code, said = refused(capsys, "fit", "--config", TINY_GRPO, "--config", str(file))
    assert code == 1
    assert said == "a group of options is null: leave it out, or write its options, NAME: VALUE"


def test_groups_are_set_with_and_without_init_args(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {loss: {delta: 5.0}, kl: {estimator: k2}}}\n")
    options = ["--model.loss.epsilon=0.3", "--model.init_args.loss.dual_clip=4.0", "--model.sampling.stop=[a, b]"]
    made = printed_config(capsys, "fit", "--config", TINY_GRPO, "--config", str(file), *options)["model"]["init_args"]
    loss = made["loss"]["init_args"]
    assert made["loss"]["class_path"] == "rlhf_lightning.rl.PolicyLoss"
    assert (loss["epsilon"], loss["delta"], loss["dual_clip"], loss["loss_type"]) == (0.3, 5.0, 4.0, "dapo")
    assert made["kl"] == {"estimator": "k2", "in_reward": False, "bias_correction": True}
    assert made["sampling"]["stop"] == ["a", "b"]
    # Without a config, and with a class of one's own.
    own = [f"--model.loss.class_path={HERE}.MyLoss", "--model.loss.scale=3", "--model.loss.epsilon=0.1"]
    args = ["--model=GRPOModule", "--model.model=x", "--model.rewards=[builtins.len]", "--data=PromptDataModule"]
    loss = printed_config(capsys, "fit", *args, "--data.train=x", *own)["model"]["init_args"]["loss"]
    assert loss["class_path"] == f"{HERE}.MyLoss"
    assert (loss["init_args"]["scale"], loss["init_args"]["epsilon"]) == (3.0, 0.1)


def test_options_of_groups_are_compared_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--config", "configs/grpo/tiny.yaml", "--trainer.logger=false", "--trainer.callbacks=null"]
    first = PostTrainingCLI(["fit", *args, "--model.loss.epsilon=0.1", "--trainer.max_steps=0"])
    first.trainer.save_checkpoint("last.ckpt")
    stored = torch.load("last.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["loss"]["epsilon"] == 0.1
    more = ["--model.loss.epsilon=0.2", f"--model.loss.class_path={HERE}.MyLoss", "--ckpt_path=last.ckpt"]
    expected = (
        rf"loss\.class_path='{HERE}\.MyLoss' \(the checkpoint: None\), loss\.epsilon=0\.2 \(the checkpoint: 0\.1\)$"
    )
    with pytest.warns(UserWarning, match=expected):
        PostTrainingCLI(["validate", *args, *more])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the checkpoint was made with.*")
        PostTrainingCLI(["validate", *args, "--model.loss.epsilon=0.1", "--ckpt_path=last.ckpt"])


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
