"""The scripts in ``examples/`` and the modules have the same losses and final weights, in fp64."""

from __future__ import annotations

import ast
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPOModule, GRPOModule, RewardModule
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule

from ..helpers import save_tiny_model
from ..invariance.harness import trainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
STEPS = 3
TOLERANCE = 1e-9  # of a loss to its size, of a weight tensor to how far it has moved; in fp64

Weights = dict[str, Tensor]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # An architecture whose norms stay in fp64: others round to fp32 within.
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


@pytest.fixture(scope="module")
def start(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


class Outputs(lightning.Callback):
    """Keeps the values of every step, before they are rounded for the log."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(dict(outputs))

    def __getitem__(self, name: str) -> list[float]:
        return [float(step[name]) for step in self.steps]


def options(script: ModuleType, micro_batch_tokens: int) -> dict[str, Any]:
    """The script's optimizer, and micro-batches so small that a step needs several."""
    adamw = partial(torch.optim.AdamW, lr=script.LEARNING_RATE, weight_decay=0.0)
    return {
        "optimizer": adamw,
        "max_grad_norm": script.MAX_GRAD_NORM,
        "micro_batch_tokens": micro_batch_tokens,
    }


def fit(module: PostTrainingModule, data: lightning.LightningDataModule, *callbacks: lightning.Callback) -> Outputs:
    """Trains on all rows at once, an epoch a step."""
    outputs = Outputs()
    trainer("64-true", max_epochs=STEPS, callbacks=[outputs, *callbacks]).fit(module, data)
    return outputs


def assert_same(found: Weights, expected: Weights, start: Weights) -> None:
    assert found.keys() == expected.keys()
    moved = {name: float((weight - start[name]).norm()) for name, weight in expected.items()}
    assert max(moved.values()) > 1e-3, "nothing has moved: the comparison would be empty"
    for name, weight in expected.items():
        error = float((found[name] - weight).norm()) / max(moved[name], 1e-4)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


def test_dpo(folder: str, start: Any) -> None:
    script = load("dpo_by_hand")
    losses, policy = script.train(folder, script.ROWS, STEPS, torch.float64)
    assert losses[0] == pytest.approx(0.6931471805599453)  # log 2: the policy is its own reference
    assert losses == sorted(losses, reverse=True)

    module = DPOModule(folder, beta=script.BETA, **options(script, 32))
    data = PreferenceDataModule(train=script.ROWS, global_batch_size=len(script.ROWS), shuffle=False)
    outputs = fit(module, data)
    assert outputs["loss"] == pytest.approx(losses, rel=TOLERANCE)
    assert max(outputs["grad_norm"]) > script.MAX_GRAD_NORM  # gradients were clipped
    assert_same(module.model.state_dict(), policy.state_dict(), start.state_dict())


def test_reward(folder: str, start: Any) -> None:
    script = load("reward_by_hand")
    losses, model = script.train(folder, script.ROWS, STEPS, torch.float64)
    assert losses == sorted(losses, reverse=True)

    # The module draws other first weights for its head, from the same distribution.
    head = script.RewardModel(folder, torch.float64).head.weight.detach()

    class GivenHead(lightning.Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.head.weight.copy_(head)

    module = RewardModule(folder, **options(script, 32))
    data = PreferenceDataModule(train=script.ROWS, global_batch_size=len(script.ROWS), shuffle=False)
    outputs = fit(module, data, GivenHead())
    assert outputs["loss"] == pytest.approx(losses, rel=TOLERANCE)
    assert max(outputs["grad_norm"]) > script.MAX_GRAD_NORM
    decoder = module.model.base_model.state_dict()
    assert_same(decoder, model.decoder.state_dict(), start.base_model.state_dict())
    assert_same({"head": module.head.weight.detach()[0]}, {"head": model.head.weight.detach()}, {"head": head})


def test_grpo(folder: str, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("grpo_by_hand")
    monkeypatch.setattr(script, "TEMPERATURE", 0.8)  # at 1 a division that is missing would not show
    losses, policy = script.train(folder, script.ROWS, STEPS, torch.float64)

    module = GRPOModule(
        folder,
        rewards=[script.contains_answer],
        num_generations=script.NUM_GENERATIONS,
        max_completion_length=script.MAX_COMPLETION_LENGTH,
        temperature=script.TEMPERATURE,
        num_updates=script.NUM_UPDATES,
        beta=script.BETA,
        seed=script.SEED,
        **options(script, 128),
    )
    data = PromptDataModule(train=script.ROWS, global_batch_size=len(script.ROWS), shuffle=False)
    outputs = fit(module, data)
    assert outputs["loss"] == pytest.approx(losses, rel=TOLERANCE)
    assert min(outputs["reward_std"]) > 0  # there was something to learn from in every step
    assert max(outputs["clip_ratio/region_mean"]) > 0
    assert max(outputs["kl"]) > 0
    assert_same(module.model.state_dict(), policy.state_dict(), start.state_dict())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_as_it_is(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(script.stem).main(["--steps", "1"])
    assert capsys.readouterr().out.startswith("step 1: loss ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_one_short_file_of_plain_torch(script: Path) -> None:
    text = script.read_text()
    assert text.count("\n") <= 200
    ours = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlhf_lightning")
        for alias in node.names
    }
    seeds = {("rlhf_lightning.inference.sampling", name) for name in ("derive_seed", "uniforms")}
    assert ours == (seeds if script.stem == "grpo_by_hand" else set())
    assert "import rlhf_lightning" not in text


def test_every_script_is_compared() -> None:
    assert [script.stem for script in SCRIPTS] == ["dpo_by_hand", "grpo_by_hand", "reward_by_hand"]
