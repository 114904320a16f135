"""Pairs of a prompt share its weight: InstructGPT's 1 / C(K, 2)."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_lightning import RewardModule
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..modules.naive import assert_gradient, naive_model, sequences, states, step


def ranked() -> list[Example]:
    """Three prompts; two, three and four of their completions were ranked: one, three and six pairs, mixed."""
    rng, rows = np.random.default_rng(0), []
    for prompt, count in enumerate((2, 3, 4)):
        root = rng.integers(3, 60, size=4 + prompt)
        completions = [Segment(t, np.ones(len(t))) for t in (rng.integers(3, 60, size=3 + n) for n in range(count))]
        for better, worse in combinations(completions, 2):
            rows.append(Example(f"rows:{prompt}/{len(rows)}", Segment(root, children=(better, worse))))
    return [rows[n] for n in rng.permutation(len(rows))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2"))


def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs(folder: str) -> None:
    rows = ranked()
    module = RewardModule(folder, average_over="prompts", micro_batch_tokens=40)
    model = naive_model(folder)
    head = RewardModule(folder)
    head.configure_model()
    weight = head.head.weight.detach().double()[0, 0]
    by_prompt: dict[bytes, list[torch.Tensor]] = {}
    for row in rows:
        chosen, rejected = (states(model, *sequence)[-1] @ weight for sequence in sequences(row))
        by_prompt.setdefault(row.root.tokens.tobytes(), []).append(-F.logsigmoid(chosen - rejected))
    assert sorted(map(len, by_prompt.values())) == [1, 3, 6]
    loss = torch.stack([torch.stack(losses).mean() for losses in by_prompt.values()]).mean()
    loss.backward()
    found = step(module, rows)
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    own = {name: gradient for name, gradient in found.gradient.items() if "lm_head" not in name}
    assert_gradient(own, model.transformer, "model.transformer.", tol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"num_models": 2}, {"num_models": 2, "ensemble": "adapters", "lora": {"r": 2}}]
)
def test_no_budget_and_no_evaluation_batch_changes_it(folder: str, options: dict[str, Any]) -> None:
    rows, found, scored = ranked(), [], []
    for budget, size in ((30, 3), (8192, 10)):
        torch.manual_seed(0)
        module = RewardModule(
            folder,
            average_over="prompts",
            micro_batch_tokens=budget,
            optimizer=partial(torch.optim.SGD, lr=0.0),
            **options,
        )
        run = trainer("64-true", max_epochs=1, num_sanity_val_steps=0)
        run.fit(module, Batches(ExampleBatch(rows)))
        found.append([float(run.callback_metrics[f"train/{name}"]) for name in ("loss", "grad_norm")])
        batches = [ExampleBatch(rows[n : n + size]) for n in range(0, len(rows), size)]
        scored.append(trainer("64-true").validate(module, Batches(*batches), verbose=False)[0]["val/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert scored[0] == pytest.approx(scored[1], rel=1e-6)


def test_ratings_have_no_pairs() -> None:
    with pytest.raises(
        ValueError, match=r"^average_over is 'prompts' with loss_type 'mse', which has no pairs: use .*"
    ):
        RewardModule("model", average_over="prompts", loss_type="mse", attributes=["good"])
    with pytest.raises(ValueError, match=r"^average_over is 'prompt'; it must be one of pairs, prompts; did you mean"):
        RewardModule("model", average_over="prompt")  # type: ignore[arg-type]
