"""Process reward models that learn from pairs alone, and their scores of branches, against naive computations."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import ProcessRewardModule
from rlhf_lightning.datamodules import StepwiseDataModule
from rlhf_lightning.models import ProcessRewardModel
from rlhf_lightning.sequences import Example

from ..datamodules.toys import chars, complaint, ids
from ..helpers import save_tiny_model
from ..invariance.harness import trainer
from ..invariance.methods import solutions, step_pairs
from .naive import assert_gradient, naive_model, sequences, states, step
from .test_process_reward import TEXTS, head_of

RULES: dict[str, Any] = {
    "min": lambda z: z.min(),
    "last": lambda z: z[-1],
    "mean": lambda z: z.mean(),
    "product": lambda z: torch.sigmoid(z).prod().log(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def scores(example: Example, model: Any, head: Any, options: dict[str, Any]) -> list[Tensor]:
    """The scores of both solutions of a pair."""
    found = []
    for (prompt, completion), child in zip(sequences(example), example.root.children, strict=True):
        places = [len(prompt) + int(i) for i in child.weights.nonzero()[0]]
        outputs = head(states(model, prompt, completion))[:, 0]
        score = options.get("step_weight", 1.0) * RULES[options.get("aggregation", "min")](outputs[places, 0])
        found.append(score + outputs[places[-1], 1] if options.get("outcome_head") else score)
    return found


@pytest.mark.parametrize("aggregation", RULES)
@pytest.mark.parametrize("outcome", [False, True])
def test_a_step_is_the_naive_gradient(aggregation: Any, outcome: bool, folder: str) -> None:
    options: dict[str, Any] = {"learn_from": "pairs", "aggregation": aggregation}
    options |= {"outcome_head": True, "step_weight": 0.3} if outcome else {}
    examples, model, head = step_pairs(5), naive_model(folder), head_of(folder, **options)
    pairs = [scores(example, model, head, options) for example in examples]
    loss = -torch.stack([torch.sigmoid(chosen - rejected).log() for chosen, rejected in pairs]).mean()
    loss.backward()
    for variation in ({}, {"micro_batch_tokens": 20}, {"layout": "padded"}):
        found = step(ProcessRewardModule(folder, **options, **variation), examples)
        assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert_gradient(found.gradient, model)
        assert_gradient(found.gradient, head, prefix="head.")
    right = [float(chosen > rejected) for chosen, rejected in pairs]
    assert found.metrics["train/rewards/accuracies"] == pytest.approx(sum(right) / 5)
    margins = [(chosen - rejected).item() for chosen, rejected in pairs]
    assert found.metrics["train/rewards/margins"] == pytest.approx(sum(margins) / 5, rel=1e-5)
    assert "train/step_accuracy" not in found.metrics


def test_boundaries_are_learned_along_with_pairs(folder: str) -> None:
    options = {"learn_from": "pairs", "boundaries": "learned", "boundary_weight": 0.5}
    examples, model, head = step_pairs(4), naive_model(folder), head_of(folder, **options)
    losses, ends = [], []
    for example in examples:
        chosen, rejected = scores(example, model, head, options)
        losses.append(-torch.sigmoid(chosen - rejected).log())
        for (prompt, completion), child in zip(sequences(example), example.root.children, strict=True):
            logits = head(states(model, prompt, completion))[:, 0, 1][len(prompt) :]
            ends += [-torch.sigmoid(z if end else -z).log() for z, end in zip(logits, child.weights, strict=True)]
    loss = torch.stack(losses).mean() + 0.5 * torch.stack(ends).mean()
    loss.backward()
    found = step(ProcessRewardModule(folder, **options), examples)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(found.gradient, head, prefix="head.")


def pairs_of_sums(count: int) -> list[dict[str, Any]]:
    """The chosen solution has a right first step; nothing says which step is wrong."""
    return [
        {"prompt": f"{n}+1=?", "chosen": [f"{n}+1={n + 1}", "ok"], "rejected": f"{n}+1={n + 2}\nok"}
        for n in range(count)
    ]


@pytest.mark.parametrize("options", [{}, {"outcome_head": True, "aggregation": "mean"}])
def test_it_learns_which_step_is_wrong_from_pairs(folder: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = partial(torch.optim.AdamW, lr=1e-2)
    module = ProcessRewardModule(folder, learn_from="pairs", optimizer=build, **options)
    rows = pairs_of_sums(8)
    run = trainer("32-true", max_epochs=30)
    run.fit(module, StepwiseDataModule(train=rows, val=rows, global_batch_size=4))
    assert float(run.callback_metrics["val/rewards/accuracies"]) == 1.0
    assert float(run.callback_metrics["val/loss"]) < 0.1

    module.save_pretrained(str(tmp_path / "export"))
    model = ProcessRewardModel.from_pretrained(str(tmp_path / "export"))
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = [row["chosen"] for row in rows], [row["rejected"] for row in rows]
    assert min(model.preferences(prompts, chosen, rejected)) > 0.9
    assert max(model.preferences(prompts, rejected, chosen)) < 0.1
    if not options:  # the first step alone tells them apart
        first = model.preferences(prompts, [steps[:1] for steps in chosen], [text.split("\n")[:1] for text in rejected])
        assert sum(p > 0.5 for p in first) >= 7


@pytest.mark.parametrize("aggregation", RULES)
@pytest.mark.parametrize("options", [{}, {"outcome_head": True, "step_weight": 0.7, "head": "mlp"}])
def test_combined_scores_and_preferences(aggregation: Any, options: dict[str, Any], folder: str) -> None:
    model = ProcessRewardModule(folder, **options).eval().scorer()
    prompts, completions = [p for p, _ in TEXTS], [c for _, c in TEXTS]
    steps = model.score_steps(prompts, completions)
    expected = []
    for number, probabilities in enumerate(steps):
        value = RULES[aggregation](torch.tensor(probabilities, dtype=torch.float64).logit())
        score = options.get("step_weight", 1.0) * float(value)
        if options.get("outcome_head"):
            tree = model.encode(prompts[number], completions[number])
            score += float(model.score_trees([tree])[0][-1, 2].double().logit())
        expected.append(score)
    found = model.combined_scores(prompts, completions, aggregation=aggregation)
    assert found == pytest.approx(expected, abs=1e-4)
    swapped = [completions[0], completions[2], completions[1]]
    others = model.combined_scores(prompts, swapped, aggregation=aggregation)
    wins = model.preferences(prompts, completions, swapped, aggregation=aggregation)
    assert wins == pytest.approx([1 / (1 + math.exp(b - a)) for a, b in zip(found, others, strict=True)], abs=1e-5)
    assert wins[0] == pytest.approx(0.5)
    assert model.combined_scores([], []) == []
    if options:
        alone = model.combined_scores(prompts, completions, step_weight=0.0)
        assert alone == model.combined_scores(prompts, completions, step_weight=0.0, aggregation=aggregation)
    with pytest.raises(ValueError, match="prompts has 3 entries and first 1"):
        model.preferences(prompts, completions[:1], completions)
    with pytest.raises(ValueError, match="aggregation is 'max'; it must be one of"):
        model.combined_scores(prompts, completions, aggregation="max")


def test_pairs_are_read_from_lists_and_texts() -> None:
    rows = [
        {"prompt": "1", "chosen": "a\n\nb", "rejected": ["c"], "source": "x"},
        {"prompt": "1", "chosen": '["a", "b"]', "rejected": "[c\n"},
    ]
    data = StepwiseDataModule(train=rows, tokenizer=chars(), global_batch_size=2, shuffle=False)
    [[one, two]] = data.train_dataloader()
    assert one.fields == {"source": "x"}
    for example, rejected in ((one, "c\n"), (two, "[c\n")):
        chosen, other = example.root.children
        assert example.root.tokens.tolist() == ids("1")
        assert chosen.tokens.tolist() == ids("a\nb\n")
        assert chosen.weights.tolist() == [0, 1, 0, 1]
        assert other.tokens.tolist() == ids(rejected)
        assert other.weights.tolist() == [0] * (len(rejected) - 1) + [1]
    for row, message in (
        ({"chosen": "a", "rejected": "a\n"}, "chosen and rejected have the same tokens"),
        ({"chosen": " \n", "rejected": "a"}, "'chosen' is no solution in steps"),
        ({"chosen": 3, "rejected": "a"}, "'chosen' is no solution in steps"),
        ({"chosen": "a", "rejected": None}, "no column 'completions'"),
    ):
        bad = StepwiseDataModule(train=[{"prompt": "1", **row}], tokenizer=chars(), global_batch_size=2)
        assert message in complaint(bad.setup, "fit")


def test_predictions_of_pairs(folder: str) -> None:
    module = ProcessRewardModule(folder, learn_from="pairs")
    rows = pairs_of_sums(2)
    [[row, _]] = trainer("32-true").predict(module, StepwiseDataModule(predict=rows, global_batch_size=2))
    expected = module.score_steps([rows[0]["prompt"]] * 2, [rows[0]["chosen"], rows[0]["rejected"]])
    for found, steps, score in zip(row["steps"], expected, row["score"], strict=True):
        assert found == pytest.approx(steps, abs=1e-6)
        assert score == pytest.approx(min(steps), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_from": "pair"}, "learn_from is 'pair'; it must be one of labels, pairs"),
        ({"learn_from": "pairs", "train_on_last_step_only": True}, "train_on_last_step_only is of labels"),
        ({"step_weight": -1.0}, "step_weight is -1.0; it must be at least 0"),
        ({"step_weight": 0.0}, "step_weight is 0 without an outcome head"),
    ],
)
def test_options(options: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ProcessRewardModule(folder, **options)


def test_rows_of_the_other_kind_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"row rows:0 has \d steps; learn_from='pairs' needs a chosen and a rejected"):
        step(ProcessRewardModule(folder, learn_from="pairs"), solutions(1))
    with pytest.raises(ValueError, match=r"\d and \d steps and no labels.*for pairs learn_from='pairs'"):
        step(ProcessRewardModule(folder, labels="soft"), step_pairs(1))
