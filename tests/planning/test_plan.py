"""Plans are what runs of the methods allocate on a pretended GPU; the command prints them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import DPOModule, GRPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.cli import main
from rlhf_lightning.models.memory import activation_bytes, cast_bytes, trained_weights, weight_bytes
from rlhf_lightning.planning import Plan, plan
from rlhf_lightning.planning.plan import decoder_of, largest
from rlhf_lightning.sequences import ExampleBatch, SequenceBatch

from ..gpu.pretended import OnPretended
from ..helpers import save_tiny_model
from ..invariance.harness import Batches
from ..invariance.methods import METHODS
from .device_memory import counted_cuda
from .test_memory import blocks_of

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama", initializer_range=0.05, **sizes))


class Run(NamedTuple):
    """Returns the bytes of a second step: before its backward pass, and at most; with its batch."""

    before: int
    peak: int
    batch: SequenceBatch


def run(name: str, folder: str, precision: str, rows: int = 20, **options: Any) -> Run:
    method = METHODS[name]
    given = {key: value for key, value in method.options.items() if key != "optimizer"}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    found: list[Run] = []
    batches: list[SequenceBatch] = []
    with counted_cuda() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = method.module(folder, **given, micro_batch_tokens=1 << 20, **options)
        packed, backward = module.micro_batching.pack, module.manual_backward

        def pack(examples: Any) -> SequenceBatch:
            batches.append(packed(examples))
            return batches[-1]

        def manual_backward(loss: Any) -> None:
            before = memory.peak = memory.now
            backward(loss)
            found.append(Run(before, memory.peak, batches[-1]))

        module.micro_batching.pack, module.manual_backward = pack, manual_backward
        batch = ExampleBatch(method.rows(rows))
        trainer = lightning.Trainer(
            strategy=OnPretended(), precision=precision, max_epochs=1, num_sanity_val_steps=0, **quiet
        )
        trainer.fit(module, Batches(batch, batch))
    assert len(found) == 2
    return found[-1]


def held(planned: Plan, folder: str, batch: SequenceBatch) -> float:
    """Returns the planned bytes before a backward pass, with the scored tokens and blocks of a batch."""
    decoder, training = decoder_of(folder), planned.training
    blocks = blocks_of(batch) if training.attention == "blocks" else None
    kept = activation_bytes(decoder, training, batch.num_tokens, scored=len(batch.target_ids), blocks=blocks)
    models = [
        part.size for part in planned.parts if part.what.startswith(("weights", "optimizer", "reference", "rows"))
    ]
    return sum(models) + kept.layers + kept.ends + cast_bytes(decoder, training)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["auto", "blocks"])
@pytest.mark.parametrize(
    "name", ["sft", "dpo", pytest.param("grpo", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)]
)
def test_plans_are_what_steps_allocate(name: str, attention: str, checkpointing: bool, folder: str) -> None:
    options = {"attention": attention, "gradient_checkpointing": checkpointing}
    found = run(name, folder, "bf16-mixed", **options)
    everything = {"model": folder, **METHODS[name].options, **options}
    planned = plan(METHODS[name].module, everything, "bf16-mixed", tokens=found.batch.num_tokens)
    assert planned.training.attention == ("cascade" if attention == "auto" else "blocks")
    assert found.before == pytest.approx(held(planned, folder, found.batch), rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_peak_is_the_plans_total(name: str, precision: str, folder: str) -> None:
    found = run(name, folder, precision)
    tokens = found.batch.num_tokens
    planned = plan(METHODS[name].module, {"model": folder}, precision, tokens=tokens)
    assert planned.training.attention == ("blocks" if precision == "32-true" else "cascade")
    assert 0.8 * planned.total < found.peak < 1.05 * planned.total


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_plans_of_sampled_rows_are_what_steps_allocate(name: str, folder: str) -> None:
    found = run(name, folder, "bf16-mixed", rows=12)
    options = {"model": folder, **METHODS[name].options}
    planned = plan(METHODS[name].module, options, "bf16-mixed", tokens=found.batch.num_tokens)
    assert found.before == pytest.approx(held(planned, folder, found.batch), rel=0.05)


@pytest.mark.slow
def test_a_critic_of_its_own_counts_twice(folder: str) -> None:
    found = run("ppo", folder, "bf16-mixed", value={"model": folder})
    options = {"model": folder, **METHODS["ppo"].options, "value": {"model": folder}}
    planned = plan(PPOModule, options, "bf16-mixed", tokens=found.batch.num_tokens)
    critic = sum(p.size for p in planned.parts if p.what.startswith("critic's ") and p.what != "critic's gradients")
    assert found.before == pytest.approx(held(planned, folder, found.batch) + critic, rel=0.05)


def test_an_adapter_is_all_that_is_trained(folder: str) -> None:
    found = run("dpo", folder, "bf16-mixed", lora={"r": 4})
    planned = plan(DPOModule, {"model": folder, "lora": {"r": 4}}, "bf16-mixed", tokens=found.batch.num_tokens)
    assert found.before == pytest.approx(held(planned, folder, found.batch), rel=0.05)
    decoder = decoder_of(folder)
    assert trained_weights(decoder, planned.training) == 2 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert {part.what: part.size for part in planned.parts}["optimizer"] == 8 * trained_weights(
        decoder, planned.training
    )
    assert weight_bytes(decoder, planned.training) == 4 * (decoder.weights + trained_weights(decoder, planned.training))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_were_stored_in_half_precision_stay_so_under_an_adapter(
    checkpointing: bool, folder: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    options = {"lora": {"r": 4}, "gradient_checkpointing": checkpointing}
    found = run("dpo", str(tmp_path), "bf16-mixed", **options)
    planned = plan(DPOModule, {"model": str(tmp_path), **options}, "bf16-mixed", tokens=found.batch.num_tokens)
    assert found.before == pytest.approx(held(planned, str(tmp_path), found.batch), rel=0.05)
    adapter = trained_weights(decoder_of(folder), planned.training)
    assert planned.parts[0].size == frozen_bytes(folder) + 4 * adapter
    single = plan(DPOModule, {"model": folder, **options}, "bf16-mixed", tokens=found.batch.num_tokens)
    assert single.parts[0].size == 4 * decoder_of(folder).weights + 4 * adapter


def sizes(method: Any, options: dict[str, Any], folder: str, precision: str = "bf16-mixed") -> dict[str, float]:
    return {part.what: part.size for part in plan(method, {"model": folder, **options}, precision).parts}


def frozen_bytes(folder: str) -> int:
    """Bytes of a model whose linear layers are in bf16 unless they are tied to the embedding, and all else in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    half = sum(layer.weight.numel() for layer in layers if layer.weight is not model.get_input_embeddings().weight)
    return 4 * sum(p.numel() for p in model.parameters()) - 2 * half


