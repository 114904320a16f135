"""Checks of a model, against engines whose answers are written down and against small trained classifiers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rlhf_lightning.inference import Completion, SamplingParams
from rlhf_lightning.metrics.intervals import wilson_interval
from rlhf_lightning.self_improvement import (
    AdversarialValidator,
    Consistency,
    Discriminator,
    Finding,
    FlawDetector,
    LabelledPair,
    PairClassifierOptions,
    PerturbedPrompt,
    Robustness,
    Verdicts,
    corrupted_twin,
    train_pair_classifier,
)
from rlhf_lightning.self_improvement.corruption import CORRUPTIONS

from ..helpers import char_tokenizer, save_tiny_model

SUMS = [
    {"prompt": f"{a}+{b}=?", "answer": str(a + b), "completion": f"{a}+{b}={a + b}"} for a in range(8) for b in range(5)
]
TASK = {"name": "sums", "prompts": SUMS}


class Answering:
    """An engine that answers by a function of the prompt's text."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.tokenizer = char_tokenizer()

    def generate(
        self,
        prompts: Sequence[Any],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        texts = [self.answer(self.tokenizer.decode(prompt)) for prompt in prompts]
        return [[Completion([1] * len(text), text, [0.0] * len(text), "stop")] * num_samples for text in texts]


def solve(prompt: str) -> str:
    a, b = map(int, re.findall(r"\d+", prompt))
    return f"#{a + b}"


def right(prompt: str) -> str:
    return solve(prompt)


def brittle(prompt: str) -> str:
    """Right unless the prompt begins with anything but a digit."""
    return solve(prompt) if prompt[0].isdigit() else "#999"


# Corrupted twins and perturbed prompts.


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_corruption_changes_what_it_names(kind: Any) -> None:
    text = "3+14=17\n17-9=8\n#8"
    for seed in range(20):
        twin = corrupted_twin(text, seed, [kind])
        assert twin is not None
        assert twin != text
        assert twin == corrupted_twin(text, seed, [kind])
        before, after = text.split("\n"), twin.split("\n")
        if kind == "number":
            assert sum(a != b for a, b in zip(re.findall(r"\d+", text), re.findall(r"\d+", twin), strict=True)) == 1
        elif kind == "sign":
            assert re.findall(r"\d+", text) == re.findall(r"\d+", twin)
            assert len(text) == len(twin)
        elif kind == "drop_step":
            assert len(after) == 2
            assert after[-1] == "#8"
        elif kind == "swap_steps":
            assert sorted(after) == sorted(before)
        else:
            assert len(after) == 4
            assert set(after) == set(before)


def test_without_a_possible_change_there_is_no_twin() -> None:
    assert corrupted_twin("yes", 0, ["number", "sign", "drop_step", "swap_steps"]) is None
    assert corrupted_twin("a\na", 0, ["swap_steps"]) is None
    with pytest.raises(ValueError, match="did you mean 'number'"):
        corrupted_twin("1", 0, ["numbers"])  # type: ignore[list-item]


def test_perturbations_keep_numbers_and_length() -> None:
    text = "Please compute the value of 17 plus 25, quickly"
    typos = PerturbedPrompt("typos", seed=1).rewritten(text)
    assert typos != text
    assert sorted(typos) == sorted(text)
    for how in ("typos", "spaces", "lower", "upper", "Answer: {prompt}"):
        assert re.findall(r"\d+", PerturbedPrompt(how).rewritten(text)) == ["17", "25"]
    assert PerturbedPrompt("upper").rewritten("2 or 3?") == "2 OR 3?"
    assert PerturbedPrompt("typos").rewritten("2+2=?") == "2+2=?"


def test_the_last_user_message_is_perturbed() -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    changed = PerturbedPrompt("upper")({"messages": chat, "answer": "x"})
    assert [m["content"] for m in changed["messages"]] == ["Hi", "Yes?", "GO"]
    assert changed["answer"] == "x"
    assert chat[2]["content"] == "Go"
    with pytest.raises(KeyError, match="no prompt among"):
        PerturbedPrompt("upper")({"text": "a"})


# Checks by tasks.


def test_verdicts() -> None:
    check = Verdicts(task=TASK, min_accuracy=0.9)
    found = check.run(Answering(right), 0)
    assert (found.passed, found.value) == (True, 1.0)
    found = check.run(Answering(lambda prompt: "#0"), 0)
    assert not found.passed
    assert found.value == 1 / 40  # 0+0
    assert found.samples == ("#0",) * 3
    assert "at least 90.0% are needed" in found.detail


def test_robustness_finds_the_worst_perturbation() -> None:
    check = Robustness(task=TASK, perturbations=("spaces", "Now: {prompt}"), max_drop=0.1)
    assert check.run(Answering(right), 0).passed
    found = check.run(Answering(brittle), 0)
    assert not found.passed
    assert found.value == 1.0
    assert "'Now: {prompt}'" in found.detail
    assert found.samples[0] == "#999"


def test_a_small_fall_is_no_failure() -> None:
    wrong = {"=1+1=?", "=2+2=?"}
    engine = Answering(lambda prompt: "#999" if prompt in wrong else right(prompt))
    found = Robustness(task=TASK, perturbations=("={prompt}",), max_drop=0.1).run(engine, 0)
    assert found.passed
    assert found.value == pytest.approx(2 / 40)


def test_consistency_is_the_share_of_equal_pairs() -> None:
    templates = ("{prompt}", "Now: {prompt}", "Then: {prompt}")
    found = Consistency(task=TASK, templates=templates, min_agreement=0.8).run(Answering(brittle), 0)
    # Of three phrasings the last two agree: one pair of three.
    assert found.value == pytest.approx(1 - 2 / 3)
    assert not found.passed
    assert Consistency(task=TASK, templates=templates).run(Answering(right), 0).passed


def test_empty_answers_agree_with_none() -> None:
    assert Consistency(task=TASK).run(Answering(lambda prompt: ""), 0).value == 0.0


# Checks by classifiers.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def pairs(num: int, second: Callable[[int, int], str]) -> list[LabelledPair]:
    draw = random.Random(0)
    numbers = [(draw.randrange(50), draw.randrange(50)) for _ in range(num)]
    return [LabelledPair(f"{a}+{b}=?", f"{a}+{b}={a + b}", second(a, b)) for a, b in numbers]


QUICK = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 8}


