"""ProcessRewardModule against naive computations, as a user meets it, and what it refuses."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.datamodules import StepwiseDataModule
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import VOCAB_SIZE, char_tokenizer, save_tiny_model
from ..invariance.harness import trainer
from .naive import assert_gradient, naive_model, sequences, states, step

PLUS, MINUS = (char_tokenizer().convert_tokens_to_ids(text) for text in "+-")
TEXTS = [("1+2=?", "1+2=3\n#3"), ("2+2=?", "2+2=5\n5\n#5"), ("1+2=?", "#4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def solutions(count: int, *, soft: bool = False, outcomes: bool = False) -> list[Example]:
    """Random solutions of one to four steps with labels."""
    rng, rows = np.random.default_rng(3), []
    for n in range(count):
        lengths = rng.integers(1, 5, size=int(rng.integers(1, 5)))
        tokens = rng.integers(3, VOCAB_SIZE, size=int(lengths.sum()))
        weights = np.zeros(len(tokens))
        weights[lengths.cumsum() - 1] = 1
        labels = rng.random(len(lengths)).round(2) if soft else (rng.random(len(lengths)) > 0.4).astype(float)
        fields: dict[str, Any] = {"labels": labels.tolist()}
        if outcomes and n % 2:
            fields["outcome"] = bool(n % 3)
        prompt = rng.integers(3, VOCAB_SIZE, size=int(rng.integers(1, 7)))
        rows.append(Example(f"rows:{n}", Segment(prompt, children=(Segment(tokens, weights),)), fields))
    return rows


def ends(example: Example) -> list[int]:
    """Positions of the ends of steps, along the sequence."""
    (completion,) = example.root.children
    return [len(example.root.tokens) + int(i) for i in np.flatnonzero(completion.weights)]


def bce(logit: Tensor, label: float) -> Tensor:
    p = torch.sigmoid(logit)
    return -label * p.log() - (1 - label) * (1 - p).log()


def head_of(folder: str, **options: Any) -> Any:
    module = ProcessRewardModule(folder, **options)
    with trainer("64-true").strategy.precision_plugin.module_init_context():
        module._trainer = trainer("64-true")
        module.configure_model()
    return module.head


CASES: dict[str, dict[str, Any]] = {
    "hard": {},
    "soft-mlp": {"labels": "soft", "head": "mlp"},
    "tokens": {"head": "tokens", "labels": "soft"},
    "last-only": {"train_on_last_step_only": True},
    "outcome": {"outcome_head": True, "outcome_weight": 0.3},
    "learned": {"boundaries": "learned", "boundary_weight": 0.5},
    "tokens-outcome-learned": {"head": "tokens", "outcome_head": True, "boundaries": "learned"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_naive_gradient(case: str, folder: str) -> None:
    options = CASES[case]
    examples = solutions(6, soft=options.get("labels") == "soft", outcomes=True)
    model, head = naive_model(folder), head_of(folder, **options)
    outputs = ["step"] * (options.get("head") != "tokens") + ["outcome"] * ("outcome" in case)
    outputs += ["boundary"] * ("learned" in case)
    losses, outcome, boundary = [], [], []
    for example in examples:
        ((prompt, completion),) = sequences(example)
        hidden = states(model, prompt, completion)
        named = dict(zip(outputs, head(hidden)[:, 0].unbind(dim=1), strict=True)) if outputs else {}
        if options.get("head") == "tokens":
            logits = model.lm_head(hidden)
            named["step"] = logits[:, PLUS] - logits[:, MINUS]
        labels, places = example.fields["labels"], ends(example)
        steps = [bce(named["step"][place], label) for place, label in zip(places, labels, strict=True)]
        losses += steps[-1:] if options.get("train_on_last_step_only") else steps
        if "outcome" in case:
            outcome.append(bce(named["outcome"][places[-1]], float(example.fields.get("outcome", labels[-1]))))
        if "learned" in case:
            boundary += [
                bce(named["boundary"][i], float(i in places)) for i in range(len(prompt), len(prompt) + len(completion))
            ]
    loss = torch.stack(losses).mean()
    if outcome:
        loss = loss + options.get("outcome_weight", 1.0) * torch.stack(outcome).mean()
    if boundary:
        loss = loss + options.get("boundary_weight", 1.0) * torch.stack(boundary).mean()
    loss.backward()
    for variation in ({}, {"micro_batch_tokens": 20}, {"layout": "padded"}):
        found = step(ProcessRewardModule(folder, **options, **variation), examples)
        assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert_gradient(found.gradient, model)
        if outputs:
            assert_gradient(found.gradient, head, prefix="head.")


def test_metrics_are_those_of_the_steps(folder: str) -> None:
    examples, model, head = solutions(12), naive_model(folder), head_of(folder)
    right, hits = [], {True: [], False: []}
    for example in examples:
        ((prompt, completion),) = sequences(example)
        logits = head(states(model, prompt, completion))[:, 0, 0]
        said = [float(logits[place]) >= 0 for place in ends(example)]
        labels = [label == 1 for label in example.fields["labels"]]
        right += [a == b for a, b in zip(said, labels, strict=True)]
        wrong = False in labels
        first = said.index(False) if False in said else None
        hits[wrong].append(first == (labels.index(False) if wrong else None))
    with_error, without_error = (sum(hits[wrong]) / len(hits[wrong]) for wrong in (True, False))
    metrics = step(ProcessRewardModule(folder), examples).metrics
    assert metrics["train/step_accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["train/accuracy_with_error"] == pytest.approx(with_error)
    assert metrics["train/accuracy_without_error"] == pytest.approx(without_error)
    f1 = 2 * with_error * without_error / (with_error + without_error)
    assert metrics["train/first_error_f1"] == pytest.approx(f1)


# Scoring.


def naive_steps(folder: str, head: Any, prompt: str, steps: list[str]) -> list[float]:
    tokenizer, model = char_tokenizer(), naive_model(folder)
    tokens: list[int] = []
    places = []
    for text in steps:
        tokens += tokenizer(text + "\n")["input_ids"]
        places.append(len(tokenizer(prompt)["input_ids"]) + len(tokens) - 1)
    logits = head(states(model, tokenizer(prompt)["input_ids"], tokens).to(head.weight.dtype))[:, 0, 0]
    return [float(torch.sigmoid(logits[place])) for place in places]


@pytest.mark.parametrize("budget", [8192, 15])
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_score_steps_reads_every_step(budget: int, folder: str) -> None:
    module = ProcessRewardModule(folder, micro_batch_tokens=budget)
    prompts, completions = [p for p, _ in TEXTS], [c for _, c in TEXTS]
    found = module.score_steps(prompts, completions)
    assert [len(steps) for steps in found] == [2, 3, 1]
    for (prompt, completion), steps in zip(TEXTS, found, strict=True):
        assert steps == pytest.approx(naive_steps(folder, module.head, prompt, completion.split("\n")), abs=1e-5)
    lists = [completion.split("\n") for completion in completions]
    assert module.score_steps(prompts, lists) == found
    assert module.score_steps(prompts, [c + "\n" for c in completions]) == found


def test_scores_are_aggregated_steps(folder: str) -> None:
    prompts, completions = [p for p, _ in TEXTS], [c for _, c in TEXTS]
    steps = ProcessRewardModule(folder).score_steps(prompts, completions)
    rules = {"min": min, "product": math.prod, "last": lambda s: s[-1], "mean": lambda s: sum(s) / len(s)}
    for aggregation, rule in rules.items():
        module = ProcessRewardModule(folder, aggregation=aggregation)
        assert module.score(prompts, completions) == pytest.approx([rule(s) for s in steps], rel=1e-5)
    assert module.score([], []) == []


def test_predict_scores_rows(folder: str) -> None:
    module = ProcessRewardModule(folder)
    rows = [{"prompt": p, "completions": c.split("\n"), "labels": [1] * len(c.split("\n"))} for p, c in TEXTS]
    found = trainer("32-true").predict(module, StepwiseDataModule(predict=rows, global_batch_size=2))
    flat = [row for batch in found for row in batch]
    steps = module.score_steps([p for p, _ in TEXTS], [c for _, c in TEXTS])
    for row, expected in zip(flat, steps, strict=True):
        assert row["steps"] == pytest.approx(expected, abs=1e-6)
        assert row["score"] == pytest.approx(min(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], [], "given 1 prompts and 0 completions"),
        (["a"], ["\n\n"], "completion 0 has no steps"),
        (["a"], [[]], "completion 0 has no steps"),
    ],
)
def test_scoring_refuses_what_has_no_steps(folder: str, prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessRewardModule(folder).score_steps(prompts, completions)


@pytest.mark.parametrize("options", [{}, {"head": "mlp", "outcome_head": True}, {"head": "tokens"}, {"lora": {"r": 4}}])
def test_an_exported_model_scores_the_same_way(options: dict[str, Any], folder: str, tmp_path: Path) -> None:
    module = ProcessRewardModule(folder, step_separator="|", aggregation="mean", seed=5, **options)
    module.save_pretrained(str(tmp_path / "export"))
    again = ProcessRewardModule.from_pretrained(str(tmp_path / "export"))
    texts = ["1+2=?"], ["1+2=3|#3"]
    assert again.score(*texts) == module.score(*texts)
    assert len(again.score_steps(*texts)[0]) == 2
    with pytest.raises(ValueError, match="holds no model that RewardModule exported"):
        RewardModule.from_pretrained(str(tmp_path / "export"))


# Learning.


def sums(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        wrong = n % 2
        rows.append(
            {"prompt": f"{n}+1=?", "completions": [f"{n}+1={n + 1 + wrong}", "ok"], "labels": [1 - wrong, 1 - wrong]}
        )
    return rows


@pytest.mark.parametrize("options", [{}, {"head": "tokens"}, {"outcome_head": True, "lora": {"r": 8}}])
def test_it_fits_a_few_solutions(folder: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = ProcessRewardModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-2), **options)
    run = trainer("32-true", max_epochs=30)
    run.fit(module, StepwiseDataModule(train=sums(8), val=sums(8), global_batch_size=4))
    assert float(run.callback_metrics["val/first_error_f1"]) == 1.0
    assert float(run.callback_metrics["val/step_accuracy"]) == 1.0


def test_learned_boundaries_find_steps_without_separators(folder: str) -> None:
    torch.manual_seed(0)
    rows = [{"prompt": f"{n}?", "completions": [f"a{n};", f"bb{n};"], "labels": [1, n % 2]} for n in range(8)]
    module = ProcessRewardModule(folder, boundaries="learned", optimizer=partial(torch.optim.AdamW, lr=1e-2))
    data = StepwiseDataModule(train=rows, val=rows, global_batch_size=8, step_separator=" ")
    run = trainer("32-true", max_epochs=60)
    run.fit(module, data)
    assert float(run.callback_metrics["val/boundary_accuracy"]) == 1.0
    prompts = [row["prompt"] for row in rows]
    found = module.score_steps(prompts, [" ".join(row["completions"]) + " " for row in rows])
    module.options.step_separator = " "
    given = module.score_steps(prompts, [row["completions"] for row in rows])
    assert [len(steps) for steps in found] == [2] * 8
    for a, b in zip(found, given, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "row rows:0 has 2 steps and no labels"),
        ({"labels": [1.0]}, "row rows:0 has 2 steps and 1 labels; it must have one label for each"),
        ({"labels": [1.0, 0.7]}, "row rows:0 has the label 0.7 at step 2; hard labels are 0 or 1: set labels='soft'"),
        ({"labels": [1.0, 1.5]}, "row rows:0 has the label 1.5 at step 2; it must be in [0, 1]"),
        ({"labels": [1.0, "good"]}, "row rows:0 has the label 'good' at step 2"),
        ({"labels": [1.0, 0.0], "outcome": "yes"}, "row rows:0 has the outcome 'yes'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fields: dict[str, Any], message: str, folder: str) -> None:
    root = Segment([5, 6], children=(Segment([7, 8, 9], [1, 0, 1]),))
    with pytest.raises(ValueError, match=re.escape(message)):
        step(ProcessRewardModule(folder), [Example("rows:0", root, fields)])


def test_labels_that_do_not_match_steps_are_refused_by_the_datamodule(folder: str) -> None:
    rows = [{"prompt": "a", "completions": ["b", "c"], "labels": [1]}]
    with pytest.raises(ValueError, match="2 completions but 1 labels"):
        trainer("32-true", max_epochs=1).fit(ProcessRewardModule(folder), StepwiseDataModule(train=rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "crisp"}, "labels is 'crisp'; it must be one of hard, soft"),
        ({"head": "token"}, "head is 'token'; it must be one of linear, mlp, tokens; did you mean 'tokens'?"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
        ({"step_separator": ""}, "step_separator is ''"),
        ({"outcome_weight": -1.0}, "outcome_weight is -1.0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ProcessRewardModule("nowhere", **options)


def test_label_tokens_must_be_tokens(folder: str) -> None:
    module = ProcessRewardModule(folder, head="tokens", label_tokens=("yes", "no"))
    with pytest.raises(ValueError, match="label_tokens has 'yes', which is 3 tokens"):
        module.configure_model()


def test_predict_needs_no_batch_size(folder: str) -> None:
    module = ProcessRewardModule(folder)
    examples = solutions(5)
    module.configure_model()
    whole = module.predict_step(ExampleBatch(examples), 0)
    parts = [module.predict_step(ExampleBatch([example]), 0)[0] for example in examples]
    for a, b in zip(whole, parts, strict=True):
        assert a["steps"] == pytest.approx(b["steps"], abs=1e-6)
