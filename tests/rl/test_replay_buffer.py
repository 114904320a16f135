"""Replay: what comes back through ``fit``, against naive log-probs of the policies that drew it and trained on it."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from rlhf_lightning import GRPOModule
from rlhf_lightning.rl import OffPolicyCorrection
from rlhf_lightning.rl.replay_buffer import Record, ReplayBuffer, replay_priority
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..modules.naive import naive_model, sequences

TEMPERATURE, HIGHEST = 0.8, 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", initializer_range=0.1))


def low(completion_ids: list[list[int]]) -> list[float]:
    """The share of low tokens."""
    return [sum(token < 30 for token in ids) / len(ids) for ids in completion_ids]


class Spy(lightning.Callback):
    """Keeps what each iteration began with, sampled, trained on and logged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.groups: list[list[Any]] = []
        self.trees: list[list[Example]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        update = pl_module.update

        def watched(trees: list[Example]) -> Any:
            self.trees.append(list(trees))
            return update(trees)

        pl_module.update = watched

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.groups.append(pl_module.last_rollouts.completions)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if len(self.logged) == trainer.max_steps:
            self.weights.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})


def fitted(folder: str, steps: int = 3, **off_policy: Any) -> Spy:
    """A run on the same prompts in each iteration, in steps large enough that the policy moves."""
    rows = [Example(f"rows:{n}", Segment([5 + n, 6, 7])) for n in range(3)]
    module = GRPOModule(
        folder,
        rewards=[low],
        num_generations=4,
        max_completion_length=5,
        temperature=TEMPERATURE,
        max_grad_norm=None,
        optimizer=partial(torch.optim.SGD, lr=5.0),
        off_policy={"correction": "token_truncate", "max": HIGHEST, "replay_capacity": 100, **off_policy},
    )
    spy = Spy()
    run = trainer("64-true", max_steps=steps, max_epochs=steps, num_sanity_val_steps=0)
    run.callbacks.append(spy)
    run.fit(module, Batches(*(ExampleBatch(rows) for _ in range(steps))))
    return spy