def test_a_classifier_finds_what_differs_and_nothing_where_nothing_does(folder: str) -> None:
    options = PairClassifierOptions(**QUICK)
    told = train_pair_classifier(folder, pairs(80, lambda a, b: f"{a}+{b}={a + b}!"), options)
    assert told.accuracy.value > 0.9
    assert told.accuracy.low > 0.5
    state = torch.random.get_rng_state()
    draw = random.Random(1)
    swapped = pairs(80, lambda a, b: f"{b}+{a}={a + b}")
    both = [p if draw.random() < 0.5 else LabelledPair(p.prompt, p.second, p.first) for p in swapped]
    chance = train_pair_classifier(folder, both, options)
    assert chance.accuracy.low < 0.5 < chance.accuracy.high
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_split_is_by_prompt_and_the_result_reproducible(folder: str) -> None:
    given = pairs(40, lambda a, b: f"{a}") * 2
    options = PairClassifierOptions(**QUICK | {"epochs": 1})
    first, second = (train_pair_classifier(folder, given, options) for _ in range(2))
    assert first.scores == second.scores
    held = {pair.prompt for pair in first.held_out}
    assert len(first.held_out) == sum(pair.prompt in held for pair in given)


def test_discriminator(folder: str) -> None:
    check = Discriminator(model=folder, references=SUMS, max_accuracy=0.6, classifier=QUICK)
    found = check.run(Answering(lambda prompt: "I will not say."), 0)
    assert not found.passed
    assert found.value > 0.9
    # Eight pairs, all told apart, do not show that more than 80 % are.
    assert (found.low, found.high) == (wilson_interval(8, 8).low, 1.0)
    assert 0.6 < found.low < 0.8
    assert found.samples[0] == "I will not say."
    same = check.run(Answering(lambda prompt: prompt.replace("?", "") + solve(prompt)[1:]), 0)
    assert same.passed
    assert same.detail == "all completions are equal to their references"