def test_references_are_there_where_they_are_used(folder: str) -> None:
    whole = frozen_bytes(folder)
    assert sizes(DPOModule, {}, folder)["reference"] == whole
    assert sizes(DPOModule, {}, folder, "32-true")["reference"] == 4 * decoder_of(folder).weights
    assert "reference" not in sizes(DPOModule, {"lora": {"r": 4}}, folder)
    assert "reference" not in sizes(DPOModule, {"reference": "precomputed"}, folder)
    assert "reference" not in sizes(SFTModule, {}, folder)
    assert "reference" not in sizes(GRPOModule, {"beta": 0.0}, folder)
    assert sizes(GRPOModule, {"beta": 0.1}, folder)["reference"] == whole
    assert sizes(PPOModule, {"kl_coef": 0.05}, folder)["reference"] == whole
    assert "reference" not in sizes(PPOModule, {"kl_coef": 0.0}, folder)


def test_a_compressor_has_a_model_of_its_own(folder: str) -> None:
    assert sizes(SFTModule, {"compressor": "any"}, folder)["compressor"] == 4 * decoder_of(folder).weights
    assert "compressor" not in sizes(SFTModule, {}, folder)


def test_reward_models_and_caches(folder: str) -> None:
    weights = decoder_of(folder).weights
    reward = {"class_path": "rlhf_lightning.rewards.RewardModelReward", "init_args": {"model": folder}}
    half, single = (
        {"class_path": reward["class_path"], "init_args": {"model": folder, "dtype": dtype}}
        for dtype in ("bfloat16", "float32")
    )
    rewards = [reward, "rlhf_lightning.rewards.exact_answer", single]
    options = {"model": folder, "rewards": rewards, "process_reward": half}
    planned = plan(GRPOModule, {**options, "sampling": {"generation_batch_tokens": 1000}}, "bf16-mixed")
    found = [p.size for p in planned.parts if p.what == "reward model"]
    assert found == [frozen_bytes(folder), 4 * weights, 2 * weights]
    assert {p.size for p in plan(GRPOModule, options, "16-mixed").parts if p.what == "reward model"} == {
        4 * weights,
        2 * weights,
    }
    # Keys in four bytes and values in two, of two layers with four heads of 16 numbers.
    assert planned.sampling[-1].size == 2 * 4 * 16 * (4 + 4) * 1000
    assert "gradients" not in [part.what for part in planned.sampling]


