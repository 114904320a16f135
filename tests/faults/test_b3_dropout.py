"""Dropout: off in policy and reward methods, so that a policy begins as its own reference; one option for all rates."""

from __future__ import annotations

import math
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning import DPOModule, KTOModule, RewardModule, SFTModule, SimPOModule
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.distributed.fsdp2 import check_runs_all_layers
from rlhf_lightning.models.dropout import layerdrop_rate
from rlhf_lightning.sequences import Example, ExampleBatch, pack

from ..helpers import MAX_POSITIONS, VOCAB_SIZE, char_tokenizer, save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, labelled, pairs
from ..rl.fixed_rollouts import FixedGRPO, FixedPPO, picky, prompts, remainder
from . import rank_jobs

STILL = partial(torch.optim.SGD, lr=0.0)
BUDGETS = (1, 40, 8192)

# Every way in which a model of transformers is random in training: modules, functions, rates that are read from the
# config in every forward pass, layers that are skipped, noise on a router.
RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gptj": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "resid_pdrop": 0.3,
        "embd_pdrop": 0.3,
        "attn_pdrop": 0.3,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "layerdrop": 0.5,
    },
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout": 0.3,
        "attention_dropout": 0.3,
    },
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "attention_dropout": 0.3,
        "router_jitter_noise": 0.3,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    for kind, options in RANDOM.items():
        sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_POSITIONS, "initializer_range": 0.2}
        tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        config = AutoConfig.for_model(kind, **sizes, **tokens, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(place / kind)
        char_tokenizer().save_pretrained(place / kind)
    return {kind: str(place / kind) for kind in RANDOM}


def first_step(module: PostTrainingModule, rows: list[Example]) -> dict[str, float]:
    run = trainer("32-true", max_steps=100, max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, Batches(ExampleBatch(rows)))
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"lora": {"r": 2, "lora_dropout": 0.5}}, {"gradient_checkpointing": True}])
def test_dpo_begins_at_log_2_for_every_budget(folders: dict[str, str], options: dict[str, Any], budget: int) -> None:
    module = DPOModule(folders["gpt2"], optimizer=STILL, micro_batch_tokens=budget, **options)
    assert first_step(module, pairs(4))["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", RANDOM)
