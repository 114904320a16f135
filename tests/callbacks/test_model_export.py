"""Which model is exported, told by its weights; and that a folder is there whole or not at all."""

from __future__ import annotations

import json
from types import SimpleNamespace

import lightning
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.datamodules import PromptDataModule, SFTDataModule
from rlhf_lightning.models.critic import ValueModel
from rlhf_lightning.utils.files import MARKER, PARTIAL, REPLACED, hidden_sibling, mark

from ..rl.fixed_rollouts import FixedPPO, options

ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(8)]


class Recorder(lightning.Callback):
    """Keeps a copy of the weights at each validation, and replaces the metric by one given."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.weights: list[torch.Tensor] = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.weights.append(pl_module.model.get_input_embeddings().weight.detach().clone())
        pl_module.log("val/quality", self.values[len(self.weights) - 1])


def fit(folder, export, values, val=True):
    recorder = Recorder(values)
    module = SFTModule(str(folder), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[recorder, export],
        max_steps=len(values),
        val_check_interval=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, SFTDataModule(train=ROWS, val=ROWS if val else None, global_batch_size=2))
    return module, recorder


def embeddings(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_the_best_model_is_exported(tiny_model_folder, tmp_path, mode, best):
    export = ModelExport(str(tmp_path / "out/model"), monitor="val/quality", mode=mode)
    _, recorder = fit(tiny_model_folder(), export, [0.5, 0.75, 0.25, 0.75])  # of equals the first
    assert torch.equal(embeddings(tmp_path / "out/model"), recorder.weights[best])
    assert not torch.equal(recorder.weights[best], recorder.weights[3])
    record = json.loads((tmp_path / "out/model.json").read_text())
    assert record == {"step": best + 1, "monitor": "val/quality", "value": [0.5, 0.75, 0.25][best]}
    assert AutoTokenizer.from_pretrained(tmp_path / "out/model").eos_token == "<eos>"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "model.json"]


def test_without_a_metric_the_last_model_is_exported(tiny_model_folder, tmp_path):
    module, _ = fit(tiny_model_folder(), ModelExport(str(tmp_path / "model")), [0.0, 0.0])
    assert torch.equal(embeddings(tmp_path / "model"), module.model.get_input_embeddings().weight)
    assert json.loads((tmp_path / "model.json").read_text()) == {"step": 2, "monitor": None, "value": None}


def test_nan_is_never_the_best(tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "model"), monitor="val/quality", mode="max")
    fit(tiny_model_folder(), export, [float("nan"), 0.1])
    assert (export.best_value, export.step) == (pytest.approx(0.1), 2)


def test_a_metric_that_is_not_logged_is_named_with_the_logged_ones(tiny_model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"monitor is 'val/nonsense'.*logged: .*val/loss"):
        fit(tiny_model_folder(), ModelExport(str(tmp_path / "model"), monitor="val/nonsense", mode="min"), [0.0])
    assert not (tmp_path / "model").exists()


def test_a_metric_without_validation_is_an_error(tiny_model_folder, tmp_path):
    with pytest.raises(ValueError, match="monitor is 'val/loss', and there are no validation rows to measure it on"):
        fit(tiny_model_folder(), ModelExport(str(tmp_path / "model"), monitor="val/loss"), [0.0], val=False)


def test_a_resumed_run_keeps_a_better_model(tmp_path):
    first = ModelExport(str(tmp_path), monitor="m", mode="max")
    first.best_value, first.step = 0.9, 5
    second = ModelExport(str(tmp_path), monitor="m", mode="max")
    second.load_state_dict(first.state_dict())
    fitting = {"state": SimpleNamespace(fn="fit"), "sanity_checking": False}
    trainer = SimpleNamespace(**fitting, callback_metrics={"m": torch.tensor(0.8)})
    second.on_validation_end(trainer, None)  # would fail on the missing module if it were written
    assert (second.best_value, second.step) == (0.9, 5)


def test_mode_is_checked():
    with pytest.raises(ValueError, match="mode is 'best'; it must be max or min"):
        ModelExport("x", mode="best")


def export_run(folder, callbacks, *, steps, ckpt_path=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = SFTModule(str(folder), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        max_steps=steps,
        val_check_interval=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, SFTDataModule(train=ROWS, val=ROWS[:2], global_batch_size=2), ckpt_path=ckpt_path)
    return trainer, module


def test_an_export_every_few_steps_under_its_own_name(tiny_model_folder, tmp_path):
    export_run(tiny_model_folder(), [ModelExport(str(tmp_path / "out/at-{step}"), every_n_steps=2)], steps=3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["at-2", "at-2.json", "at-3", "at-3.json"]
    _, after_two = export_run(tiny_model_folder(), [], steps=2)
    assert torch.equal(embeddings(tmp_path / "out/at-2"), after_two.model.get_input_embeddings().weight)
    assert not torch.equal(embeddings(tmp_path / "out/at-2"), embeddings(tmp_path / "out/at-3"))


def test_one_folder_is_replaced_every_few_steps(tiny_model_folder, tmp_path):
    export = ModelExport(str(tmp_path / "model"), every_n_steps=2)
    _, module = export_run(tiny_model_folder(), [export], steps=4)
    assert json.loads((tmp_path / "model.json").read_text())["step"] == 4
    assert torch.equal(embeddings(tmp_path / "model"), module.model.get_input_embeddings().weight)


def test_several_exports_in_one_trainer(tiny_model_folder, tmp_path):
    """Adapter alone, merged, best and last: each keeps its own state, also in a checkpoint."""

    def callbacks():
        return [
            ModelExport(str(tmp_path / "adapter")),
            ModelExport(str(tmp_path / "merged"), merge_adapter=True),
            ModelExport(str(tmp_path / "best"), monitor="val/loss", mode="max"),
            ModelExport(str(tmp_path / "lowest"), monitor="val/loss", mode="min"),
        ]

    first = callbacks()
    trainer, module = export_run(tiny_model_folder(), first, steps=3, lora={"r": 2, "init_lora_weights": False})
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    assert not (tmp_path / "adapter/model.safetensors").exists()
    assert (tmp_path / "merged/model.safetensors").is_file()
    layer = module.model.get_base_model().model.layers[0].mlp.up_proj
    with torch.no_grad():
        expected = (
            layer.base_layer.weight
            + layer.scaling["default"] * layer.lora_B.default.weight @ layer.lora_A.default.weight
        )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(merged.model.layers[0].mlp.up_proj.weight, expected, atol=1e-6)
    states = [callback.state_dict() for callback in first]
    assert len({callback.state_key for callback in first}) == 4
    assert first[2].best_value > first[3].best_value
    second = callbacks()
    export_run(
        tiny_model_folder(), second, steps=3, ckpt_path=tmp_path / "x.ckpt", lora={"r": 2, "init_lora_weights": False}
    )
    assert [callback.state_dict() for callback in second] == states


def test_a_run_that_was_killed_before_its_export_makes_up_for_it(tiny_model_folder, tmp_path):
    trainer, module = export_run(tiny_model_folder(), [], steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    export_run(tiny_model_folder(), [ModelExport(str(tmp_path / "model"))], steps=2, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(embeddings(tmp_path / "model"), module.model.get_input_embeddings().weight)


def test_what_a_killed_export_left_is_cleaned_up(tiny_model_folder, tmp_path):
    """Killed while writing, and between the two renames."""
    for name, suffix in (("new", PARTIAL), ("at-7", REPLACED), ("at-9", PARTIAL)):
        left = hidden_sibling(tmp_path / name, suffix)
        left.mkdir()
        (left / "config.json").write_text("{}")
        mark(left, "model")
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda found: found))
    for folder in ("new", "at-{step}"):
        callback = ModelExport(str(tmp_path / folder))
        callback.setup(trainer, None, "fit")
        callback.teardown(trainer, None, "fit")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert found == ["at-7", f"at-7/{MARKER}", "at-7/config.json"]


def test_what_another_run_is_writing_is_left(tmp_path):
    """Folders whose names begin alike, of runs side by side."""
    theirs = [hidden_sibling(tmp_path / name, PARTIAL) for name in ("at-best", "at-large-7")]
    for left in theirs:
        left.mkdir()
        mark(left, "model")
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda found: found))
    callback = ModelExport(str(tmp_path / "at-{step}"))
    callback.setup(trainer, None, "fit")
    callback.teardown(trainer, None, "fit")
    assert all((left / MARKER).is_file() for left in theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0; it must be a whole number of at least 1, or null"),
        ({"every_n_steps": 3, "monitor": "val/loss"}, "every_n_steps is 3 and monitor is 'val/loss': remove one"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ModelExport("x", **options)


def test_the_critic_is_written_with_the_policy(tiny_model_folder, tmp_path):
    folder = str(tiny_model_folder())
    export = ModelExport(str(tmp_path / "model"), critic_folder=str(tmp_path / "critic-{step}"))
    module = FixedPPO(folder, **options(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[export],
        max_steps=4,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, PromptDataModule(train=[{"prompt": "1+1="}, {"prompt": "2="}], global_batch_size=2))
    found = ValueModel.from_pretrained(tmp_path / f"critic-{trainer.global_step}")
    assert torch.equal(found.head.weight, module.critic.head.weight)
    assert bool(found.head.weight.any())
    assert torch.equal(found.model.get_input_embeddings().weight, module.model.get_input_embeddings().weight)


def test_the_home_folder_is_one_place(tiny_model_folder, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="give the critic one of its own"):
        ModelExport("~/x", critic_folder=str(tmp_path / "home/x"))
    export_run(tiny_model_folder(), [ModelExport("~/model")], steps=1)
    assert list((tmp_path / "work").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["model", "model.json"]


def test_what_has_no_critic_to_write(tiny_model_folder, tmp_path):
    with pytest.raises(ValueError, match="critic_folder is 'x', and so is folder"):
        ModelExport("x", critic_folder="x")
    export = ModelExport(str(tmp_path / "model"), critic_folder=str(tmp_path / "critic"))
    with pytest.raises(ValueError, match="and SFTModule has no critic: remove it, or train with PPOModule"):
        export_run(tiny_model_folder(), [export], steps=1)
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic/mine.txt").write_text("mine")
    module = FixedPPO(str(tiny_model_folder()), **options(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="critic"):
        export.on_fit_start(SimpleNamespace(global_step=0, fast_dev_run=False), module)
    assert (tmp_path / "critic/mine.txt").read_text() == "mine"
