"""The reference is what the policy was when training began, whatever is trained besides an adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from rlhf_lightning import DPOModule
from rlhf_lightning.callbacks import ReferenceSync
from rlhf_lightning.sequences import Example, ExampleBatch, pack

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import pairs
from ..modules.naive import logps, sequences
from ..rl.fixed_rollouts import FixedGRPO, prompts, remainder

FAST = partial(torch.optim.SGD, lr=5.0)

# Weights that LoRA can train besides its low-rank matrices.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "drawn": {"init_lora_weights": False, "bias": "all"},
    "head": {"modules_to_save": ["lm_head"], "bias": "all"},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6, 7, 20, 21, 22, 30, 40]}},
    "some-layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "bias": "all"},
    "adapted-head": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    tied = {"tie_word_embeddings": True}
    return {
        "qwen2": str(save_tiny_model(place / "qwen2", "qwen2")),
        "qwen2-tied": str(save_tiny_model(place / "qwen2-tied", "qwen2", **tied)),
        "gpt2": str(save_tiny_model(place / "gpt2", "gpt2")),
    }


def reference_logps(module: DPOModule, rows: list[Example]) -> Tensor:
    with torch.no_grad():
        found = module.reference.rows(pack(rows))
    return torch.cat([found["ref_chosen_logps"], found["ref_rejected_logps"]])


def policy_logps(module: DPOModule, rows: list[Example]) -> Tensor:
    with torch.no_grad():
        found = module.grad_rows(pack(rows))
    return torch.cat([found["chosen_logps"], found["rejected_logps"]])


def own_logps(module: DPOModule, rows: list[Example]) -> Tensor:
    """The same by the policy's own forward, one sequence at a time: what an export computes elsewhere."""
    with torch.no_grad():
        own = [[logps(module.model, *sequence) for sequence in sequences(row)] for row in rows]
    return torch.tensor(own).T.flatten()


def train(module: DPOModule, rows: list[Example], steps: int = 3, **options: Any) -> lightning.Trainer:
    run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0, **options)
    run.fit(module, Batches(*[ExampleBatch(rows)] * steps))
    return run


TIED = [("qwen2-tied", option) for option in ("bias-all", "head", "embeddings", "tokens", "adapted-head")]


@pytest.mark.parametrize(("model", "option"), [("qwen2", option) for option in OPTIONS] + TIED)
def test_the_reference_stays_whatever_lora_trains(folders: dict[str, str], model: str, option: str) -> None:
    rows, lora = pairs(4), {"r": 2, **OPTIONS[option]}
    module = DPOModule(folders[model], lora=lora, optimizer=FAST, max_grad_norm=0.1)
    module.configure_model()
    begun, before = policy_logps(module, rows), {n: p.detach().clone() for n, p in module.named_parameters()}
    assert torch.allclose(reference_logps(module, rows), begun, rtol=1e-5)
    first = reference_logps(module, rows)
    train(module, rows)
    assert torch.equal(reference_logps(module, rows), first)  # bit for bit
    moved = policy_logps(module, rows)
    assert (moved - begun).abs().max() > 1e-2
    assert torch.allclose(moved, own_logps(module, rows), rtol=1e-4, atol=1e-4)
    # Everything that is trained has moved, and the reference has put back what the policy had become.
    trained = [n for n, p in module.named_parameters() if p.requires_grad and p.grad_fn is None]
    stuck = [n for n in trained if torch.equal(before[n], dict(module.named_parameters())[n])]
    assert all("original_module" in n or "lora_A" in n or "k_proj" in n for n in stuck), stuck


