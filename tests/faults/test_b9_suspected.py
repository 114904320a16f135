"""Sums and norms of gradients in fp32, ties, clipped values, skipped steps, and what weight decay is for."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from rlhf_lightning import DPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.core.gradients import GradientSums, clip_gradients
from rlhf_lightning.losses.value import value_clipped, value_loss
from rlhf_lightning.models.fused_head import OutputHead, fused_logprobs
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from ..rl.fixed_rollouts import remainder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


# Gradients in half a precision.


def test_many_small_gradients_add_up_in_bf16_too() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sums = GradientSums([weight])
    for value in [1.0] + [2.0**-9] * 512:  # each below half a step of bf16 at 1
        sums.begin_pass()
        (weight.sum() * value).backward()
    sums.end()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [2.0] * 3
    (weight.sum() * 1.0).backward()  # nothing remains that would take it away
    assert weight.grad.tolist() == [3.0] * 3


def test_a_step_of_many_passes_is_their_sum_rounded_once(folder: str) -> None:
    given: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}

    def add(parameter: Any, name: str) -> None:
        exact[name] += parameter.grad.double()

    class Look(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for name, parameter in pl_module.named_parameters():
                exact[name] = torch.zeros(parameter.shape, dtype=torch.float64)
                parameter.register_post_accumulate_grad_hook(partial(add, name=name))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            given.update({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    options: dict[str, Any] = {"max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=0.0)}
    for coupled in (False, True):
        for table in (given, exact):
            table.clear()
        loss_type: Any = "aot" if coupled else "sigmoid"
        module = DPOModule(folder, micro_batch_tokens=1, loss_type=loss_type, **options)
        run = trainer("bf16-true", max_epochs=1, num_sanity_val_steps=0, callbacks=[Look()])
        run.fit(module, Batches(ExampleBatch(pairs(40))))
        assert given
        for name, grad in given.items():
            assert grad.dtype == torch.bfloat16
            assert (grad.double() - exact[name]).norm() <= 2**-8 * exact[name].norm(), name


def test_the_norm_of_half_gradients_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (1000, 7, 300)]
    for weight in weights:
        weight.grad = torch.randn(weight.shape).bfloat16()
    before = [weight.grad.double() for weight in weights if weight.grad is not None]
    expected = float(torch.cat(before).norm())
    found = clip_gradients(weights, 1.0)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-6)
    for weight, own in zip(weights, before, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, (own.float() * (1.0 / (found + 1e-6))).bfloat16())  # rounded once
    wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    wide.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert float(clip_gradients([wide], 1.0)) == 5.0
    assert wide.grad.norm() == pytest.approx(1.0, abs=1e-6)


# Ties and rounding that were counted.


@pytest.mark.parametrize("vocabulary", [10, 5000])
def test_a_tie_is_no_choice(vocabulary: int) -> None:
    targets = torch.tensor([0, 3, vocabulary - 1])
    hidden = torch.zeros(3, 4)
    assert not fused_logprobs(hidden, OutputHead(torch.randn(vocabulary, 4)), targets).correct.any()
    torch.manual_seed(0)
    weight, hidden = torch.randn(vocabulary, 4), torch.randn(50, 4)
    best = (hidden @ weight.T).argmax(dim=1)
    found = fused_logprobs(hidden, OutputHead(weight), best)
    assert found.correct.all()
    assert torch.allclose(found.logprobs, (hidden @ weight.T).log_softmax(-1).amax(dim=1), atol=1e-5)
    assert not fused_logprobs(hidden, OutputHead(weight), (best + 1) % vocabulary).correct.any()
    twice = torch.cat([weight, weight])  # in other tiles, where the vocabulary is large
    assert not fused_logprobs(hidden, OutputHead(twice), best).correct.any()


def test_values_within_the_range_are_not_counted_as_clipped() -> None:
    torch.manual_seed(0)
    old, returns = torch.randn(10_000) * 3, torch.randn(10_000)
    near = old + 0.19 * torch.rand(10_000)
    assert value_clipped(near, old_values_N=old, returns_N=returns).sum() == 0
    assert torch.equal(value_loss(near, old_values_N=old, returns_N=returns), (near - returns).square() / 2)
    far = old + 0.5
    clipped = value_clipped(far, old_values_N=old, returns_N=returns)
    assert torch.equal(clipped, ((old + 0.2 - returns).abs() > (far - returns).abs()).float())


# fp16's scaler.


def test_a_step_that_the_scaler_skips_does_not_advance_the_schedule(folder: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = SFTModule(
        folder,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(WarmupSchedule, total_steps=10, decay="linear"),
    )
    positions: list[tuple[int, float]] = []

    class Overflow(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.handle = None
            if batch_idx == 1:
                weight = next(pl_module.parameters())
                self.handle = weight.register_hook(lambda grad: grad * float("inf"))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            positions.append((pl_module.lr_schedulers().last_epoch, float(scaler.get_scale())))
            if self.handle is not None:
                self.handle.remove()

    plugin = MixedPrecision("bf16-mixed", "cpu")  # fp16 is for GPUs; what follows from a scaler is the same here
    plugin.scaler = scaler
    run = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[plugin],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Overflow()],
    )
    run.fit(module, Batches(*[ExampleBatch(demonstrations(4))] * 3))
    assert positions == [(1, 2.0**10), (1, 2.0**9), (2, 2.0**9)]


# Weight decay.

DECAY = partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1)


def groups(module: Any) -> dict[str, float]:
    """The decay of every trained parameter, by name."""
    module._trainer = trainer("32-true")
    module.configure_model()
    optimizer = module.configure_optimizers()
    names = {id(p): name for name, p in module.named_parameters()}
    found = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(found) == {name for name, p in module.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize(
    "build",
    [
        partial(SFTModule, optimizer=DECAY),
        partial(DPOModule, optimizer=DECAY, lora={"r": 2, "use_dora": True, "bias": "all"}),
        partial(RewardModule, optimizer=DECAY, head="mlp", num_models=2),
        partial(PPOModule, optimizer=DECAY, rewards=[remainder], value={"lr_ratio": 3.0, "head": "mlp"}),
    ],
)
def test_vectors_are_not_decayed(folder: str, build: Any) -> None:
    found = groups(build(folder))
    vectors = ("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight", "magnitude_vector.default.weight")
    assert found == {name: 0.0 if name.endswith(vectors) else 0.1 for name in found}
    assert set(found.values()) == {0.0, 0.1}


def test_rates_of_their_own_survive_the_split_and_no_decay_means_no_split(folder: str) -> None:
    module = PPOModule(folder, rewards=[remainder], optimizer=DECAY, value={"lr_ratio": 3.0, "head": "mlp"})
    groups(module)
    assert module.critic is not None
    own = {id(p) for p in module.critic.parameters()}
    for group in module.configure_optimizers().param_groups:
        assert {group["lr"]} == {3.0 if id(p) in own else 1.0 for p in group["params"]}
    plain = SFTModule(folder)
    plain._trainer = trainer("32-true")
    plain.configure_model()
    assert len(plain.configure_optimizers().param_groups) == 1


def test_decay_pulls_matrices_alone(folder: str) -> None:
    module = DPOModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-6, weight_decay=1e4), max_grad_norm=1e-9)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, Batches(ExampleBatch(pairs(3))))
    for name, parameter in module.named_parameters():
        factor = 1.0 if parameter.ndim < 2 else 1 - 1e-6 * 1e4
        assert torch.allclose(parameter, before[name] * factor, atol=1e-5), name