def token_logprobs(policy: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([*prompt, *completion])
    logprobs = (policy(input_ids=ids[None]).logits[0] / TEMPERATURE).log_softmax(dim=-1)
    return torch.stack([logprobs[n - 1, ids[n]] for n in range(len(prompt), len(ids))])


@pytest.fixture(scope="module")
def spy(folder: str) -> Spy:
    return fitted(folder, replay_share=1.0)


def fields(tree: Example) -> list[dict[str, np.ndarray]]:
    """The fields of each completion's tokens."""
    ends = np.cumsum([len(completion) for _, completion in sequences(tree)]).tolist()
    arrays = {name: value for name, value in tree.fields.items() if isinstance(value, np.ndarray)}
    return [{n: v[a:b] for n, v in arrays.items()} for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_replayed_ratios_are_those_to_the_policy_that_drew(spy: Spy, folder: str) -> None:
    drawn: dict[tuple[int, ...], list[list[float]]] = {}
    policy, farthest, replayed = naive_model(folder), 0.0, 0
    for iteration, (groups, trees) in enumerate(zip(spy.groups, spy.trees, strict=True)):
        policy.load_state_dict(spy.weights[iteration], strict=False)
        for tree in trees:
            again = "/replay/" in tree.row_id
            assert not (again and iteration == 0)
            for (prompt, completion), found in zip(sequences(tree), fields(tree), strict=True):
                with torch.no_grad():
                    today = token_logprobs(policy, prompt, completion)
                assert found["old_logprobs"] == pytest.approx(today.numpy(), abs=1e-5)
                if again:
                    # Exactly what was reported when it was sampled, in an earlier iteration.
                    assert found["sampling_logprobs"].tolist() in drawn[(*prompt, *completion)]
                    replayed += 1
                ratio = np.exp(today.numpy() - found["sampling_logprobs"])
                assert found["weights"] == pytest.approx(np.minimum(ratio, HIGHEST), rel=1e-4)
                moved = float(np.abs(today.numpy() - found["sampling_logprobs"]).max())
                farthest = max(farthest, moved) if again else farthest
                assert again or moved < 1e-5
        for row, group in enumerate(groups):
            for completion in group:
                drawn.setdefault((5 + row, 6, 7, *completion.token_ids), []).append(completion.logprobs)
    # The comparison is about something: policies differ, and some ratios are bounded.
    assert replayed > 6
    assert farthest > math.log(HIGHEST)


def test_loss_and_step_are_those_of_a_naive_computation(spy: Spy, folder: str) -> None:
    policy = naive_model(folder)
    for iteration, trees in enumerate(spy.trees):
        policy.load_state_dict(spy.weights[iteration], strict=False)
        policy.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for tree in trees:
            for (prompt, completion), found in zip(sequences(tree), fields(tree), strict=True):
                logprobs = token_logprobs(policy, prompt, completion)
                bounded = (logprobs.detach() - torch.from_numpy(found["sampling_logprobs"])).exp().clamp(max=HIGHEST)
                ratio = (logprobs - logprobs.detach()).exp()
                total = total - (torch.from_numpy(found["advantages"]) * bounded * ratio).sum()
                count += len(completion)
        (total / count).backward()
        assert spy.logged[iteration]["train/loss"] == pytest.approx(float(total.detach()) / count, abs=1e-5)
        for name, parameter in policy.named_parameters():
            if name in spy.weights[iteration]:
                step = (spy.weights[iteration][name] - spy.weights[iteration + 1][name]) / 5.0
                assert float((step - parameter.grad).norm()) <= 1e-5 * max(1.0, float(parameter.grad.norm()))
    # Without what came back, the loss of the last iteration would be another one.
    fresh = [tree for tree in spy.trees[-1] if "/replay/" not in tree.row_id]
    assert len(fresh) < len(spy.trees[-1])


def test_advantages_come_back_as_they_were(spy: Spy) -> None:
    had: dict[tuple[int, ...], list[float]] = {}
    for trees in spy.trees:
        for tree in trees:
            for (prompt, completion), found in zip(sequences(tree), fields(tree), strict=True):
                if "/replay/" in tree.row_id:
                    assert found["advantages"][0] in had[(*prompt, *completion)]
                else:
                    assert len(set(found["advantages"].tolist())) == 1
                    had.setdefault((*prompt, *completion), []).append(float(found["advantages"][0]))


def test_counts_are_logged(spy: Spy) -> None:
    kept = sum(np.any(f["advantages"] != 0) for tree in spy.trees[0] for f in fields(tree))
    assert [row.get("train/replay/completions") for row in spy.logged][:2] == [0.0, min(12.0, float(kept))]
    assert spy.logged[0]["train/replay/size"] == kept
    assert spy.logged[1]["train/replay/age"] == 1
    assert "train/replay/age" not in spy.logged[0]


@pytest.mark.parametrize(("options", "drawn"), [({"replay_share": 0.5}, 6), ({"replay_capacity": 2}, 2)])
def test_the_share_and_the_capacity_bound_what_comes_back(options: dict[str, Any], drawn: int, folder: str) -> None:
    found = fitted(folder, steps=2, **{"replay_share": 5.0, **options})
    assert found.logged[1]["train/replay/completions"] == drawn


# The buffer alone.


def record(number: int, *, priority: float = 1.0, iteration: int = 0, length: int = 2) -> Record:
    prompt, tokens = np.array([number, 7]), np.arange(number, number + length)
    values = [np.linspace(-1, -0.5, length) * (number + 1) * factor for factor in (1.0, 2.0, 0.5)]
    return Record(f"rows:{number}", iteration, priority, prompt, tokens, *values)


def buffer(**options: Any) -> ReplayBuffer:
    given = {"correction": "token_mask", "replay_capacity": 5, **options}
    return ReplayBuffer(OffPolicyCorrection(**given), seed=3)


def test_the_lowest_priority_leaves_and_of_equals_the_oldest() -> None:
    kept = buffer(replay_capacity=3)
    kept.add([record(0, priority=2.0), record(1), record(2)])
    kept.add([record(3), record(4, priority=0.5)])
    assert [r.row_id for r in kept.records] == ["rows:0", "rows:2", "rows:3"]


def test_the_age_is_bounded() -> None:
    kept = buffer(replay_max_age=2)
    kept.add([record(0, iteration=0), record(1, iteration=1), record(2, iteration=3)])
    assert {r.row_id for r in kept.draw(9, iteration=3)} == {"rows:1", "rows:2"}
    assert len(kept.records) == 2


def test_draws_are_in_proportion_to_priority_and_without_replacement() -> None:
    kept = buffer(replay_priority="frontier")
    weights = [1.0, 2.0, 4.0]
    kept.add([record(n, priority=weight) for n, weight in enumerate(weights)])
    pairs: Counter[tuple[str, ...]] = Counter()
    singles: Counter[str] = Counter()
    runs = 4000
    for iteration in range(runs):
        singles.update(r.row_id for r in kept.draw(1, iteration))
        found = kept.draw(2, iteration)
        pairs[tuple(r.row_id for r in found)] += 1
        assert [r.row_id for r in kept.draw(2, iteration)] == [r.row_id for r in found]
    for n, weight in enumerate(weights):
        assert abs(singles[f"rows:{n}"] / runs - weight / 7) < 4 * math.sqrt(0.25 / runs)
    # One after the other: first by weight, and then by weight among the others.
    for a in range(3):
        for b in range(a + 1, 3):
            expected = sum(weights[i] / 7 * weights[j] / (7 - weights[i]) for i, j in ((a, b), (b, a)))
            assert abs(pairs[f"rows:{a}", f"rows:{b}"] / runs - expected) < 4 * math.sqrt(0.25 / runs)


def test_priorities() -> None:
    values = {"advantages_n": np.array([-1.0, -3.0]), "sampling_logprobs_n": np.log([0.2, 0.8]), "spread": 0.4}
    assert replay_priority("uniform", **values) == 1
    assert replay_priority("frontier", **values) == 0.4
    assert replay_priority("hard_negative", **values) == pytest.approx(2 * math.sqrt(0.2 * 0.8))
    assert replay_priority("hard_negative", **values | {"advantages_n": np.array([1.0])}) == 0


def test_priorities_of_a_run(folder: str) -> None:
    negative = fitted(folder, steps=2, replay_priority="hard_negative", replay_share=1.0)
    again = [f for tree in negative.trees[1] if "/replay/" in tree.row_id for f in fields(tree)]
    assert again
    assert all(found["advantages"][0] < 0 for found in again)


def test_a_state_holds_everything(tmp_path: Path) -> None:
    whole = buffer()
    whole.add([record(n, priority=n + 0.5, iteration=n, length=n + 1) for n in range(4)])
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    again, smaller, nothing = buffer(), buffer(replay_capacity=2), buffer()
    for other in (again, smaller):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    nothing.load_state_dict(buffer().state_dict())
    assert not nothing.records
    assert [r.row_id for r in smaller.records] == ["rows:2", "rows:3"]
    for mine, other in zip(whole.records, again.records, strict=True):
        for name, value in vars(mine).items():
            assert np.array_equal(getattr(other, name), value), name
            assert type(getattr(other, name)) is type(value)
    assert str(again.draw(2, 1)[0].tokens) == str(whole.draw(2, 1)[0].tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": None}, "off_policy.replay_capacity is 5 without off_policy.correction, so that old"),
        ({"replay_capacity": -1}, "off_policy.replay_capacity is -1"),
        ({"replay_share": 0.0}, "off_policy.replay_share"),
        ({"replay_priority": "frontiers"}, "off_policy.replay_priority is 'frontiers'; it must be one of uniform"),
        ({"replay_max_age": 0}, "off_policy.replay_max_age is 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message) as error:
        buffer(**options)
    assert "\n" not in str(error.value)
