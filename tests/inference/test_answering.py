"""A strategy in place of an engine: its scorer reads prompts as written and the rows' columns, through each door."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import GenerationAccuracy, SelfImprovement
from rlhf_lightning.callbacks import generation_accuracy as accuracy_door
from rlhf_lightning.callbacks import self_improvement as rounds_door
from rlhf_lightning.evaluation import Task, run_task
from rlhf_lightning.evaluation.answers import answer_prompts, read_prompts
from rlhf_lightning.generation.options import EngineOptions
from rlhf_lightning.inference import (
    BestOfN,
    Completion,
    JudgeScorer,
    MajorityVote,
    SamplingParams,
    VerifierScorer,
    generate,
)
from rlhf_lightning.inference.answering import StrategyOption, ask, policy_of
from rlhf_lightning.labeling.command import LabelOptions
from rlhf_lightning.labeling.step_labels import label_steps, sample_solutions
from rlhf_lightning.pipeline import sample_stage
from rlhf_lightning.pipeline.config import Evaluation
from rlhf_lightning.pipeline.refine_stage import check_refine
from rlhf_lightning.pipeline.stages import RefineStage, SampleStage
from rlhf_lightning.rewards import exact_answer
from rlhf_lightning.self_improvement import Refine, refine

from ..helpers import char_tokenizer, save_tiny_model

# Answers in which draw of a prompt is right: the first, second, third and fourth.
ROWS = [{"prompt": f"{n}+0=?", "answer": str(n)} for n in range(4)]
BEST = {"class_path": "BestOfN", "init_args": {"n": 4, "scorer": "rlhf_lightning.rewards.exact_answer"}}
DRAWN = SamplingParams(max_new_tokens=8)
SEEN: list[tuple[Any, str, dict[str, Any]]] = []


def watched(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Exact answers; notes what it is given."""
    rows = [{name: values[n] for name, values in columns.items()} for n in range(len(prompts))]
    SEEN.extend(zip(prompts, completions, rows, strict=True))
    return [float(text == f"#{row['answer']}") for text, row in zip(completions, rows, strict=True)]


WATCHED = {"class_path": "BestOfN", "init_args": {"n": 4, "scorer": f"{__name__}.watched"}}


class Counting:
    """Answers the first draw of a prompt with #0, the next with #1, and so on."""

    def __init__(self, *given: Any) -> None:
        self.tokenizer = char_tokenizer()
        self.drawn: Counter[str] = Counter()

    def encode(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return tuple(prompt)

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None, limits=None):
        groups = []
        for prompt in prompts:
            text = self.tokenizer.decode(self.encode(prompt))
            group = []
            for _ in range(num_samples):
                answer = f"#{self.drawn[text]}"
                self.drawn[text] += 1
                group.append(Completion(list(self.encode(answer)), answer, [0.0] * len(answer), "stop"))
            groups.append(group)
        return groups


@pytest.fixture(autouse=True)
def forget() -> None:
    SEEN.clear()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_evaluate_searches_by_a_verifier_of_columns(prompts: str) -> None:
    plain = run_task(Task(name="sums", prompts=prompts), Counting())
    assert plain.accuracy.value == 0.25  # the first draw is right of the first prompt only
    found = run_task(Task(name="sums", prompts=prompts, strategy=BEST, sampling={"temperature": 1.0}), Counting())
    assert found.accuracy.value == 1.0


def test_judges_read_the_texts() -> None:
    asked: list[str] = []

    def judge(questions: Any) -> list[float]:
        asked.extend(questions)
        return [float("#2" in question) for question in questions]

    engine = Counting()
    strategy = BestOfN(engine, scorer=JudgeScorer(judge, question="{prompt}: {completion}"), n=3)
    examples = read_prompts(ROWS[:1], engine.tokenizer)
    assert answer_prompts(strategy, examples, exact_answer)[0][0].completion.text == "#2"
    assert asked == ["0+0=?: #0", "0+0=?: #1", "0+0=?: #2"]


def test_a_strategy_within_a_strategy_reads_the_same() -> None:
    inner = BestOfN(Counting(), scorer=VerifierScorer(watched), n=4)
    examples = read_prompts(ROWS, inner.tokenizer)
    groups = answer_prompts(MajorityVote(inner, n=1), examples, exact_answer, sampling=DRAWN)
    assert [group[0].reward for group in groups] == [1.0] * 4
    assert {(prompt, row["answer"]) for prompt, _, row in SEEN} == {(row["prompt"], row["answer"]) for row in ROWS}


def test_generate_shows_scorers_the_messages() -> None:
    engine = Counting()
    seen: list[Any] = []

    def second(prompts: Any, completions: Any) -> list[float]:
        seen.extend(prompts)
        return [float(text == "#1") for text in completions]

    chat = [{"role": "user", "content": "0+0=?"}]
    found = generate(engine, [chat, "1+0=?"], strategy="best_of_n", scorer=VerifierScorer(second))
    assert found == ["#1", "#1"]
    assert [seen[0], seen[-1]] == [chat, "1+0=?"]
    # Its tokens are those of the rendered chat.
    assert "<user>0+0=?\n<assistant>" in engine.drawn


