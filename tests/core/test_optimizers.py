"""Groups of parameters with learning rates of their own."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch

from rlhf_lightning import DPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.datamodules import SFTDataModule

from ..invariance.harness import trainer

SGD = partial(torch.optim.SGD, lr=1.0)


def rates(module: Any) -> dict[str, float]:
    """The learning rate of every trained parameter, by name."""
    module._trainer = trainer("32-true")
    module.configure_model()
    optimizer = module.configure_optimizers()
    names = {id(p): name for name, p in module.named_parameters()}
    groups = optimizer.param_groups
    assert len({id(p) for group in groups for p in group["params"]}) == sum(len(group["params"]) for group in groups)
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert set(found) == {name for name, p in module.named_parameters() if p.requires_grad}
    return found


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Any) -> str:
    return str(tiny_model_folder("llama"))


def test_the_first_pattern_that_is_found_counts(folder: str) -> None:
    found = rates(SFTModule(folder, optimizer=SGD, lr_ratios={r"layers\.0\.mlp": 0.5, "mlp|norm": 3.0}))
    for name, rate in found.items():
        expected = 0.5 if "layers.0.mlp" in name else 3.0 if "mlp" in name or "norm" in name else 1.0
        assert rate == expected, name
    assert set(found.values()) == {0.5, 1.0, 3.0}


def test_lower_layers_learn_more_slowly(folder: str) -> None:
    found = rates(SFTModule(folder, optimizer=SGD, layer_lr_decay=0.5))
    layers = 1 + max(int(number) for number in re.findall(r"layers\.(\d+)\.", " ".join(found)))
    assert layers >= 2
    for name, rate in found.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        depth = layers if "embed_tokens" in name else layers - 1 - int(layer[1]) if layer else 0
        assert rate == 0.5**depth, name


def test_adapters_and_heads_have_theirs(folder: str) -> None:
    found = rates(DPOModule(folder, optimizer=SGD, lora={"r": 2}, lr_ratios={"lora_B": 4.0}, layer_lr_decay=0.5))
    layers = 1 + max(int(number) for number in re.findall(r"layers\.(\d+)\.", " ".join(found)))
    for name, rate in found.items():
        depth = layers - 1 - int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
        assert rate == 0.5**depth * (4.0 if "lora_B" in name else 1.0), name
    heads = rates(RewardModule(folder, optimizer=SGD, lr_ratios={"head": 10.0}))
    assert {name: rate for name, rate in heads.items() if rate == 10.0}.keys() == {n for n in heads if "head" in n}


def test_ratios_multiply_those_of_the_critic_and_weight_decay_stays_apart(folder: str) -> None:
    build = partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1)
    module = PPOModule(
        folder, rewards=[len], optimizer=build, value={"lr_ratio": 3.0}, lr_ratios={"critic|head": 2.0, "norm": 5.0}
    )
    found = rates(module)
    critics = {name for name, p in module.named_parameters() if any(p is q for q in module.critic.parameters())}
    assert critics
    assert {found[name] for name in critics} == {6.0}
    assert {rate for name, rate in found.items() if "norm" in name and name not in critics} == {5.0}
    decays = {
        name: group["weight_decay"]
        for group in module.configure_optimizers().param_groups
        for name, p in module.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert {decays[name] for name in decays if "norm" in name} == {0.0}
    assert {decays[name] for name in decays if name.endswith("proj.weight")} == {0.1}


def test_schedules_keep_ratios_and_the_logged_rate_is_the_optimizers(folder: str) -> None:
    module = SFTModule(
        folder,
        optimizer=SGD,
        lr_ratios={"embed_tokens": 0.25},
        lr_scheduler=partial(WarmupSchedule, warmup_steps=0, total_steps=4, decay="linear"),
    )
    module._trainer = trainer("32-true")
    module.configure_model()
    configured: Any = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(2):
        optimizer.step()
        schedule.step()
        first, second = optimizer.param_groups
        assert second["lr"] == pytest.approx(0.25 * first["lr"])
    assert 0 < first["lr"] < 1.0


def test_without_ratios_there_is_one_group(folder: str) -> None:
    for options in ({}, {"layer_lr_decay": 1.0}, {"lr_ratios": {"mlp": 1.0}}):
        module = SFTModule(folder, optimizer=SGD, **options)
        module._trainer = trainer("32-true")
        module.configure_model()
        assert len(module.configure_optimizers().param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_ratios": {"(mlp": 1.0}}, "lr_ratios has '(mlp', which is no regular expression"),
        ({"lr_ratios": {"mlp": 0.0}}, "lr_ratios['mlp'] is 0.0; it must be above 0"),
        ({"layer_lr_decay": 0.0}, "layer_lr_decay is 0.0; it must be above 0"),
        ({"layer_lr_decay": 1.5}, "layer_lr_decay is 1.5; it must be at most 1"),
    ],
)
def test_ranges(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        SFTModule(folder, **options)
    assert "\n" not in str(error.value)


def test_a_pattern_that_matches_nothing_is_an_error(folder: str) -> None:
    with pytest.raises(ValueError, match=r"lr_ratios has 'lm_haed', which matches no trained parameter \(such as "):
        rates(SFTModule(folder, lr_ratios={"mlp": 2.0, "lm_haed": 0.1}))
    with pytest.raises(ValueError, match=r"lr_ratios has 'mlp\.\*weight', which matches no trained"):
        rates(SFTModule(folder, lora={"r": 2, "target_modules": ["q_proj"]}, lr_ratios={"mlp.*weight": 2.0}))


def test_a_checkpoint_of_other_groups_is_refused(folder: str, tmp_path: Any) -> None:
    rows = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(8)]

    def fit(path: str | None, steps: int, **options: Any) -> Any:
        module = SFTModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-3), **options)
        run = trainer("32-true", max_steps=steps)
        run.fit(module, datamodule=SFTDataModule(train=rows, global_batch_size=2), ckpt_path=path)
        return module, run

    ratios = {"embed_tokens": 0.25}
    _, first = fit(None, 2, lr_ratios=ratios, layer_lr_decay=0.5)
    path = str(tmp_path / "last.ckpt")
    first.save_checkpoint(path)
    resumed, run = fit(path, 4, lr_ratios=ratios, layer_lr_decay=0.5)
    whole, _ = fit(None, 4, lr_ratios=ratios, layer_lr_decay=0.5)
    for (name, one), two in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3
    for other in ({"lr_ratios": ratios}, {"lr_ratios": {"embed_tokens": 0.5}, "layer_lr_decay": 0.5}):
        with pytest.raises(ValueError, match="the checkpoint's optimizer was made with l"):
            fit(path, 4, **other)
