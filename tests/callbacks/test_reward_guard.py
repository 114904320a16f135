from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import GRPOModule
from rlhf_lightning.callbacks import RewardGuard
from rlhf_lightning.sequences import ExampleBatch

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..rl.fixed_rollouts import prompts

NAN = float("nan")


def watch(guard: RewardGuard, proxies: Sequence[Sequence[float]], checks: Sequence[float]) -> int | None:
    """The check at which the guard stops a run: proxies of the batches before each check, and the checks."""
    for number, (rewards, check) in enumerate(zip(proxies, checks, strict=True)):
        run: Any = SimpleNamespace(
            callback_metrics={}, should_stop=False, sanity_checking=False, state=SimpleNamespace(fn="fit")
        )
        for reward in rewards:
            run.callback_metrics["train/reward"], run.global_step = reward, 10 * number
            guard.on_train_batch_end(run, None, None, None, 0)  # type: ignore[arg-type]
        run.callback_metrics["val/accuracy"] = check
        guard.on_validation_end(run, None)  # type: ignore[arg-type]
        if run.should_stop:
            assert guard.stopped_at == 10 * number
            return number
    return None


RISING = [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0], [4.0, 5.0], [5.0, 6.0], [6.0, 7.0]]
PEAK = [0.3, 0.5, 0.49, 0.4, 0.3, 0.2]  # gold: up to the second check, then down


@pytest.mark.parametrize(
    ("given", "checks", "expected"),
    [
        ({"patience": 1}, PEAK, 2),
        ({"patience": 2}, PEAK, 3),
        ({"patience": 4}, PEAK, 5),
        ({"patience": 5}, PEAK, None),
        ({"patience": 1, "min_delta": 0.05}, PEAK, 3),
        ({"patience": 2, "min_delta": 0.15}, PEAK, 5),
        ({"patience": 1}, [0.1, 0.2, 0.2, 0.3, 0.3, 0.4], None),  # standing still is not falling
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.7, 0.6], None),  # a new peak forgives
        ({"patience": 2}, [0.5, 0.4, 0.5, 0.4, 0.5, 0.4], None),  # so does the old one
        ({"patience": 2, "mode": "min"}, [0.5, 0.4, 0.45, 0.5, 0.6, 0.7], 3),
        ({"patience": 2, "mode": "min"}, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], None),
        ({"patience": 2}, [NAN, 0.5, 0.4, NAN, 0.4, 0.3], 3),  # what is not a number has fallen, once there was one
    ],
)
def test_when_it_stops(given: dict[str, Any], checks: list[float], expected: int | None) -> None:
    assert watch(RewardGuard(**given), RISING, checks) == expected


def test_a_proxy_that_falls_too_is_not_hacked() -> None:
    falling = [[5.0], [4.0], [3.0], [2.0], [1.0], [0.0]]
    assert watch(RewardGuard(patience=1), falling, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]) is None


def test_the_proxy_is_a_mean_since_the_last_check() -> None:
    """At the peak 2.0, then a mean of 1.9 with a last value of 3.5, then a mean of 2.1 with a last value of 0.2."""
    proxies = [[2.0, 2.0], [0.3, 3.5], [4.0, 0.2]]
    guard = RewardGuard(patience=1)
    assert watch(guard, proxies, [0.5, 0.4, 0.4]) == 2
    assert (guard.best_check, guard.best_proxy) == (0.5, 2.0)


def test_a_check_twice_at_one_step_counts_once() -> None:
    guard = RewardGuard(patience=2)
    assert watch(guard, [[1.0], [2.0], []], [0.5, 0.4, 0.4]) is None
    assert guard.num_hacked == 1


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_resumed_run_remembers(cut: int) -> None:
    first, second = RewardGuard(patience=3), RewardGuard(patience=3)
    assert watch(first, RISING[:cut], PEAK[:cut]) is None
    second.load_state_dict(first.state_dict())
    assert watch(second, RISING[cut:], PEAK[cut:]) == 4 - cut


