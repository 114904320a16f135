"""RewardModule against naive computations, with transformers' classifier, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.core.reward_rows import bootstrap_weights
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import char_tokenizer, save_tiny_model, tiny_config, tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import demonstrations, pairs
from .naive import assert_gradient, naive_model, sequences, states, step

ROWS = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1} or so"} for n in range(1, 14)]
PROMPTS = ["1+1=", "2+2=", "1+1=", "2+2=", "1+1="]
COMPLETIONS = ["2", "four", "three or more", "4", "eleven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def with_fields(examples: list[Example], fields: list[dict[str, Any]]) -> list[Example]:
    return [Example(e.row_id, e.root, f) for e, f in zip(examples, fields, strict=True)]


def head_of(folder: str, **options: Any) -> Any:
    """The head that a module begins with, in fp64."""
    module = RewardModule(folder, **options)
    with trainer("64-true").strategy.precision_plugin.module_init_context():
        module._trainer = trainer("64-true")
        module.configure_model()
    return module.head


def naive_rewards(model: Any, head: Any, example: Example, pooling: str = "last") -> list[Tensor]:
    """(M, K) of each sequence."""
    found = []
    for prompt, completion in sequences(example):
        hidden = states(model, prompt, completion)
        vector = hidden[-1] if pooling == "last" else hidden[len(prompt) :].mean(dim=0)
        found.append(head(vector[None])[0])
    return found


PAIR_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean-mlp": {"pooling": "mean", "head": "mlp"},
    "smoothed-centred": {
        "label_smoothing": 0.1,
        "center_rewards_coefficient": 0.05,
        "l2_coefficient": 0.02,
        "margin": 0.3,
    },
    "attributes": {"num_attributes": 3, "attribute_weights": [0.5, 2.0, -1.0]},
    "ensemble": {"num_models": 3, "head": "mlp", "seed": 2},
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_a_step_on_pairs_is_the_naive_gradient(case: str, folder: str) -> None:
    options = PAIR_CASES[case]
    fields = [{"margin": 0.5}, {}, {"margin": -1}, {"margin": None}, {"margin": 2.0}]
    examples = with_fields(pairs(5), fields)
    model, head = naive_model(folder), head_of(folder, **options)
    members = options.get("num_models", 1)
    counts = bootstrap_weights([e.row_id for e in examples], members, options.get("seed", 0))
    weights = torch.tensor(options.get("attribute_weights", [1.0]), dtype=torch.float64)
    smoothing, losses = options.get("label_smoothing", 0.0), []
    for n, example in enumerate(examples):
        chosen, rejected = (r @ weights for r in naive_rewards(model, head, example, options.get("pooling", "last")))
        margin = example.fields.get("margin")
        margin = options.get("margin", 0.0) if margin is None else margin
        for m in range(members):
            p = torch.sigmoid(chosen[m] - rejected[m] - margin)
            loss = -(1 - smoothing) * p.log() - smoothing * (1 - p).log()
            loss = loss + options.get("center_rewards_coefficient", 0) * (chosen[m] + rejected[m]) ** 2
            loss = loss + options.get("l2_coefficient", 0) * (chosen[m] ** 2 + rejected[m] ** 2)
            losses.append(loss * (counts[n, m] if members > 1 else 1))
    loss = torch.stack(losses).sum() / (5 * members)
    loss.backward()
    found = step(RewardModule(folder, micro_batch_tokens=40, **options), examples)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(found.gradient, model)
    assert_gradient(found.gradient, head, prefix="head.")


def test_ties_pull_rewards_together(folder: str) -> None:
    threshold = 0.4
    examples = with_fields(pairs(4), [{"tie": True}, {}, {"tie": False}, {"tie": True}])
    model, head, losses = naive_model(folder), head_of(folder), []
    for example in examples:
        chosen, rejected = (r[0, 0] for r in naive_rewards(model, head, example))
        win, lose = (torch.sigmoid(s * (chosen - rejected) - threshold) for s in (1, -1))
        losses.append(-(1 - win - lose).log() if example.fields.get("tie") else -win.log())
    loss = torch.stack(losses).mean()
    loss.backward()
    found = step(RewardModule(folder, tie_threshold=threshold), examples)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(found.gradient, model)
    with pytest.raises(ValueError, match="row rows:0 is a tie: set tie_threshold"):
        step(RewardModule(folder), examples)


@pytest.mark.parametrize("loss_type", ["mse", "huber"])
def test_ratings_that_are_missing_cost_nothing(loss_type: str, folder: str) -> None:
    names = ["helpfulness", "verbosity"]
    fields = [
        {"helpfulness": 3, "verbosity": 1.5},
        {"helpfulness": None, "verbosity": 2},
        {"verbosity": 0.0},
        {"helpfulness": math.nan},
        {"helpfulness": 4, "verbosity": 1},
    ]
    examples = with_fields(demonstrations(5), fields)
    options = {"loss_type": loss_type, "attributes": names, "huber_delta": 0.7}
    model, head, losses, errors = naive_model(folder), head_of(folder, **options), [], []
    for example in examples:
        (rewards,) = naive_rewards(model, head, example)
        for k, name in enumerate(names):
            rating = example.fields.get(name)
            if rating is None or math.isnan(rating):
                continue
            error = rewards[0, k] - rating
            small = bool(error.abs() <= 0.7)
            huber = error**2 / 2 if small else 0.7 * (error.abs() - 0.35)
            losses.append(error**2 if loss_type == "mse" else huber)
            errors += [float(error.detach() ** 2)] * (k == 1)
    assert len(losses) == 6
    loss = torch.stack(losses).mean()
    loss.backward()
    found = step(RewardModule(folder, micro_batch_tokens=30, **options), examples)
    assert found.metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found.metrics["train/mse/verbosity"] == pytest.approx(sum(errors) / 4, rel=1e-6)
    assert_gradient(found.gradient, model)
    assert_gradient(found.gradient, head, prefix="head.")


def test_bootstrap_weights_are_poisson_draws_of_row_and_member() -> None:
    rows = [f"rows:{n}" for n in range(4000)]
    weights = bootstrap_weights(rows, 2, seed=0)
    assert torch.equal(weights[:7], bootstrap_weights(rows[:7], 2, seed=0))
    assert not torch.equal(weights, bootstrap_weights(rows, 2, seed=1))
    assert float(weights.mean()) == pytest.approx(1, abs=0.04)
    assert float(weights.var()) == pytest.approx(1, abs=0.08)
    assert float((weights == 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.02)
    assert float(torch.corrcoef(weights.T)[0, 1]) == pytest.approx(0, abs=0.05)


def test_validation_counts_every_row_once(folder: str) -> None:
    module = RewardModule(folder, num_models=2)
    data = PreferenceDataModule(val=ROWS)
    (metrics,) = trainer("64-true").validate(module, data, verbose=False)
    model, head, losses, margins, spread = naive_model(folder), module.head, [], [], []
    for example in data._store("val"):
        chosen, rejected = (r[:, 0] for r in naive_rewards(model, head, example))
        losses.append(-torch.sigmoid(chosen - rejected).log().mean())
        margins.append(float((chosen - rejected).mean()))
        spread += [float((member[0] - member[1]).abs()) / 2 for member in (chosen, rejected)]
    assert metrics["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert metrics["val/rewards/margins"] == pytest.approx(sum(margins) / 13, rel=1e-5)
    assert metrics["val/rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 13)
    assert metrics["val/rewards/disagreement"] == pytest.approx(sum(spread) / 26, rel=1e-5)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, margin > 0))
    error = sum(abs(sum(c for c, _ in b) - sum(hit for _, hit in b)) for b in bins.values()) / 13
    assert metrics["val/calibration_error"] == pytest.approx(error, rel=1e-5)


# Scoring.


def naive_scores(module: RewardModule, folder: str) -> list[Tensor]:
    model, head = naive_model(folder), module.head
    tokenizer = char_tokenizer()
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        found.append(head(states(model, tokenizer(prompt)["input_ids"], tokens)[-1][None].to(head.weight.dtype))[0])
    return found


@pytest.mark.parametrize("budget", [8192, 25, 1])
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_score_is_the_naive_reward_in_the_order_of_the_texts(budget: int, folder: str) -> None:
    module = RewardModule(folder, num_models=2, num_attributes=2, micro_batch_tokens=budget)
    found, stds = module.score_with_std(PROMPTS, COMPLETIONS)
    assert module.score(PROMPTS, COMPLETIONS) == found
    for value, std, rewards in zip(found, stds, naive_scores(module, folder), strict=True):
        members = rewards.mean(dim=1)
        assert value == pytest.approx(float(members.mean()), rel=1e-4, abs=1e-5)
        assert std == pytest.approx(float(members.std(correction=0)), rel=1e-4, abs=1e-5)
    assert module.training
    assert module.score([], []) == []


def test_score_reads_chats(folder: str) -> None:
    module = RewardModule(folder)
    chat = [[{"role": "user", "content": "1+1"}]]
    (plain,), (told,) = module.score(chat, ["2"]), module.score(chat, [[{"role": "assistant", "content": "2"}]])
    (written,) = module.score(["<user>1+1\n<assistant>"], ["2"])
    assert plain == pytest.approx(told) == pytest.approx(written)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], ["b", "c"], "given 1 prompts and 2 completions; give two lists of one length"),
        ("a", "b", "given str and str"),
        (["a"], [""], "completion 0 is empty"),
    ],
)
def test_scoring_refuses_what_it_cannot_score(folder: str, prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModule(folder).score(prompts, completions)


def test_predict_gives_means_and_deviations_of_any_number_of_completions(folder: str) -> None:
    module = RewardModule(folder, num_models=3, num_attributes=2)
    module.configure_model()
    prompt, parts = [5, 6], [Segment([7, 8], [1, 1]), Segment([9], [1]), Segment([10, 11], [1, 1])]
    group = Example("rows:0", Segment(prompt, children=tuple(parts)))
    lone = Example("rows:1", Segment(prompt, children=(parts[1],)))
    first, second = module.predict_step(ExampleBatch([group, lone]), 0)
    model = naive_model(folder)
    for n, rewards in enumerate(naive_rewards(model, module.head.double(), group)):
        members = rewards.mean(dim=1)
        assert first["rewards"][n] == pytest.approx(float(members.mean()), rel=1e-4, abs=1e-5)
        assert first["stds"][n] == pytest.approx(float(members.std(correction=0)), rel=1e-4, abs=1e-5)
        assert first["attributes"][n] == pytest.approx(rewards.mean(dim=0).tolist(), rel=1e-4, abs=1e-5)
    assert second["rewards"] == pytest.approx([first["rewards"][1]], rel=1e-5)
    assert (first["row_id"], second["row_id"]) == ("rows:0", "rows:1")


# Predictions and exports.


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "gemma2"])
def test_a_linear_head_becomes_transformers_own_classifier(arch: str, tmp_path: Path) -> None:
    source = str(save_tiny_model(tmp_path / "model", arch))
    module = RewardModule(source, num_attributes=2, attributes=["right", "short"])
    module.save_pretrained(str(tmp_path / "export"))
    values = [
        [float(v) for v in row["attributes"][0]]
        for row in module.predict_step(
            ExampleBatch([_example(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]), 0
        )
    ]
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert classifier.config.id2label == {0: "right", 1: "short"}
    # transformers numbers gpt2's positions from the first column, padding or not.
    for side in ("right",) if arch == "gpt2" else ("right", "left"):
        tokenizer.padding_side = side
        texts = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        with torch.no_grad():
            logits = classifier(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        torch.testing.assert_close(logits, torch.tensor(values), rtol=1e-4, atol=2e-5)
    again = RewardModule.from_pretrained(str(tmp_path / "export"))
    assert again.options.attributes == ["right", "short"]
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(module.score(PROMPTS, COMPLETIONS), rel=1e-5)


def _example(prompt: str, completion: str) -> Example:
    tokenizer = char_tokenizer()
    tokens = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    child = Segment(tokens, [1.0] * len(tokens))
    return Example(f"{prompt}{completion}", Segment(tokenizer(prompt)["input_ids"], children=(child,)))


def test_a_tokenizer_that_pads_with_its_last_token_gets_another_padding_token(folder: str, tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = RewardModule(folder, tokenizer=str(tmp_path / "tokenizer"))
    module.save_pretrained(str(tmp_path / "export"))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    padded = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert classifier.config.pad_token_id == padded.pad_token_id != padded.eos_token_id
    texts = [p + c + padded.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        logits = classifier(**padded(texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert logits.tolist() == pytest.approx(module.score(PROMPTS, COMPLETIONS), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"head": "mlp"},
        {"num_models": 3, "num_attributes": 2, "attribute_weights": [1.0, -0.5]},
        {"pooling": "mean"},
        {"lora": {"r": 4}},
    ],
)
def test_other_reward_models_are_loaded_with_their_head(options: dict[str, Any], folder: str, tmp_path: Path) -> None:
    module = RewardModule(folder, seed=7, **options)
    module.save_pretrained(str(tmp_path / "export"))
    again = RewardModule.from_pretrained(str(tmp_path / "export"))
    assert not again.training
    assert again.score_with_std(PROMPTS, COMPLETIONS) == module.score_with_std(PROMPTS, COMPLETIONS)
    stored = json.loads((tmp_path / "export" / "reward_head.json").read_text())
    assert stored["method"] == "reward"
    with pytest.raises(ValueError, match="holds no model that ProcessRewardModule exported"):
        ProcessRewardModule.from_pretrained(str(tmp_path / "export"))


def test_a_merged_adapter_becomes_a_classifier(folder: str, tmp_path: Path) -> None:
    module = RewardModule(folder, lora={"r": 4}, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer("32-true", max_epochs=1).fit(module, PreferenceDataModule(train=ROWS[:8], global_batch_size=4))
    module.save_pretrained(str(tmp_path / "merged"), merge_adapter=True)
    again = RewardModule.from_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "reward_head.safetensors").exists()
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(module.score(PROMPTS, COMPLETIONS), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_anyones_classifier_can_be_loaded(tied: bool, tmp_path: Path) -> None:
    config = tiny_config("llama", num_labels=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer = char_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = [p + c + tokenizer.eos_token for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        logits = classifier(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    module = RewardModule.from_pretrained(str(tmp_path))
    assert module.score(PROMPTS, COMPLETIONS) == pytest.approx(logits.tolist(), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="has the weights"):
        RewardModule(str(tmp_path), num_models=2).configure_model()


def test_a_language_model_has_no_rewards_to_load(folder: str) -> None:
    with pytest.raises(ValueError, match="holds no model that RewardModule exported"):
        RewardModule.from_pretrained(folder)


# Learning.


def test_members_are_compared_around_their_means_over_training(folder: str, tmp_path: Path) -> None:
    module = RewardModule(folder, num_models=3, optimizer=partial(torch.optim.SGD, lr=0.0))
    examples = pairs(4)
    run = trainer("64-true", max_epochs=1)
    run.fit(module, Batches(ExampleBatch(examples[:2]), ExampleBatch(examples[2:])))
    model, head = naive_model(folder), module.head
    first, second = (
        torch.stack([r for e in part for r in naive_rewards(model, head, e)]).mean(dim=0)
        for part in (examples[:2], examples[2:])
    )
    means = (0.99 * first + second) / 1.99
    torch.testing.assert_close(module.reward_model.means.value, means.detach())
    module.float()
    found, stds = module.score_with_std(PROMPTS, COMPLETIONS)
    for value, std, rewards in zip(found, stds, naive_scores(module, folder), strict=True):
        centred = (rewards - means)[:, 0]
        assert value == pytest.approx(float(centred.mean()), rel=1e-4, abs=1e-5)
        assert std == pytest.approx(float(centred.std(correction=0)), rel=1e-4, abs=1e-5)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    restored = RewardModule(folder, num_models=3)
    restored.on_load_checkpoint(checkpoint)
    assert torch.equal(restored.reward_model.means.value, module.reward_model.means.value)
    module.save_pretrained(str(tmp_path / "export"))
    again = RewardModule.from_pretrained(str(tmp_path / "export"))
    assert again.score_with_std(PROMPTS, COMPLETIONS)[1] == pytest.approx(stds, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_models": 4, "head": "mlp"}, {"lora": {"r": 4}, "pooling": "mean"}])
def test_it_fits_a_few_pairs(folder: str, options: dict[str, Any]) -> None:
    module = RewardModule(folder, optimizer=partial(torch.optim.AdamW, lr=3e-3), **options)
    run = trainer("32-true", max_epochs=8)
    run.fit(module, PreferenceDataModule(train=ROWS, val=ROWS, global_batch_size=4))
    assert float(run.callback_metrics["val/rewards/accuracies"]) == 1.0
    assert float(run.callback_metrics["val/loss"]) < 0.25


def test_it_fits_a_few_ratings(folder: str) -> None:
    rows = [{"prompt": f"{n}=", "response": "z" * n, "length": n, "parity": n % 2} for n in range(1, 9)]
    module = RewardModule(
        folder, loss_type="mse", attributes=["length", "parity"], optimizer=partial(torch.optim.AdamW, lr=5e-3)
    )
    run = trainer("32-true", max_epochs=40)
    run.fit(module, SFTDataModule(train=rows, val=rows, global_batch_size=8))
    assert float(run.callback_metrics["val/correlation/length"]) > 0.95
    assert float(run.callback_metrics["val/mse/length"]) < 0.6  # 5.25 is the variance of the ratings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "quadratic"}, "head is 'quadratic'; it must be one of linear, mlp"),
        ({"pooling": "first"}, "pooling is 'first'"),
        ({"num_models": 0}, "num_models is 0; it must be a whole number of at least 1"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"margin": math.nan}, "margin is nan; it must be a finite number"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient is -1.0"),
        ({"loss_type": "mse"}, "without attributes: name the columns"),
        ({"loss_type": "mse", "attributes": ["a"], "margin": 1.0}, "margin=1.0 changes nothing in loss_type 'mse'"),
        ({"tie_threshold": 0.0}, "tie_threshold is 0.0; it must be above 0"),
        ({"tie_threshold": 0.5, "label_smoothing": 0.1}, "changes nothing with tie_threshold"),
        ({"attributes": ["a", "a"]}, "give as many different names"),
        ({"num_attributes": 3, "attributes": ["a", "b"]}, "num_attributes=3"),
        ({"num_attributes": 2, "attribute_weights": [1.0]}, "attribute_weights is [1.0]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardModule("nowhere", **options)


@pytest.mark.parametrize("margin", ["large", math.inf, [1.0]])
def test_margins_that_are_no_numbers_are_refused(folder: str, margin: Any) -> None:
    examples = with_fields(pairs(2), [{}, {"margin": margin}])
    with pytest.raises(
        ValueError, match=re.escape(f"row rows:1 has the margin {margin!r}; it must be a finite number")
    ):
        step(RewardModule(folder), examples)
    step(RewardModule(folder, use_margins=False), examples)


def test_ratings_that_are_no_numbers_are_refused(folder: str) -> None:
    options = {"loss_type": "mse", "attributes": ["helpfulness"]}
    examples = with_fields(demonstrations(2), [{"helpfulness": 1}, {"helpfulness": "good"}])
    with pytest.raises(ValueError, match="row rows:1 has the helpfulness 'good'; it must be a finite number, or null"):
        step(RewardModule(folder, **options), examples)
    with pytest.raises(ValueError, match=re.escape("no row of this batch has a rating of ['helpfulness']")):
        step(RewardModule(folder, **options), demonstrations(2))
    with pytest.raises(ValueError, match="row rows:0 has 2 completions; loss_type 'mse' rates one"):
        step(RewardModule(folder, **options), pairs(2))


def test_an_unused_output_projection_is_not_trained(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    module = RewardModule(str(tmp_path))
    module.configure_model()
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert id(module.model.lm_head.weight) not in trained
    assert id(module.head.weight) in trained


@pytest.mark.parametrize("cls", [RewardModule, ProcessRewardModule])
def test_the_model_is_built_where_it_is_first_asked_for(cls: Any, folder: str) -> None:
    module = cls(folder)
    assert module.reward_model.head is module.head
    assert module.reward_model is module.reward_model
    assert module.layout in ("packed", "padded")
