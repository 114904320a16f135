"""What GRPO and PPO share: rollouts that depend on nothing they should not, rewards that fail, resuming, bad input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.callbacks import TrainingCheckpoint
from rlhf_lightning.datamodules import PromptDataModule
from rlhf_lightning.inference import derive_seed
from rlhf_lightning.rl.on_policy_module import OnPolicyModule
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..modules.naive import step
from .fixed_rollouts import prompts

METHODS: dict[str, type[OnPolicyModule]] = {"grpo": GRPOModule, "ppo": PPOModule}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", initializer_range=0.1))


def spread(completions: Sequence[str]) -> list[float]:
    """How many different characters a completion has."""
    return [float(len(set(text))) for text in completions]


def module(folder: str, cls: type[OnPolicyModule] = GRPOModule, **options: Any) -> OnPolicyModule:
    given = {"rewards": [spread], "num_generations": 3, "max_completion_length": 8, "seed": 5, **options}
    return cls(folder, **given)


def drawn(made: OnPolicyModule, rows: Sequence[Example], **options: Any) -> dict[str, list[list[int]]]:
    made.configure_model()
    rollouts = made.rollout(rows, **options)
    return {
        prompt.row_id: [sample.token_ids for sample in group]
        for prompt, group in zip(rollouts.prompts, rollouts.completions, strict=True)
    }


def test_a_sample_depends_on_its_seed_alone(folder: str) -> None:
    rows = prompts(5)
    together = drawn(module(folder), rows)
    state = torch.get_rng_state()
    assert drawn(module(folder, micro_batch_tokens=1), rows) == together
    assert drawn(module(folder, sampling={"generation_batch_tokens": 1}), rows) == together
    assert drawn(module(folder), rows[::-1]) == together
    for speculation in ("ngram", {"draft": folder}, {"early_exit": 1}):
        assert drawn(module(folder, sampling={"speculation": speculation}), rows) == together
    one_by_one: dict[str, list[list[int]]] = {}
    made = module(folder)
    for row in rows:
        one_by_one |= drawn(made, [row])
    assert one_by_one == together
    assert drawn(made, []) == {}
    assert torch.equal(torch.get_rng_state(), state), "sampling used the global random state"


def test_what_a_seed_is_made_of(folder: str) -> None:
    """Every part of (seed, iteration, row, attempt, sample) gives other samples."""
    row = prompts(1)
    made = module(folder)
    first = drawn(made, row)[row[0].row_id]
    assert len({tuple(tokens) for tokens in first}) == 3
    assert drawn(made, row)[row[0].row_id] == first
    others = [
        drawn(made, [Example("rows:9", row[0].root)])["rows:9"],
        drawn(made, row, attempt=1)[row[0].row_id],
        drawn(made, row, stage="val")[row[0].row_id],
        drawn(module(folder, seed=6), row)[row[0].row_id],
    ]
    made.iteration = 1
    others.append(drawn(made, row)[row[0].row_id])
    assert all(other != first for other in others)
    assert drawn(made, row, stage="val")[row[0].row_id] == others[2], "validation depends on the iteration"
    engine = made._engine
    assert engine is not None
    seeds = [[derive_seed(derive_seed(5, 1, row[0].row_id, 0), sample) for sample in range(3)]]
    again = engine.generate([row[0].root.tokens.tolist()], 3, made.sampling, seeds=seeds)
    assert [sample.token_ids for sample in again[0]] == others[-1]


# Rewards.


def fragile(completions: Sequence[str]) -> list[float]:
    if any("a" in text for text in completions):
        raise RuntimeError("no a, please")
    return [1.0] * len(completions)


@pytest.mark.parametrize("cls", METHODS.values())
def test_a_reward_that_raises_costs_its_samples(cls: type[OnPolicyModule], folder: str) -> None:
    """Those it fails on are counted, and the step is that of the others."""
    made = module(folder, cls, rewards=[fragile, spread], num_generations=8)
    found = step(made, prompts(6))
    assert made.last_rollouts is not None
    texts = [sample.text for group in made.last_rollouts.completions for sample in group]
    failed = sum("a" in text for text in texts)
    assert 0 < failed < len(texts)
    assert found.metrics["train/rewards/fragile/failures"] == failed
    assert found.metrics["train/rewards/fragile/scored"] == pytest.approx(1 - failed / len(texts))
    assert found.metrics["train/rewards/fragile/mean"] == 1.0
    assert found.metrics["train/rewards/spread/failures"] == 0
    assert made.last_rollouts.errors["fragile"].endswith("no a, please")
    assert any(float(gradient.norm()) > 0 for gradient in found.gradient.values())


def test_ppo_drops_what_could_not_be_scored(folder: str) -> None:
    made = module(folder, PPOModule, rewards=[fragile], num_generations=8, num_updates=1)
    kept: list[Example] = []
    optimize = made.optimize

    def watched(examples: list[Example]) -> Any:
        kept.extend(examples)
        return optimize(examples)

    made.optimize = watched  # type: ignore[method-assign, assignment]
    step(made, prompts(6))
    assert made.last_rollouts is not None
    good = [sample.token_ids for group in made.last_rollouts.completions for sample in group if "a" not in sample.text]
    assert [child.tokens.tolist() for tree in kept for child in tree.root.children] == good


def test_every_sample_fails(folder: str) -> None:
    """Nothing can be learned, and the run continues."""

    def broken(completions: Sequence[str]) -> list[float]:
        raise RuntimeError("away")

    for cls in METHODS.values():
        found = step(module(folder, cls, rewards=[broken]), prompts(3))
        assert found.metrics["train/rewards/broken/failures"] == 9
        assert "train/reward" not in found.metrics
        # Policies still pay for their entropy and divergence, which are 0 here.
        assert all(float(gradient.abs().sum()) == 0 for gradient in found.gradient.values())


class Away:
    """A reward that fails wholly in some of its calls for a batch, and on some samples alone in all others."""

    def __init__(self, *, fails_in: set[int], cls: type[Exception] = RuntimeError) -> None:
        self.fails_in, self.cls, self.batches = fails_in, cls, -1

    def __call__(self, completions: Sequence[str]) -> list[Any]:
        self.batches += 1
        error = self.cls(f"the server\nis away in {self.batches}")
        return [error if self.batches in self.fails_in or n == 0 else 1.0 for n in range(len(completions))]


def train(made: OnPolicyModule, iterations: int, ckpt_path: Any = None, callbacks: Any = ()) -> Any:
    rows = [{"prompt": f"{n}+{n}="} for n in range(2 * iterations)]
    run = trainer("32-true", max_steps=-1, max_epochs=1, callbacks=[*callbacks], enable_checkpointing=bool(callbacks))
    run.fit(made, PromptDataModule(train=rows, global_batch_size=2, shuffle=False), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("cls", METHODS.values())
def test_a_reward_that_only_fails_ends_the_run(cls: type[OnPolicyModule], folder: str) -> None:
    """In the third iteration in a row without a single score, before its step; others next to it do not help."""
    made = module(folder, cls, rewards=[spread, Away(fails_in={1, 2, 3})])
    with pytest.raises(ValueError, match="in a row") as error:
        train(made, 6)
    assert str(error.value) == (
        "reward 'Away' failed on every sample of 3 iterations in a row, at last with RuntimeError: the server is away "
        "in 3: fix or remove it, then resume from the last checkpoint"
    )
    assert made.iteration == 3


def test_a_reward_that_comes_back_does_not(folder: str) -> None:
    made = module(folder, rewards=[Away(fails_in={0, 1, 3, 4})])
    train(made, 6)
    assert made.iteration == 6


def test_nothing_to_say_is_no_failure(folder: str) -> None:
    def silent(completions: Sequence[str]) -> list[None]:
        return [None] * len(completions)

    made = module(folder, rewards=[silent, spread])
    train(made, 5)
    assert made.iteration == 5


def test_failures_are_counted_on_where_a_run_is_resumed(folder: str, tmp_path: Path) -> None:
    """Two iterations before the interruption and one after it are three in a row."""
    saver = TrainingCheckpoint(str(tmp_path), every_n_steps=1, keep=99)
    train(module(folder, rewards=[Away(fails_in={1, 2})]), 5, callbacks=[saver])
    last = tmp_path / "step=3.ckpt"
    made = module(folder, rewards=[Away(fails_in={0})])
    with pytest.raises(ValueError, match="'Away' failed on every sample of 3 iterations in a row"):
        train(made, 5, ckpt_path=last)
    assert made.iteration == 3
    made = module(folder, rewards=[Away(fails_in={1})])
    train(made, 5, ckpt_path=last)
    assert made.iteration == 5


BAD_VALUES: list[tuple[Any, str]] = [
    (lambda completions: [1.0], "returned 1 values for 6 completions: return one each"),
    (lambda completions: [float("nan")] * len(completions), "returned nan (float) for sample 0: return a finite"),
    (lambda completions: ["good"] * len(completions), "returned 'good' (str) for sample 0: return a finite number"),
    (lambda completions: 1.0, "returned 1.0 (float): return a list of one number or None per completion"),
]


@pytest.mark.parametrize(("reward", "message"), BAD_VALUES)
def test_what_is_no_reward(reward: Any, message: str, folder: str) -> None:
    """The run stops before anything is changed: weights and the place in the data are those before the batch."""
    made = module(folder, rewards=[reward])
    consumed: list[int] = []
    batch = ExampleBatch(prompts(2), on_consumed=lambda: consumed.append(1))
    run = trainer("32-true", max_steps=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        run.fit(made, Batches(batch))
    assert not consumed
    assert made.iteration == 0
    before = module(folder)
    before.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), before.parameters(), strict=True))


def test_what_is_no_reward_may_be_skipped(folder: str) -> None:
    def sometimes(completions: Sequence[str]) -> list[float]:
        return [float("nan") if "a" in text else 1.0 for text in completions]

    made = module(folder, rewards=[sometimes, spread], on_bad_reward="skip", num_generations=8)
    found = step(made, prompts(6))
    assert made.last_rollouts is not None
    texts = [sample.text for group in made.last_rollouts.completions for sample in group]
    assert found.metrics["train/rewards/sometimes/failures"] == sum("a" in text for text in texts) > 0


# Bad input.


def fails(made: OnPolicyModule, rows: list[Example]) -> str:
    with pytest.raises(ValueError, match=" ") as error:
        trainer("32-true", max_steps=1).fit(made, Batches(ExampleBatch(rows)))
    assert "\n" not in str(error.value).replace("\\n", "")
    return str(error.value)


def test_a_missing_column(folder: str) -> None:
    rows = [Example("rows:0", Segment([5, 6]), {"prompt": "ab", "solution": "3"})]
    message = fails(module(folder, rewards=["rlhf_lightning.rewards.exact_answer"]), rows)
    assert (
        message == "reward 'exact_answer' needs the column 'answer': the rows have completion_ids, prompt_ids, solution"
    )


def test_a_prompt_that_leaves_no_room(folder: str) -> None:
    message = fails(module(folder, max_completion_length=100), [Example("rows:0", Segment([5] * 30))])
    assert message == (
        "row rows:0 has 30 tokens, and with max_completion_length=100 they exceed the model's 128 positions: set the "
        "datamodule's max_length to 28, or lower max_completion_length"
    )


def test_rows_with_completions(folder: str) -> None:
    row = Example("rows:0", Segment([5], children=(Segment([6], [1]), Segment([7], [1]))))
    assert fails(module(folder), [row]) == (
        "row rows:0 already has 2 completions; GRPOModule writes its own: use PromptDataModule"
    )


def test_completions_that_cannot_end(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama", eos_token_id=None)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<eos>",', ""))
    assert "has no end-of-sequence token, without which no completion can end" in fails(module(str(folder)), prompts(1))


def test_stop_strings(folder: str) -> None:
    made = module(folder, sampling={"stop": ["a", "1"]}, num_generations=16)
    metrics = step(made, prompts(4)).metrics
    assert made.last_rollouts is not None
    samples = [sample for group in made.last_rollouts.completions for sample in group]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert metrics["train/completions/clipped_ratio"] == pytest.approx(1 - len(stopped) / len(samples))
    assert not any("a" in sample.text or "1" in sample.text for sample in samples)
    assert len(stopped) > 8


# Validation, prediction.


def test_validation_does_not_depend_on_its_batches(folder: str) -> None:
    rows = prompts(5)
    found = []
    for sizes in ([5], [2, 3], [1] * 5):
        batches, start = [], 0
        for size in sizes:
            batches.append(ExampleBatch(rows[start : start + size]))
            start += size
        found.append(trainer().validate(module(folder), Batches(*batches), verbose=False)[0])
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])
    texts = [sample.text for row in rows for sample in rollout_of(module(folder), row)]
    assert found[0]["val/reward"] == pytest.approx(sum(len(set(text)) for text in texts) / 15)


def rollout_of(made: OnPolicyModule, row: Example) -> Any:
    made.configure_model()
    made.double()
    return made.rollout([row], stage="val").completions[0]


def test_prediction(folder: str) -> None:
    made = module(folder)
    found = trainer("32-true").predict(made, Batches(ExampleBatch(prompts(2))))
    assert found is not None
    rows: Any = found[0]
    assert [row["row_id"] for row in rows] == ["rows:0", "rows:1"]
    assert all(row["rewards"] == spread(row["completions"]) for row in rows)
    assert all(len(row["completions"]) == 3 for row in rows)


def test_schedule_counts_every_update(folder: str) -> None:
    made = module(folder, num_updates=3, num_mini_batches=2)
    rows = [{"prompt": f"{n}"} for n in range(8)]
    run = trainer("32-true", max_epochs=2, limit_train_batches=2)
    run.fit(made, PromptDataModule(train=rows, global_batch_size=4))
    assert run.global_step == made.num_steps() == 2 * 2 * 3 * 2
    assert made.iteration == 4
    run = trainer("32-true", max_steps=5)
    made = module(folder, num_updates=3, num_mini_batches=2)
    run.fit(made, PromptDataModule(train=rows, global_batch_size=4))
    # An iteration is made to its end: the limit of 5 is passed by its sixth update.
    assert run.global_step == made.num_steps() == 6
