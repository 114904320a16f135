"""Contents of checkpoints, refusals, and random states."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning import DPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.callbacks import ReferenceSync
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.core.resume import _derived_state, random_state, set_random_state
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule

PAIRS = [{"prompt": f"{n}=?", "chosen": f"#{n}", "rejected": f"#{n + 1} no"} for n in range(6)]
ROWS = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(6)]
LORA = {"r": 2}


def fit(module: PostTrainingModule, *, steps: int = 2, ckpt_path: Any = None, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    pairs = not isinstance(module, SFTModule)
    data = (PreferenceDataModule if pairs else SFTDataModule)(train=PAIRS if pairs else ROWS, global_batch_size=2)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def saved(module: PostTrainingModule, path: Path, **options: Any) -> dict[str, Any]:
    fit(module, **options).save_checkpoint(path)
    return torch.load(path, weights_only=True)


def tensors(value: Any) -> int:
    """Numbers in all tensors of a nested structure."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensors(part) for part in parts)


@pytest.mark.parametrize("reference", ["adapter", "frozen"])
def test_an_adapters_checkpoint_holds_the_adapter_and_its_optimizer(tiny_model_folder, tmp_path, reference):
    module = DPOModule(str(tiny_model_folder()), lora=LORA, reference=reference)
    checkpoint = saved(module, tmp_path / "x.ckpt")
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert checkpoint["state_dict"].keys() == trained.keys()
    count = sum(p.numel() for p in trained.values())
    # Adam keeps two numbers for each weight, and how many steps it has made for each tensor.
    assert tensors(checkpoint["optimizer_states"]) == 2 * count + len(trained)
    assert tensors(checkpoint["reference"]) == 0
    everything = sum(p.numel() for p in module.parameters())
    assert count < everything / 4


def test_a_reward_models_head_is_in_the_checkpoint_of_its_adapter(tiny_model_folder, tmp_path):
    module = RewardModule(str(tiny_model_folder()), lora=LORA)
    state = saved(module, tmp_path / "x.ckpt")["state_dict"]
    assert {"head.weight"} <= {name for name in state if "lora" not in name} <= set(module.state_dict())
    assert torch.equal(state["head.weight"], module.head.weight)
    again = RewardModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.head.weight, module.head.weight)


def test_a_whole_models_checkpoint_holds_it_once(tiny_model_folder, tmp_path):
    checkpoint = saved(DPOModule(str(tiny_model_folder())), tmp_path / "x.ckpt")
    assert checkpoint["reference"].get("weights", {}) == {}
    moved = DPOModule(str(tiny_model_folder()))
    checkpoint = saved(moved, tmp_path / "y.ckpt", callbacks=[ReferenceSync(alpha=0.5, every_n_steps=1)])
    weights = dict(moved.references[0].model.named_parameters())
    assert checkpoint["reference"]["weights"].keys() >= weights.keys()


def test_a_moved_reference_stays_in_checkpoints_when_nothing_moves_it_any_more(tiny_model_folder, tmp_path):
    """Resumed without the callback, the reference still cannot be rebuilt from the model's folder."""
    folder = str(tiny_model_folder())
    module = SFTModule(folder, lora=LORA)
    fit(module)
    module.save_pretrained(str(tmp_path / "adapter"))
    for source, options in ((folder, {"lora": LORA, "reference": "frozen"}), (str(tmp_path / "adapter"), {})):
        first = DPOModule(source, **options)
        sync = ReferenceSync(alpha=1.0, every_n_steps=1)
        checkpoint = saved(first, tmp_path / "x.ckpt", callbacks=[sync])
        weights = checkpoint["reference"]["weights"]
        assert weights
        assert all("lora" in name for name in weights), "the frozen part is not saved"
        second = DPOModule(source, **options)
        again = saved(second, tmp_path / "y.ckpt", steps=3, ckpt_path=tmp_path / "x.ckpt")["reference"]["weights"]
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_checkpoints_load_on_frozen_weights_of_every_kind(tiny_model_folder, tmp_path, quantization, recwarn):
    """Four steps, and two that are resumed; quantised layers have constants of their own to trip over."""

    def make() -> SFTModule:
        lightning.seed_everything(0, verbose=False)
        return SFTModule(str(tiny_model_folder()), lora=LORA, quantization=quantization)

    whole = make()
    expected = saved(whole, tmp_path / "x.ckpt", steps=4)["state_dict"]
    assert all("lora" in name for name in expected)
    stored = saved(make(), tmp_path / "half.ckpt", steps=2)["state_dict"]
    resumed = make()
    fit(resumed, steps=4, ckpt_path=tmp_path / "half.ckpt")
    found = resumed.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(torch.equal(stored[name], expected[name]) for name in expected)
    recwarn.clear()
    loaded = SFTModule.load_from_checkpoint(tmp_path / "half.ckpt").state_dict()
    assert not [w for w in recwarn if "Found keys" in str(w.message)]
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_a_state_dict_of_something_else_is_refused(tiny_model_folder):
    module = SFTModule(str(tiny_model_folder()), lora=LORA)
    module.configure_model()
    state = {name: p for name, p in module.named_parameters() if p.requires_grad}
    module.load_state_dict(state)
    state["more"] = state.popitem()[1]
    with pytest.raises(RuntimeError, match=r"lacks \['model.*'\] and has \['more'\] too many"):
        module.load_state_dict(state)