def test_a_resume_between_checks_keeps_the_batches_before() -> None:
    guards = [RewardGuard(patience=1) for _ in range(2)]
    assert watch(guards[0], [[2.0]], [0.5]) is None
    run: Any = SimpleNamespace(callback_metrics={"train/reward": 9.0}, should_stop=False)
    guards[0].on_train_batch_end(run, None, None, None, 0)  # type: ignore[arg-type]
    guards[1].load_state_dict(guards[0].state_dict())
    assert watch(guards[1], [[1.0]], [0.4]) == 0  # the mean is 5, above 2; the last alone is below


@pytest.mark.parametrize(("every", "expected"), [(1, 3), (2, 5), (3, None)])
def test_a_check_that_training_logs(every: int, expected: int | None) -> None:
    guard = RewardGuard(check="train/rewards/gold/mean", patience=1, every_n_batches=every)
    gold = [0.2, 0.4, 0.6, 0.5, 0.3, 0.2]  # in twos: 0.3, 0.55, 0.25; in threes: 0.4, 1/3 with a proxy that fell
    proxy = [1.0, 2.0, 3.0, 4.0, 3.5, -9.0] if every == 3 else [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for number, (reward, check) in enumerate(zip(proxy, gold, strict=True)):
        metrics = {"train/reward": reward, "train/rewards/gold/mean": check}
        run: Any = SimpleNamespace(callback_metrics=metrics, should_stop=False, global_step=number)
        guard.on_train_batch_end(run, None, None, None, number)  # type: ignore[arg-type]
        if run.should_stop:
            assert number == expected
            return
    assert expected is None


def shouting(completion_ids: Sequence[list[int]]) -> list[float]:
    """The proxy: one token, again and again."""
    return [tokens.count(7) / 8 for tokens in completion_ids]


def varied(completion_ids: Sequence[list[int]]) -> list[float]:
    """The intended quality: many different tokens."""
    return [len(set(tokens)) / 8 for tokens in completion_ids]


class Watch(lightning.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.seen.append((float(metrics["train/reward"]), float(metrics["train/rewards/varied/mean"])))


def test_it_stops_a_run_that_hacks_its_reward(tmp_path: Any) -> None:
    folder = str(save_tiny_model(tmp_path, "llama", initializer_range=0.1))
    module = GRPOModule(
        folder,
        rewards=[shouting, varied],
        reward_weights=[1.0, 0.0],
        max_completion_length=8,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
    )
    seen = Watch()
    guard = RewardGuard(check="train/rewards/varied/mean", patience=2, every_n_batches=3)
    run = trainer("32-true", max_epochs=1)
    run.callbacks += [seen, guard]
    run.fit(module, Batches(*(ExampleBatch(prompts(8)) for _ in range(60))))
    assert guard.num_hacked == 2
    assert 6 < len(seen.seen) < 60
    means = [torch.tensor(seen.seen[n : n + 3]).mean(dim=0).tolist() for n in range(0, len(seen.seen), 3)]
    peak = max(range(len(means)), key=lambda n: means[n][1])
    for proxy, gold in means[-2:]:
        assert proxy > means[peak][0]
        assert gold < means[peak][1]


def test_metrics_that_are_not_logged(tmp_path: Any) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    for given, message in (
        ({"proxy": "train/rewards"}, "proxy is 'train/rewards', which is not logged (logged: "),
        ({}, "check is 'val/accuracy', which is not logged (logged: "),
    ):
        module = GRPOModule(folder, rewards=[shouting], max_completion_length=4)
        run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0)
        run.callbacks.append(RewardGuard(**given))  # type: ignore[arg-type]
        loaders = [Batches(ExampleBatch(prompts(2))) for _ in range(2)]
        with pytest.raises(ValueError, match=re.escape(message)):
            run.fit(module, *loaders)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patience": 0}, "patience is 0; it must be a whole number of at least 1"),
        ({"min_delta": -0.1}, "min_delta is -0.1; it must be a finite number of at least 0"),
        ({"mode": "most"}, "mode is 'most'; it must be max or min"),
        ({"every_n_batches": 0}, "every_n_batches is 0; it must be at least 1"),
        ({"check": "train/reward"}, "proxy and check are both 'train/reward'"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardGuard(**given)