def test_stage_sample_draws_each_sample_by_a_search(prompts: str, tmp_path: Path, monkeypatch: Any) -> None:
    engine = Counting()
    monkeypatch.setattr(sample_stage, "_stage_engine", lambda stage, dtype: (engine, engine.tokenizer))
    stage = SampleStage(model="m", prompts=prompts, rows=["demonstrations"], num_samples=1, strategy=BEST)
    sample_stage.check_sample(stage)
    metrics = sample_stage.run_sample(stage, tmp_path, 0, "float32")
    rows = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["#0", "#1", "#2", "#3"]
    assert metrics["samples"] == 4
    assert set(engine.drawn.values()) == {4}


class Thinking(Counting):
    """Thinks of the number of its draw, and answers it; the third thought of a prompt has no end."""

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None, limits=None):
        groups = []
        for prompt in prompts:
            text, reason = self.tokenizer.decode(prompt), "stop"
            if text.endswith("<think>"):
                number = self.drawn[text]
                self.drawn[text] += 1
                written, reason = (f"n{number}</think>", "stop") if number < 2 else ("hm", "length")
            else:
                thought = text.partition("<think>")[2].partition("<")[0]
                written = "#2" if thought == "hm" else f"#{thought[1:]}"
            groups.append([Completion(list(self.encode(written)), written, [0.0] * len(written), reason)])
        return groups


@pytest.mark.parametrize(
    ("reasoning", "row"),
    [
        ("kept", {"prompt": "1+0=?", "completion": "<think>n1</think>#1"}),
        ("masked", {"prompt": "1+0=?<think>n1</think>", "completion": "#1"}),
        ("stripped", {"prompt": "1+0=?", "completion": "#1"}),
    ],
)
def test_stage_sample_keeps_masks_and_strips_thoughts(
    prompts: str, tmp_path: Path, monkeypatch: Any, reasoning: Any, row: dict[str, str]
) -> None:
    engine = Thinking()
    monkeypatch.setattr(sample_stage, "_stage_engine", lambda stage, dtype: (engine, engine.tokenizer))
    strategy = {"class_path": "HiddenReasoning", "init_args": {"thinking_tokens": 40, "answer_tokens": 8}}
    options: dict[str, Any] = {"rows": ["demonstrations"], "num_samples": 3, "strategy": strategy}
    stage = SampleStage(model="m", prompts=prompts, reasoning=reasoning, sampling={"max_new_tokens": 64}, **options)
    sample_stage.check_sample(stage)
    sample_stage.run_sample(stage, tmp_path, 0, "float32")
    rows = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()]
    # The thought before #2 was closed by force: its reasoning is not learned.
    assert [one["answer"] for one in rows] == ["0", "1", "2"][: 3 if reasoning == "stripped" else 2]
    assert {name: rows[1][name] for name in row} == row


def test_reasoning_needs_demonstrations_and_a_strategy() -> None:
    with pytest.raises(ValueError, match="reasoning is 'kept', which demonstrations have: add them to rows"):
        SampleStage(model="m", prompts="p", reasoning="kept", strategy="hidden_reasoning").check()
    with pytest.raises(ValueError, match="reasoning is 'masked', and nothing thinks here"):
        SampleStage(model="m", prompts="p", rows=["demonstrations"], reasoning="masked").check()
    with pytest.raises(ValueError, match="reasoning is 'hidden'"):
        SampleStage(model="m", prompts="p", reasoning="hidden").check()  # type: ignore[arg-type]


def test_the_evaluation_of_a_pipeline_searches(prompts: str, tmp_path: Path, monkeypatch: Any) -> None:
    drawn_with = []

    class Noting(Counting):
        def generate(self, prompts, num_samples=1, sampling=None, **options):
            drawn_with.append(sampling)
            return super().generate(prompts, num_samples, sampling, **options)

    monkeypatch.setattr(sample_stage, "stage_policy", lambda model, dtype: (Noting(), char_tokenizer()))
    file = tmp_path / "answers.jsonl"
    plain = sample_stage.evaluate(Evaluation(prompts, max_new_tokens=7), tmp_path, "float32", file)
    assert (plain["accuracy"], drawn_with[-1].temperature) == (0.25, 0.0)
    cold = {**BEST, "init_args": {**BEST["init_args"], "sampling": {"temperature": 0.5}}}
    for strategy, temperature in ((BEST, 1.0), (cold, 0.5)):
        evaluation = Evaluation(prompts, max_new_tokens=7, strategy=strategy)
        assert sample_stage.evaluate(evaluation, tmp_path, "float32", file)["accuracy"] == 1.0
        assert (drawn_with[-1].temperature, drawn_with[-1].max_new_tokens) == (temperature, 7)


