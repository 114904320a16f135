"""Adapters on quantised weights, from the command line to what transformers and PEFT alone make of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rlhf_lightning.cli import PostTrainingCLI

from ..helpers import VOCAB_SIZE, save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]

PAIRS = [{"prompt": f"{n}+{n}=?", "chosen": f"#{2 * n}", "rejected": f"#{2 * n + 1} no"} for n in range(9)]
PROMPTS = [{"prompt": f"{n}+{n}="} for n in range(9)]
STEPS = 4


def digits(completion_ids: list[list[int]]) -> list[float]:
    """A reward that differs between samples."""
    return [sum(tokens) % 7 / 7 for tokens in completion_ids]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; in evaluation on some CPUs, bitsandbytes alone needs layers of whole blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", "qwen3", **sizes)


@pytest.fixture(params=["dpo", "grpo"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def train(
    base_folder: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PostTrainingCLI]:
    """Runs ``fit`` on the shipped YAML of a method and the fragment for quantised weights; exports go to a folder."""
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS if method == "dpo" else PROMPTS)))

    def run(name: str, *args: str) -> PostTrainingCLI:
        callbacks = [
            callback("ModelExport", folder=f"{name}/adapter"),
            callback("ModelExport", folder=f"{name}/merged", merge_adapter=True),
            callback("TrainingCheckpoint", folder=f"{name}/checkpoints", every_n_steps=1, keep=STEPS),
        ]
        init_args: dict[str, Any] = {"model": str(base_folder), "optimizer": {"init_args": {"lr": 0.01}}}
        if method == "grpo":
            init_args |= {"rewards": [f"{__name__}.digits"], "num_generations": 4, "max_completion_length": 5}
            init_args |= {"num_mini_batches": 2}
        mine = {
            "model": {"init_args": init_args},
            "data": {"init_args": {"train": str(rows), "global_batch_size": 4}},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": -1,
                "max_steps": STEPS,
                "callbacks": callbacks,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": name,
            },
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(mine))
        files = [f"configs/{method}/default.yaml", "configs/model/qlora.yaml", f"{name}.yaml"]
        return PostTrainingCLI(["fit", *(f"--config={file}" for file in files), *args])

    return run


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"rlhf_lightning.callbacks.{name}", "init_args": init_args}


def plain_base(folder: Path, quantization: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base model, quantised by transformers alone with the settings of the QLoRA paper."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    if quantization != "int8":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_trained_adapters_load_elsewhere(
    train: Callable[..., PostTrainingCLI], quantization: str, base_folder: Path, tmp_path: Path
) -> None:
    cli = train("run", f"--model.init_args.quantization={quantization}")
    assert cli.trainer.global_step == STEPS
    trained = cli.model.model
    frozen = [p for p in trained.parameters() if not p.requires_grad and p.dim() == 2 and p.shape[0] != VOCAB_SIZE]
    assert {p.dtype for p in frozen} == {torch.int8 if quantization == "int8" else torch.uint8}
    expected = logits(trained.eval())

    base = plain_base(base_folder, quantization)
    # Dropout is off: training mode differs from evaluation in the kernels of bitsandbytes alone, which in evaluation
    # on a CPU compute in bfloat16 (nf4) or quantise the activations (int8). Both modes are looked at.
    assert distance(logits(base.train()), expected) > 0.02, "the adapter does nothing"
    plain = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    # The same kernels on the same numbers; only the attention of the two models adds up in another order.
    assert distance(logits(plain.train()), expected) < 1e-5
    assert distance(logits(plain.eval()), expected) < 0.03
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "run/adapter")("3+4").input_ids == cli.model.tokenizer("3+4").input_ids
    )

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "run/merged/config.json").read_text())
    # (W + s B A) x in place of W x + s B (A x): two orders of the same sum.
    assert distance(logits(merged), expected) < 1e-5


def test_a_resumed_run_ends_where_it_would_have(train: Callable[..., PostTrainingCLI], tmp_path: Path) -> None:
    whole = train("whole")
    kept = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert "step=2.ckpt" in kept
    checkpoint = tmp_path / "whole/checkpoints/step=2.ckpt"
    # Frozen weights are those of the base model and in no checkpoint.
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in stored)
    resumed = train("resumed", f"--ckpt_path={checkpoint}")
    assert resumed.trainer.global_step == STEPS
    ends = [adapter_weights(cli.model.model) for cli in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name
    halfway = {name.removeprefix("model."): weight for name, weight in stored.items()}
    assert any(not torch.equal(ends[0][name], weight) for name, weight in halfway.items())


def test_bfloat16(train: Callable[..., PostTrainingCLI], base_folder: Path, tmp_path: Path) -> None:
    """Arithmetic in bfloat16: what is exported is what was trained, up to the rounding of that type."""
    cli = train("run", "--trainer.precision=bf16-mixed")
    trained = cli.model.model.eval()
    expected = logits(trained)
    plain = PeftModel.from_pretrained(plain_base(base_folder, "nf4"), tmp_path / "run/adapter").train()
    assert distance(logits(plain), expected) < 1e-5  # outside of autocast both compute in fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # bfloat16 has 8 bits: a relative error of 2^-9 = 0.002 per rounding, through some ten of them.
        assert distance(logits(trained), expected) < 0.02
