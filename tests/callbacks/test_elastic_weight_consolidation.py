"""The gradient of the penalty against squared gradients of single rows; in training, with LoRA, over several tasks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.callbacks import ElasticWeightConsolidation, TrainingCheckpoint
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.inference import derive_seed
from rlhf_lightning.merging.data import row_tokens

FIRST = [{"prompt": f"{n}+{n}=?", "completion": f"#{2 * n}"} for n in range(4)]
SECOND = [{"prompt": "ab", "completion": f"c{n}"} for n in range(3)]
LORA = {"r": 2, "lora_dropout": 0.5}
SGD = partial(torch.optim.SGD, lr=0.1)


def module(folder: Path, **options: Any) -> SFTModule:
    made = SFTModule(str(folder), optimizer=SGD, max_grad_norm=None, **options)
    made.configure_model()
    if "lora" in options:  # as drawn, B is zero, and so is all information of A
        torch.manual_seed(5)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
    return made


def trained(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def fisher(module: SFTModule, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """The mean over contexts; each row's gradient, of tokens that the model draws, is squared alone."""
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums, count = {name: torch.zeros_like(p) for name, p in weights.items()}, 0
    module.eval()
    for number, tokens in enumerate(row_tokens(module.tokenizer, rows)):
        logprobs = module.model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        generator = torch.Generator().manual_seed(derive_seed(0, number) >> 1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)[:, 0]
        total = sum(logprobs[t, token] for t, token in enumerate(drawn.tolist()))
        assert isinstance(total, Tensor)
        for name, gradient in zip(
            weights, torch.autograd.grad(total, list(weights.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                sums[name] += gradient.square()
        count += len(drawn)
    module.train()
    return {name: total / count for name, total in sums.items()}


def gradients(keep: ElasticWeightConsolidation, module: SFTModule) -> dict[str, Tensor]:
    """Returns the penalty's part of gradients that began as 1."""

    class Trainer:
        class precision_plugin:
            scaler = None

    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    keep.on_before_optimizer_step(Trainer(), module, SGD(list(weights.values())))  # type: ignore[arg-type]
    found = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        found[name] = weight.grad - 1
        weight.grad = None
    return found


def move(module: SFTModule, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-3, "nothing to compare"
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["all weights", "lora"])
def test_the_gradient_is_that_of_the_definition(options: dict[str, Any], tiny_model_folder: Any) -> None:
    """lambda F (theta - theta*), the sum over two tasks that ended with different weights; and the penalty's own."""
    policy = module(tiny_model_folder(), **options)
    keep = ElasticWeightConsolidation(strength=10.0)
    information, ends = [], []
    for rows, strength in ((FIRST, None), (SECOND, 30.0)):
        information.append(fisher(policy, rows))
        ends.append(trained(policy))
        keep.consolidate(policy, rows, strength=strength)
        if rows is FIRST:
            assert all(not value.any() for value in gradients(keep, policy).values())  # at theta*, exactly
        move(policy, len(ends))
        here = trained(policy)
        expected = {
            name: sum(
                factor * f[name] * (here[name] - end[name])
                for factor, f, end in zip((10.0, 30.0), information, ends, strict=False)
            )
            for name in here
        }
        assert_near(gradients(keep, policy), expected)  # type: ignore[arg-type]

    # The penalty has this gradient, by finite differences along it.
    before, step = keep.penalty(policy), 1e-3
    found = gradients(keep, policy)
    norm = torch.stack([value.square().sum() for value in found.values()]).sum().sqrt()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name in found:
                weight.add_(found[name], alpha=step / float(norm))
    assert float((keep.penalty(policy) - before) / step) == pytest.approx(float(norm), rel=0.02)


def test_a_new_adapter_says_what_stays_free(tiny_model_folder: Any, recwarn: pytest.WarningsRecorder) -> None:
    """B is 0, so that no A has information; where B is not, nothing is said."""
    policy = SFTModule(str(tiny_model_folder()), optimizer=SGD, lora=LORA)
    policy.configure_model()
    keep = ElasticWeightConsolidation()
    keep.consolidate(policy, FIRST)
    halves = {half: [name for name in trained(policy) if half in name] for half in ("lora_A", "lora_B")}
    assert all(not keep.information[name].any() for name in halves["lora_A"])
    assert all(keep.information[name].any() for name in halves["lora_B"])
    said = [str(warning.message) for warning in recwarn if "ElasticWeight" in str(warning.message)]
    count = len(halves["lora_A"])
    assert len(said) == 1
    assert f"the information of {count} of {2 * count} trained weights is 0" in said[0]
    assert halves["lora_A"][0] in said[0]

    recwarn.clear()
    ElasticWeightConsolidation().consolidate(module(tiny_model_folder(), lora=LORA), FIRST)
    assert not [warning for warning in recwarn if "ElasticWeight" in str(warning.message)]


def fit(policy: PostTrainingModule, *callbacks: Any, steps: int = 2, resume: Any = None) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, TrainingCheckpoint) for callback in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(policy, datamodule=SFTDataModule(train=SECOND, global_batch_size=3), ckpt_path=resume)
    return trainer


def write(rows: list[dict[str, str]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_two_steps_of_training(tiny_model_folder: Any, tmp_path: Path) -> None:
    """The first step has no penalty; the second one differs by -lr lambda F (theta_1 - theta_0)."""
    weights: dict[str, list[dict[str, Tensor]]] = {"plain": [], "kept": []}

    class Seen(lightning.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weights[self.name].append(trained(pl_module))

    folder = tiny_model_folder()
    information = fisher(module(folder), FIRST)
    start = trained(module(folder))
    rows = write(FIRST, tmp_path / "first.jsonl")
    keep = ElasticWeightConsolidation(rows, strength=50.0)
    trainer = fit(module(folder), keep, Seen("kept"))
    fit(module(folder), Seen("plain"))
    (one, two), (kept_one, kept_two) = weights["plain"], weights["kept"]
    for name, weight in one.items():
        assert torch.equal(weight, kept_one[name]), name
    found = {name: kept_two[name] - two[name] for name in two}
    expected = {name: -0.1 * 50.0 * information[name] * (one[name] - start[name]) for name in two}
    assert_near(found, expected)
    penalty = sum(
        float((25.0 * information[name] * (kept_two[name] - start[name]).square()).sum()) for name in information
    )
    assert float(trainer.callback_metrics["train/ewc_penalty"]) == pytest.approx(penalty, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_resumed_run_keeps_its_tasks(tiny_model_folder: Any, tmp_path: Path) -> None:
    rows = write(FIRST, tmp_path / "first.jsonl")

    def run(name: str, resume: Any = None) -> tuple[ElasticWeightConsolidation, SFTModule]:
        keep = ElasticWeightConsolidation(rows, strength=100.0)
        policy = module(tiny_model_folder())
        fit(policy, keep, TrainingCheckpoint(str(tmp_path / name), every_n_steps=1, keep=9), steps=4, resume=resume)
        return keep, policy

    keep, whole = run("whole")
    again, resumed = run("resumed", tmp_path / "whole" / "step=2.ckpt")
    assert again.num_tasks == 1
    for name, weight in trained(whole).items():
        assert torch.equal(keep.center[name], again.center[name]), name
        assert torch.equal(weight, trained(resumed)[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"^strength is 0.0; it must be above 0 \(1000 is usual\)$"),
        ({"num_rows": 0}, r"^num_rows is 0; it must be a whole number of at least 1"),
        ({"rows": []}, r"^rows is \[\]; name at least one source, or write null and call consolidate\(\)$"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticWeightConsolidation(**options)


def test_refusals(tiny_model_folder: Any) -> None:
    keep = ElasticWeightConsolidation()
    with pytest.raises(ValueError, match=r"measures predictions of tokens; RewardModule makes none$"):
        keep.consolidate(RewardModule(str(tiny_model_folder())), FIRST)
    with pytest.raises(ValueError, match=r"^strength is -1; it must be above 0"):
        keep.consolidate(module(tiny_model_folder()), FIRST, strength=-1)
    assert (keep.num_tasks, keep.information) == (0, {})
