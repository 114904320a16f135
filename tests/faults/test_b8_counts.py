"""Schedules count the steps that are made; a critic begins at the rewards of the model that it comes from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PPOModule, RewardModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.datamodules import PromptDataModule
from rlhf_lightning.models.critic import means_so_far
from rlhf_lightning.sequences import Example, Segment, pack

from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from ..rl.fixed_rollouts import FixedGRPO, remainder

ROWS = [{"prompt": f"{n}+{n}="} for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.mark.parametrize(
    ("rows", "batch", "limits", "expected"),
    [
        (2, 2, {"max_epochs": 1}, 4),  # two prompts make two mini-batches, not four, in each of two passes
        (5, 4, {"max_epochs": 2}, 20),  # four and one
        (5, 4, {"max_epochs": 2, "max_steps": 7}, 8),  # an iteration is made to its end
        (5, 3, {"max_epochs": 3, "limit_train_batches": 1}, 18),
    ],
)
def test_a_schedule_ends_with_the_last_step_that_is_made(
    folder: str, rows: int, batch: int, limits: dict[str, int], expected: int
) -> None:
    schedule = partial(WarmupSchedule, decay="linear")
    options: dict[str, Any] = {"num_generations": 2, "num_mini_batches": 4, "num_updates": 2}
    module = FixedGRPO(
        folder, rewards=[remainder], optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=schedule, **options
    )
    run = trainer("32-true", num_sanity_val_steps=0, **limits)
    run.fit(module, PromptDataModule(train=ROWS[:rows], global_batch_size=batch))
    scheduler: Any = module.lr_schedulers()
    assert (run.global_step, scheduler.total_steps) == (expected, expected)
    assert scheduler.get_last_lr() == [0.0]


def test_means_so_far_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 5]
    states = [torch.randn(length, 4) for length in lengths]
    expected = []
    for own in states:
        for t in range(len(own)):
            expected.append(own[0] if t == 0 else own[1 : t + 1].mean(dim=0))
    index = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    found = means_so_far(torch.cat(states), index, len(states), max(map(len, states)))
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    assert means_so_far(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 0, 0).shape == (0, 4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_values_begin_at_the_rewards_of_what_has_been_written_so_far(
    folder: str, tmp_path: Path, pooling: Any, head: Any
) -> None:
    reward = RewardModule(folder, pooling=pooling, head=head, seed=3)
    reward.save_pretrained(str(tmp_path / "reward"))
    reward = RewardModule.from_pretrained(str(tmp_path / "reward"))
    module = PPOModule(folder, rewards=[remainder], value={"model": str(tmp_path / "reward")})
    module.configure_model()
    assert module.critic is not None
    prompt, completion = [5, 6, 7, 8], [9, 10, 11, 12, 13]
    tree = Example("rows:0", Segment(prompt, children=(Segment(completion, [1.0] * 5),)))
    with torch.no_grad():
        values = module.critic.own_values(pack([tree]))
        for t in range(1, len(completion)):
            cut = Example("rows:0", Segment(prompt, children=(Segment(completion[:t], [1.0] * t),)))
            assert float(values[t]) == pytest.approx(
                float(reward.reward_model(pack([cut]), reward.layout)), rel=1e-4, abs=1e-5
            )