def refused(module: PostTrainingModule, path: Path) -> str:
    with pytest.raises(ValueError, match="checkpoint") as error:
        fit(module, steps=3, ckpt_path=path)
    said = str(error.value)
    assert "\n" not in said
    return said


def test_another_configuration_is_refused_in_a_line(tiny_model_folder, tmp_path):
    folder = str(tiny_model_folder())
    fit(SFTModule(folder, lora=LORA)).save_checkpoint(tmp_path / "lora.ckpt")
    fit(SFTModule(folder)).save_checkpoint(tmp_path / "full.ckpt")
    assert "holds a LoRA adapter alone, and this run trains all weights" in refused(
        SFTModule(folder), tmp_path / "lora.ckpt"
    )
    assert "holds a whole model, and this run trains a LoRA adapter: remove lora" in refused(
        SFTModule(folder, lora=LORA), tmp_path / "full.ckpt"
    )
    said = refused(SFTModule(folder, lora={"r": 4}), tmp_path / "lora.ckpt")
    assert "has the shape [2, 32] there and [4, 32] here" in said
    said = refused(SFTModule(folder, lora={"r": 2, "target_modules": ["q_proj"]}), tmp_path / "lora.ckpt")
    assert "of its weights are not in this model, the first 'model." in said
    said = refused(SFTModule(folder, lora=LORA, quantization="nf4"), tmp_path / "lora.ckpt")
    assert "quantization=None" in said
    assert "quantization=nf4" in said
    with pytest.raises(ValueError, match="holds a LoRA adapter alone"):
        SFTModule.load_from_checkpoint(tmp_path / "lora.ckpt", lora=None)


def test_an_adapter_is_not_put_on_other_weights(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder(), tmp_path / "base")
    fit(SFTModule(str(tmp_path / "base"), lora=LORA)).save_checkpoint(tmp_path / "x.ckpt")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    fit(SFTModule(str(tmp_path / "moved"), lora=LORA), steps=3, ckpt_path=tmp_path / "x.ckpt")  # a copy is the same
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    said = refused(SFTModule(str(tmp_path / "base"), lora=LORA), tmp_path / "x.ckpt")
    assert "are not the base that the checkpoint's adapter was trained on" in said
    assert str(tmp_path / "base") in said


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_adapters_stay_in_fp32_under_half_precision(tiny_model_folder, tmp_path, precision):
    """Weights near 1 and a step of 1e-4: bf16 and fp16 could not tell the result from the start."""
    seen: dict[str, torch.Tensor] = {}

    class Near(SFTModule):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                with torch.no_grad():
                    for name, p in self.named_parameters():
                        if "lora_A" in name:
                            p.fill_(1.0 + 2**-20)
                            seen[name] = p

    make = lambda: Near(str(tiny_model_folder()), lora=LORA, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))  # noqa: E731
    checkpoint = saved(make(), tmp_path / "x.ckpt", precision=precision, steps=1)
    state = {name: value for name, value in checkpoint["state_dict"].items() if "lora" in name}
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(float(v.flatten()[0]) == 1.0 + 2**-20 for n, v in state.items() if "lora_A" in n)
    frozen = {p.dtype for p in make_model_dtypes(make, precision)}
    assert frozen == {torch.bfloat16 if precision == "bf16-true" else torch.float16}
    # A checkpoint's tensors come back unrounded, although it is loaded before Lightning converts the module.
    resumed = make()
    with torch.no_grad():
        for value in checkpoint["state_dict"].values():
            value.add_(2**-19)
    torch.save(checkpoint, tmp_path / "y.ckpt")
    fit(resumed, precision=precision, steps=2, ckpt_path=tmp_path / "y.ckpt")
    found = {n: p for n, p in resumed.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[name], checkpoint["state_dict"][name]) for name in found)
    assert resumed.to("cpu") is resumed


def make_model_dtypes(make: Any, precision: str) -> list[torch.nn.Parameter]:
    module = make()
    fit(module, precision=precision, steps=1)
    return [p for p in module.parameters() if not p.requires_grad]


def test_random_states_come_back(tmp_path):
    device = torch.device("cpu")
    np.random.randn()  # leaves a number in reserve
    torch.save(random_state(device), tmp_path / "state.pt")
    draw = lambda: (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1))  # noqa: E731
    expected = draw()
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), device)
        assert draw() == expected


def test_a_rank_that_was_not_there_gets_a_state_of_its_own():
    torch.manual_seed(0)
    state = random_state(torch.device("cpu"))
    draws = []
    for rank in (1, 2, 1):
        set_random_state(_derived_state(state, rank), torch.device("cpu"))
        draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert draws[0] == draws[2]
    assert len({value for draw in draws for value in draw}) == 6


def test_a_critic_with_an_adapter_is_saved_by_its_adapter(tiny_model_folder):
    module = PPOModule(
        str(tiny_model_folder()), rewards=["builtins.len"], lora=LORA, value={"model": str(tiny_model_folder())}
    )
    module.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained <= checkpoint["state_dict"].keys()
    assert not any("base_layer" in name for name in checkpoint["state_dict"])