def test_half_precision_adds_gradients_up_in_single_precision(folder: str) -> None:
    weights = decoder_of(folder).weights
    found = sizes(SFTModule, {}, folder, "bf16-true")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * weights, 4 * weights, 4 * weights)
    assert "cast weights" not in found


def test_the_command_prints_what_fits(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "configs/dpo/default.yaml", f"--model.model={folder}", "--data.train=none.jsonl"]
    main(["memory", *given, "--card=1", "--trainer.precision=bf16-mixed", "--tokens=1000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "DPOModule on one device, bf16-mixed, attention cascade"
    assert lines[2] == "a micro-batch of 1,000 tokens:"
    found = {line[:20].rsplit("  ", 1)[0].strip(): line for line in lines}
    assert f"{decoder_of(folder).weights:,} weights" in found["weights"]
    assert "a frozen copy of the policy" in found["reference"]
    planned = plan(DPOModule, {"model": folder}, "bf16-mixed", tokens=1000)
    most = largest(lambda tokens: plan(DPOModule, {"model": folder}, "bf16-mixed", tokens=tokens), 1 << 30)
    verdict = (
        f"{planned.total / (1 << 30):,.2f} GiB: fits on a card of 1 GiB; micro-batches of up to {most:,} tokens do"
    )
    assert lines[-1] == verdict
    fitting, beyond = (plan(DPOModule, {"model": folder}, "bf16-mixed", tokens=most + n).total for n in (0, 1))
    assert fitting <= 1 << 30 < beyond
    main(["memory", *given, "--card=0.0001", "--trainer.precision=bf16-mixed"])
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("does not fit on a card of 0.0001 GiB; no micro-batch does")
    )


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        ({}, "64-true", "the memory of precision '64-true' is not known: it is for 32-true"),
        ({"attention": "flex"}, "bf16-mixed", "the memory of attention 'flex' is not known"),
        (
            {"lora": {"r": 4}, "quantization": "int8"},
            "bf16-true",
            "the memory of quantization 'int8' is not known here",
        ),
        ({"lora": {"r": 4}, "quantization": "nf4"}, "bf16-mixed", "with precision 32-true, bf16-true or 16-true"),
        ({"layout": "padded"}, "bf16-mixed", "the memory of layout 'padded' depends on every batch"),
        ({"lora": {"r": 4, "use_dora": True}}, "bf16-mixed", "the memory of lora's 'use_dora' is not known"),
        ({"lora": {"target_modules": ["lm_head"]}}, "bf16-mixed", r"the memory of lora's target_modules \['lm_head'\]"),
    ],
)
def test_unknown_memory_is_refused(options: dict[str, Any], precision: str, message: str, folder: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(SFTModule, {"model": folder, **options}, precision)


@pytest.mark.parametrize(("option", "value"), [("tokens", "0"), ("card", "-1"), ("optimizer_states", "-1")])
def test_numbers_out_of_range_are_refused(
    option: str, value: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "configs/sft/default.yaml", f"--model.model={folder}", "--data.train=none.jsonl"]
    with pytest.raises(SystemExit):
        main(["memory", *given, f"--{option}={value}"])
    assert f"{option} is {value}" in capsys.readouterr().err


def test_a_reward_model_has_no_logits(folder: str) -> None:
    assert sizes(RewardModule, {}, folder)["cast weights"] == 2 * decoder_of(folder).matrices
