"""Runs of GRPO and PPO that are interrupted at the end of an iteration continue as if they were not, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.datamodules import PromptDataModule
from rlhf_lightning.rl.on_policy_module import OnPolicyModule

from ..helpers import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def spread(completions: Sequence[str]) -> list[float]:
    """How many different characters a completion has, in steps of three: groups are often equal."""
    return [float(len(set(text)) // 3) for text in completions]


def by_line(completions: Sequence[str]) -> list[list[float]]:
    """How many different characters each line has."""
    return [[float(len(set(step))) for step in text.split("\n") if step] for text in completions]


SEARCH = {"class_path": "beam", "init_args": {"width": 2, "expand": 2, "max_step_tokens": 3}}
CASES: dict[str, tuple[type[OnPolicyModule], dict[str, Any]]] = {
    "grpo-dynamic-sampling": (GRPOModule, {"num_updates": 2, "beta": 0.1, "dynamic_sampling": 2}),
    "grpo-process": (GRPOModule, {"process_reward": by_line, "dynamic_sampling": 1, "num_mini_batches": 3}),
    "grpo-tree": (GRPOModule, {"tree": {"rollouts": ["samples", SEARCH]}, "num_mini_batches": 2}),
    "grpo-replay": (
        GRPOModule,
        {
            "off_policy": {"correction": "token_truncate", "replay_capacity": 7, "replay_share": 0.5},
            "tree": {"rollouts": SEARCH},
        },
    ),
    "ppo-adaptive-kl": (PPOModule, {"num_updates": 2, "num_mini_batches": 2, "kl": {"target": 0.01, "horizon": 10}}),
    "ppo-warm-up": (PPOModule, {"process_reward": by_line, "value": {"warmup_iterations": 3, "lr_ratio": 2.0}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", initializer_range=0.1))


class Interrupted(Exception):
    """Ends a run between two iterations."""


class Watch(lightning.Callback):
    """Collects what was logged and sampled in each iteration, and interrupts the run after some."""

    def __init__(self, iterations: int) -> None:
        self.left = iterations
        self.seen: list[dict[str, float]] = []
        self.samples: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.samples.append([[c.token_ids for c in group] for group in pl_module.last_rollouts.completions])
        self.left -= 1

    def on_train_batch_start(self, *args: Any) -> None:
        if self.left == 0:
            raise Interrupted


def run(
    case: str, folder: str, target: Path, iterations: int, ckpt_path: Path | None = None
) -> tuple[Watch, dict[str, Tensor], dict[str, Any]]:
    """Trains from the start or a checkpoint; returns what was seen, the weights, and the last checkpoint."""
    torch.manual_seed(0 if ckpt_path is None else 99)
    cls, given = CASES[case]
    module = cls(
        folder,
        **{
            "rewards": [spread],
            "num_generations": 3,
            "max_completion_length": 8,
            "seed": 5,
            "optimizer": partial(torch.optim.AdamW, lr=3e-3),
            "lr_scheduler": partial(WarmupSchedule, warmup_steps=3, total_steps=40, decay="cosine"),
            **given,
        },
    )
    rows = [{"prompt": f"{n}+{n}="} for n in range(9)]
    watch = Watch(iterations)
    saves = ModelCheckpoint(dirpath=target, every_n_train_steps=1, save_top_k=-1, filename="{step:04d}")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,  # of three iterations each: the fourth is in the second epoch
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, saves],
    )
    with pytest.raises(Interrupted):
        trainer.fit(module, PromptDataModule(train=rows, global_batch_size=3, seed=4), ckpt_path=ckpt_path)
    last = torch.load(sorted(target.iterdir())[-1], weights_only=True)
    return watch, {name: value.clone() for name, value in module.state_dict().items()}, last


@pytest.mark.parametrize("case", CASES)
def test_two_and_two_are_four(case: str, folder: str, tmp_path: Path) -> None:
    whole, weights, last = run(case, folder, tmp_path / "whole", 4)
    first, _, _ = run(case, folder, tmp_path / "first", 2)
    assert first.seen == whole.seen[:2]
    checkpoint = sorted((tmp_path / "first").iterdir())[-1]
    rest, resumed, last_of_rest = run(case, folder, tmp_path / "rest", 2, checkpoint)
    assert rest.samples == whole.samples[2:]
    assert rest.seen == whole.seen[2:]
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    # Nothing that the next checkpoint says of the run differs either.
    replayed, replay = (checkpoint["on_policy"].pop("replay", {}) for checkpoint in (last_of_rest, last))
    assert last_of_rest["on_policy"] == last["on_policy"]
    assert replayed.keys() == replay.keys()
    for name, value in replay.items():
        assert torch.equal(replayed[name], value) if isinstance(value, Tensor) else replayed[name] == value
    assert last_of_rest["on_policy"]["iteration"] == 4
    assert last_of_rest["global_step"] == last["global_step"]
    assert str(last_of_rest["optimizer_states"]) == str(last["optimizer_states"])
    # The case shows what it is for.
    assert len({tuple(map(str, samples)) for samples in whole.samples}) == 4
    if "dynamic" in case:
        assert sum(row["train/dynamic_sampling/replaced"] for row in whole.seen[2:]) > 0
    if "replay" in case:
        assert len(replay["row_ids"]) == 7
        assert whole.seen[2]["train/replay/completions"] == 7
    if "adaptive" in case:
        assert len({row["train/kl_coef"] for row in whole.seen}) == 4


def test_a_checkpoint_without_its_buffer_shows(folder: str, tmp_path: Path) -> None:
    whole, _, _ = run("grpo-replay", folder, tmp_path / "whole", 3)
    run("grpo-replay", folder, tmp_path / "first", 2)
    checkpoint = torch.load(sorted((tmp_path / "first").iterdir())[-1], weights_only=True)
    del checkpoint["on_policy"]["replay"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    rest, _, _ = run("grpo-replay", folder, tmp_path / "rest", 1, tmp_path / "without.ckpt")
    assert rest.samples[0] == whole.samples[2]
    assert rest.seen[0] != whole.seen[2]


def test_what_a_checkpoint_forgets_shows(folder: str, tmp_path: Path) -> None:
    """The test above would see it if the iteration or the controller were not in the checkpoint."""
    case = "ppo-adaptive-kl"
    whole, _, _ = run(case, folder, tmp_path / "whole", 3)
    run(case, folder, tmp_path / "first", 2)
    path = sorted((tmp_path / "first").iterdir())[-1]
    checkpoint = torch.load(path, weights_only=True)
    for key, changed in (("iteration", "samples"), ("controller", "seen")):
        other = copy.deepcopy(checkpoint)
        del other["on_policy"][key]
        torch.save(other, tmp_path / f"{key}.ckpt")
        rest, _, _ = run(case, folder, tmp_path / f"rest-{key}", 1, tmp_path / f"{key}.ckpt")
        assert getattr(rest, changed)[0] != getattr(whole, changed)[2]