def test_what_somebody_unfreezes_besides_an_adapter_is_kept(folders: dict[str, str]) -> None:
    class TunedNorms(DPOModule):
        def configure_model(self) -> None:
            super().configure_model()
            for name, parameter in self.model.named_parameters():
                if "ln_" in name or "wpe" in name:
                    parameter.requires_grad_(True)

    rows = pairs(4)
    module = TunedNorms(folders["gpt2"], lora={"r": 2, "bias": "all"}, optimizer=FAST, max_grad_norm=0.1)
    module.configure_model()
    first = reference_logps(module, rows)
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    train(module, rows)
    assert torch.equal(reference_logps(module, rows), first)
    assert (policy_logps(module, rows) - first).abs().max() > 1e-2
    assert frozen == {n for n, p in module.named_parameters() if not p.requires_grad}  # scoring switches none of it


def test_it_stays_through_grpo_and_a_resume(folders: dict[str, str], tmp_path: Path) -> None:
    lora = {"r": 2, "bias": "all"}
    module = DPOModule(folders["gpt2"], lora=lora, optimizer=FAST, max_grad_norm=0.1)
    rows = pairs(4)
    run = train(module, rows)
    run.save_checkpoint(tmp_path / "end.ckpt")
    base = DPOModule(folders["gpt2"], lora=lora)
    base.configure_model()
    again = DPOModule(folders["gpt2"], lora=lora, optimizer=FAST, max_grad_norm=0.1)
    run = trainer("32-true", max_epochs=2, num_sanity_val_steps=0)
    run.fit(again, Batches(*[ExampleBatch(rows)] * 3), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=False)
    assert torch.equal(reference_logps(again, rows), reference_logps(base, rows))
    assert (policy_logps(again, rows) - policy_logps(module, rows)).abs().max() > 1e-3  # it continued

    options: dict[str, Any] = {"rewards": [remainder], "num_generations": 4, "max_completion_length": 10, "beta": 0.1}
    grpo = FixedGRPO(folders["gpt2"], lora=lora, optimizer=FAST, max_grad_norm=0.1, num_updates=2, **options)
    grpo.configure_model()
    batch = pack(rows)
    first = grpo.ref_logprobs(batch)
    trainer("32-true", max_epochs=1).fit(grpo, Batches(ExampleBatch(prompts(3))))
    assert torch.equal(grpo.ref_logprobs(batch), first)


@pytest.mark.parametrize("reference", ["auto", "frozen"])
def test_a_moving_reference_takes_biases_along_and_keeps_them(
    folders: dict[str, str], tmp_path: Path, reference: Any
) -> None:
    rows, lora = pairs(4), {"r": 2}
    first = DPOModule(folders["gpt2"], lora=lora, optimizer=FAST)
    train(first, rows)
    first.save_pretrained(str(tmp_path / "adapter"))

    class Biases(DPOModule):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                for name, parameter in self.model.named_parameters():
                    if name.endswith(".bias") and "lora" not in name:
                        parameter.requires_grad_(True)

    options: dict[str, Any] = {"optimizer": FAST, "max_grad_norm": 0.1, "reference": reference}
    if reference == "frozen":
        options["lora"] = {"r": 2, "bias": "all"}
    source = str(tmp_path / "adapter") if reference == "auto" else folders["gpt2"]
    build = (Biases if reference == "auto" else DPOModule)(source, **options)
    run = train(build, rows, callbacks=[ReferenceSync(alpha=1.0, every_n_steps=3)])
    assert torch.allclose(reference_logps(build, rows), policy_logps(build, rows), rtol=1e-5)  # moved onto the policy
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = (Biases if reference == "auto" else DPOModule)(source, **options)
    again.on_load_checkpoint(torch.load(tmp_path / "end.ckpt", weights_only=False))
    assert torch.equal(reference_logps(again, rows), reference_logps(build, rows))


def test_shards_cannot_be_exchanged(folders: dict[str, str]) -> None:
    module = DPOModule(folders["qwen2"], lora={"r": 2, "bias": "all"}, reference="adapter")
    module._trainer = lightning.Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match=r"^reference is 'adapter' with strategy 'fsdp2', but .*bias is trained .*"):
        module.configure_model()
    module = DPOModule(folders["qwen2"], lora={"r": 2, "bias": "all"})
    module._trainer = lightning.Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
    module.configure_model()
    assert type(module.references[0]).__name__ == "FrozenReference"