def test_refine_searches_for_drafts_and_samples_critiques() -> None:
    engine = Counting()
    strategy = BestOfN(engine, scorer=VerifierScorer(watched), n=2)
    settings = Refine(critique="{prompt}|{answer}?", revision="{prompt}|{answer}|{critique}!", revisions=1)
    examples = read_prompts(ROWS[1:2], engine.tokenizer)
    found = refine(strategy, engine.tokenizer, examples, exact_answer, settings, sampling=DRAWN)[0]
    assert [sample.text for sample in found.drafts.samples] == ["#1", "#1"]
    assert found.critiques == ("#0",)  # one draw, chosen by nobody
    assert engine.drawn == {"1+0=?": 2, "1+0=?|#1?": 1, "1+0=?|#1|#0!": 2}
    assert {row["answer"] for _, _, row in SEEN} == {"1"}


def test_steps_are_labelled_by_searches() -> None:
    engine = Counting()
    strategy = BestOfN(engine, scorer=VerifierScorer(watched), n=3)
    rows = [{**row, "completions": ["so", f"#{row['answer']}"]} for row in ROWS]
    found = list(label_steps(rows, strategy, engine.tokenizer, exact_answer, num_samples=1, sampling=DRAWN))
    # Three draws after the first step hold #0, #1 and #2: searches find the answers 0, 1 and 2.
    assert [row["labels"] for row in found] == [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    assert {(prompt, row["answer"]) for prompt, _, row in SEEN} == {(f"{n}+0=?so\n", str(n)) for n in range(4)}
    solutions = sample_solutions(ROWS, strategy, engine.tokenizer, num_solutions=1, sampling=DRAWN)
    assert [row["completions"] for row in solutions.rows] == [["#0"], ["#1"], ["#2"], ["#0"]]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> SFTModule:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "llama")
    found = SFTModule(str(folder))
    found.configure_model()
    return found


def test_accuracy_in_training_by_searches(module: SFTModule, prompts: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(accuracy_door, "LocalEngine", Counting)
    trainer: Any = SimpleNamespace(
        global_rank=0, world_size=1, global_step=0, precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    assert GenerationAccuracy(prompts).measure(trainer, module) == 0.25
    callback = GenerationAccuracy(prompts, strategy=WATCHED)
    assert callback.measure(trainer, module) == callback.measure(trainer, module) == 1.0
    assert SEEN[0] == ("0+0=?", "#0", {"answer": "0"})


def test_self_improvement_by_searches(module: SFTModule, prompts: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rounds_door, "LocalEngine", Counting)
    callback = SelfImprovement(prompts, str(tmp_path), num_samples=1, strategy=WATCHED)
    examples = read_prompts(prompts, char_tokenizer())
    drawn = callback._sample(module, examples, range(4), SimpleNamespace(global_step=3))
    assert [[(sample.text, sample.score) for sample in one.samples] for one in drawn] == [
        [(f"#{n}", 1.0)] for n in range(4)
    ]


def test_scorers_are_loaded_once() -> None:
    option = StrategyOption({"class_path": "MajorityVote", "init_args": {"engine": BEST}})
    first, second = option.on(Counting()), option.on(Counting())
    assert first.engine.scorer is second.engine.scorer
    assert isinstance(policy_of(first), Counting)


def test_a_server_of_messages_gets_messages() -> None:
    class Chat(Counting):
        api = "chat"

        def generate(self, prompts, *arguments, **options):
            self.asked = list(prompts)
            return [[Completion([], "#0", [], "stop")] for _ in prompts]

    engine, chat = Chat(), [{"role": "user", "content": "0+0=?"}]
    ask(engine, [chat], [[1, 2]])
    assert engine.asked == [chat]


def test_columns_of_any_name() -> None:
    given: dict[str, Any] = {"prompts": ["p"], "seeds": ["s"], "completions": ["c"], "answer": ["0"]}
    SEEN.clear()
    ask(BestOfN(Counting(), scorer=VerifierScorer(watched), n=1), ["0+0=?"], [[1]], columns={**given})
    assert SEEN[0][2]["answer"] == "0"


@pytest.mark.parametrize(
    "check",
    [
        lambda spec: sample_stage.check_sample(SampleStage(model="m", prompts="p", strategy=spec)),
        lambda spec: check_refine(RefineStage(model="m", prompts="p", strategy=spec)),
        lambda spec: SelfImprovement("p", "f", strategy=spec),
        lambda spec: LabelOptions("p", "no-such-file.jsonl", model="m", strategy=spec).check(),
        lambda spec: EngineOptions(model="m", strategy=spec).check(),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(check: Any) -> None:
    with pytest.raises(ValueError, match="there is no strategy 'best_of_m'"):
        check("best_of_m")
    with pytest.raises(ValueError, match="strategy BestOfN has no option 'm'"):
        check({"class_path": "BestOfN", "init_args": {"m": 3, "scorer": "LikelihoodScorer"}})
    with pytest.raises(ValueError, match=r"strategy.sampling is not read here: write sampling"):
        check({"class_path": "MajorityVote", "init_args": {"sampling": {"temperature": 0.5}}})