def test_flaw_detector(folder: str) -> None:
    rows = [{"prompt": p.prompt, "completion": f"{p.first}\n#done"} for p in pairs(80, lambda a, b: "")]
    check = FlawDetector(model=folder, references=rows, corruptions=("repeat_step",), classifier=QUICK)
    sound = {row["prompt"]: row["completion"] for row in rows}
    found = check.run(Answering(lambda prompt: sound[prompt]), 0)
    assert found.passed, found.detail
    assert found.value <= 0.2
    flawed = check.run(Answering(lambda prompt: corrupted_twin(sound[prompt], 5, ["repeat_step"]) or ""), 0)
    assert not flawed.passed, flawed.detail
    assert flawed.value > 0.6


def test_what_is_empty_or_too_long_is_flagged_and_not_trained_on(folder: str) -> None:
    rows = [{"prompt": p.prompt, "completion": f"{p.first}\n#done"} for p in pairs(80, lambda a, b: "")]
    check = FlawDetector(model=folder, references=rows, corruptions=("repeat_step",), classifier=QUICK)
    for text in ("", "1" * 500):
        assert check.run(Answering(lambda prompt, text=text: text), 0).value == 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="of 80 pairs, 0 are left"):
        train_pair_classifier(folder, pairs(80, lambda a, b: "1" * 500))


def test_a_detector_that_finds_nothing_is_not_believed(folder: str) -> None:
    still = {"epochs": 1, "learning_rate": 1e-12, "batch_size": 8}
    check = FlawDetector(model=folder, references=SUMS, min_detection=1.0, classifier=still)
    found = check.run(Answering(right), 0)
    assert found.passed
    assert found.detail.startswith("not measured")


# The validator.


def test_all_checks_run_and_one_failure_decides() -> None:
    specs: list[Any] = [
        {"class_path": "Robustness", "init_args": {"task": TASK, "perturbations": ["spaces"]}},
        Consistency(task=TASK),
        {"class_path": "rlhf_lightning.self_improvement.Verdicts", "init_args": {"task": TASK, "min_accuracy": 0.5}},
    ]
    lines: list[str] = []
    found = AdversarialValidator(specs).validate(Answering(brittle), say=lines.append)
    assert [finding.passed for finding in found.findings] == [True, False, True]
    assert not found.passed
    assert found.reason.startswith("consistency: 0.0%")
    assert [line.split(":")[0] for line in lines] == ["passed", "FAILED", "passed"]
    assert found.as_dict()["findings"][2]["value"] == 1.0
    assert AdversarialValidator(specs).validate(Answering(right)).reason == "all 3 checks passed"


def spec(name: str, options: dict[str, Any]) -> dict[str, Any]:
    task = {} if "model" in options else {"task": TASK}
    return {"class_path": name, "init_args": task | options}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ([], "at least one of Verdicts"),
        ([{"class_path": "Robust"}], "there is no check 'Robust'"),
        ([spec("Robustness", {"drop": 1})], "no option 'drop'"),
        ([spec("Robustness", {"max_drop": 2.0})], "max_drop is 2.0"),
        (
            [{"class_path": "Robustness", "init_args": {"task": TASK, "perturbations": ["typo"]}}],
            "did you mean 'typos'",
        ),
        ([spec("Consistency", {"templates": ["{prompt}"]})], "two different ones"),
        (
            [{"class_path": "Discriminator", "init_args": {"model": "m", "references": [], "max_accuracy": 0.2}}],
            "0.5, 1",
        ),
    ],
)
def test_mistakes(given: Any, word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        AdversarialValidator(given)


def test_references_without_the_column_are_named(folder: str) -> None:
    with pytest.raises(ValueError, match="no column 'solution' with a text: they have answer, completion, prompt"):
        Discriminator(model=folder, references=SUMS, column="solution").run(Answering(right), 0)


class Short:
    """A check of one's own."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def run(self, engine: Any, seed: int) -> Finding:
        return Finding("short", 1.0, 1.0, 1.0, float(self.limit), False, f"seed {seed}")


def test_checks_of_ones_own() -> None:
    path = {"class_path": f"{__name__}.Short", "init_args": {"limit": 3}}
    found = AdversarialValidator([Short(2), path]).validate(Answering(right), seed=4)
    assert [(finding.limit, finding.detail) for finding in found.findings] == [(2.0, "seed 4"), (3.0, "seed 4")]
    with pytest.raises(TypeError, match="must have the method run"):
        AdversarialValidator([lambda engine: None])  # type: ignore[list-item]