def test_dpo_begins_at_log_2_whatever_is_random(folders: dict[str, str], kind: str) -> None:
    for checkpointing in (False, True):
        module = DPOModule(folders[kind], optimizer=STILL, gradient_checkpointing=checkpointing)
        assert first_step(module, pairs(3))["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_on_policy_methods_begin_at_ratio_1(folders: dict[str, str], budget: int) -> None:
    rewards: dict[str, Any] = {"rewards": [remainder, picky], "num_generations": 4, "max_completion_length": 10}
    common = {"optimizer": STILL, "micro_batch_tokens": budget, "num_updates": 2, **rewards}
    found = first_step(FixedGRPO(folders["gpt2"], beta=0.1, **common), prompts(3))
    assert found["train/clip_ratio/region_mean"] == 0
    assert found["train/kl"] == pytest.approx(0, abs=1e-9)
    for value_model in (None, folders["gpt2"]):
        found = first_step(FixedPPO(folders["gpt2"], value={"model": value_model}, **common), prompts(3))
        assert found["train/policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert found["train/policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
        assert found["train/value/clip_frac"] == found["train/policy/clip_frac"] == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_kto_begins_where_policy_and_reference_agree(folders: dict[str, str], budget: int) -> None:
    module = KTOModule(folders["gpt2"], optimizer=STILL, micro_batch_tokens=budget)
    found = first_step(module, labelled(5))
    assert found["train/loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert found["train/kl"] == pytest.approx(0, abs=1e-5)


def test_methods_without_reference_do_not_depend_on_the_budget_either(folders: dict[str, str]) -> None:
    for build, rows in ((SimPOModule, pairs(4)), (RewardModule, pairs(4)), (partial(SFTModule, dropout=0.0), pairs(4))):
        losses = [
            first_step(build(folders["gpt2"], optimizer=STILL, micro_batch_tokens=budget), rows)["train/loss"]
            for budget in BUDGETS
        ]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_what_switches_modes_does_not_bring_dropout_back(folders: dict[str, str]) -> None:
    module = DPOModule(folders["gpt2"], gradient_checkpointing=True)
    batch = pack(pairs(3))
    module.configure_model()
    for switch in (module.train, module.unfreeze, lambda: module.eval().train()):
        switch()
        once, again = (module.grad_rows(batch)["chosen_logps"].detach() for _ in range(2))
        assert module.training
        assert torch.equal(once, again)
    module.model.train()  # by hand, on the model itself: undone before the next step
    assert first_step(module, pairs(3))["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_checkpointed_layers_recompute_their_own_mode(folders: dict[str, str]) -> None:
    """Activations of layers are not kept, and the gradient is that of the same function."""
    found = []
    for checkpointing in (False, True):
        module = DPOModule(folders["opt"], gradient_checkpointing=checkpointing)
        module.configure_model()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = module.grad_rows(pack(pairs(3)))["chosen_logps"].sum()
        loss.backward()
        found.append((sum(saved), module.model.model.decoder.layers[0].fc1.weight.grad))
    (kept, plain), (kept_less, recomputed) = found
    assert kept_less < 0.7 * kept
    assert torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-7)


def rates(module: nn.Module) -> set[float]:
    """Rates as the model's own forward meets them, seen by what is called in training."""
    seen: set[float] = set()
    real = nn.functional.dropout, nn.functional.scaled_dot_product_attention

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        seen.add(float(p) if training else 0.0)
        return real[0](input, p, training, inplace)

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.add(float(kwargs.get("dropout_p", 0.0)))
        return real[1](*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", dropout)
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        module.grad_rows(pack(demonstrations(3)))
    return seen


@pytest.mark.parametrize("kind", RANDOM)
def test_one_option_overrides_every_rate(folders: dict[str, str], kind: str) -> None:
    for given, expected in ((None, {0.3}), (0.0, {0.0}), (0.1, {0.1})):
        module = SFTModule(folders[kind], dropout=given, share_prefix=False)
        module.configure_model()
        torch.manual_seed(1)  # a layer that is skipped shows no rate
        assert rates(module) - {0.0} == expected - {0.0}
    if kind == "opt":
        assert module.model.model.decoder.layerdrop == 0
    written = module.model.config.to_dict()
    original = AutoConfig.from_pretrained(folders[kind]).to_dict()
    assert {k: v for k, v in written.items() if "drop" in k} == {k: v for k, v in original.items() if "drop" in k}


def test_the_option_reaches_adapters_of_either_kind(folders: dict[str, str], tmp_path: Path) -> None:
    first = SFTModule(folders["gpt2"], lora={"r": 2, "lora_dropout": 0.0}, dropout=0.2)
    first.configure_model()
    layer = first.model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_dropout["default"].p == 0.2
    first.save_pretrained(str(tmp_path / "adapter"))
    again = SFTModule(str(tmp_path / "adapter"), dropout=0.4)
    again.configure_model()
    assert again.model.base_model.model.transformer.h[0].attn.c_attn.lora_dropout["default"].p == 0.4
    assert again.model.peft_config["default"].lora_dropout == 0.0  # as it was written


def test_policy_methods_drop_where_they_are_asked_to(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path, "gpt2"))
    module = DPOModule(folder, dropout=0.5, optimizer=STILL)
    found = first_step(module, pairs(4))
    assert abs(found["train/loss"] - math.log(2)) > 1e-4
    batch = pack(pairs(4))
    reference = [module.reference.rows(batch)["ref_chosen_logps"] for _ in range(2)]
    assert torch.equal(*reference)  # whatever the policy does


@pytest.mark.parametrize("value", [-0.1, 1.0, "0.1", True])
def test_a_rate_out_of_range_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^dropout is .*; it must be in \[0, 1\)"):
        SFTModule("model", dropout=value)


@pytest.mark.parametrize(
    ("build", "rate"),
    [
        (SFTModule, 0.5),
        (partial(SFTModule, lora={"r": 2}), 0.5),
        (partial(SFTModule, dropout=0.0), 0.0),
        (partial(SFTModule, dropout=0.1), 0.0),
        (partial(SFTModule, gradient_checkpointing=True, dropout=0.1), 0.0),
        (DPOModule, 0.0),
        (partial(DPOModule, gradient_checkpointing=True), 0.0),
    ],
)
def test_which_models_skip_layers_as_they_are_trained(folders: dict[str, str], build: Any, rate: float) -> None:
    module = build(folders["opt"])
    module.configure_model()
    assert layerdrop_rate(module) == rate
    if rate:
        with pytest.raises(ValueError, match=r"OPTForCausalLM skips layers at random \(layerdrop 0.5\)") as error:
            check_runs_all_layers(module.model)
        assert "\n" not in str(error.value)
        module.eval()  # as in validation
    check_runs_all_layers(module.model)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_share_weights_run_all_layers_or_refuse(folders: dict[str, str], tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([rank_jobs.__name__])

    def ended(strategy: str, dropout: float | None) -> list[tuple[int | None, Any]]:
        place = tmp_path / f"{strategy}-{dropout}"
        place.mkdir()
        job = "layerdrop_rate"
        return rank_jobs.outcomes(
            rank_jobs.start(processes, job, Path(folders["opt"]), place, strategy, dropout), place
        )

    for code, message in ended("fsdp2", None):
        assert code == 1
        assert "skips layers at random (layerdrop 0.5)" in message
        assert "(--model.dropout=0.1)" in message
    assert ended("fsdp2", 0.1) == [(0, 3)] * 2
    assert ended("ddp", None) == [(0, 3)] * 2
