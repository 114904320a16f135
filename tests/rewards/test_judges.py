"""Judges: probabilities against transformers' own forward, texts against what they say, failures on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.inference import Completion, SamplingParams
from rlhf_lightning.rewards import ConstitutionReward, EngineJudge, ModelJudge, Principle, RewardSet
from rlhf_lightning.rewards.judges import read_verdict

from ..helpers import char_tokenizer, save_tiny_model

QUESTIONS = ["is 2 even? ", "is 3 even, or is it not? ", "is 2 even? "]


def naive(folder: Path, text: str, answers: tuple[str, str]) -> float:
    """P(yes) / (P(yes) + P(no)), each a product over the answer's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encode = char_tokenizer()
    found = []
    for answer in answers:
        prompt, tokens = encode(text)["input_ids"], encode(answer)["input_ids"]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].softmax(dim=-1)
        product = 1.0
        for n, token in enumerate(tokens):
            product *= float(p[len(prompt) - 1 + n, token])
        found.append(product)
    return found[0] / (found[0] + found[1])


@pytest.mark.parametrize("budget", [1, 8192])
def test_probability_of_yes(budget: int, tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("qwen3")
    found = ModelJudge(str(folder), micro_batch_tokens=budget)(QUESTIONS)
    expected = [naive(folder, f"<user>{question}\n<assistant>", ("yes", "no")) for question in QUESTIONS]
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_without_a_chat_template(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()
    judge = ModelJudge(str(tmp_path), answers=("t", "f"))
    assert judge(QUESTIONS) == pytest.approx([naive(tmp_path, q, ("t", "f")) for q in QUESTIONS], rel=1e-4)
    judge.attach(SimpleNamespace(device=torch.device("cpu")))
    assert not any(p.requires_grad for p in judge.model.parameters())
    short, long = judge(["a", "b" * 200])
    assert isinstance(short, float)
    assert str(long) == "the question has 201 tokens with its answer, and the judge reads 128 at most"
    with pytest.raises(ValueError, match="it must be two texts of different tokens"):
        ModelJudge(str(tmp_path), answers=("yes", "yes"))


@pytest.mark.parametrize(
    ("text", "scale", "verdict"),
    [
        ("Yes.", 1, 1.0),
        ("\n**no**, never", 1, 0.0),
        ("TRUE", 1, 1.0),
        ("0.25", 1, 0.25),
        ("Rating: 7", 10, 0.7),
        ("1", 1, 1.0),
        ("nobody knows", 1, None),
        ("11 of 10", 10, None),
        ("-1", 1, None),
        ("", 1, None),
    ],
)
def test_reading(text: str, scale: float, verdict: float | None) -> None:
    assert read_verdict(text, scale) == verdict


class Scripted:
    """An engine that says what it was told to."""

    def __init__(self, answer: Callable[[str], list[str]]) -> None:
        self.answer = answer
        self.asked: list[tuple[list[str], int, Any]] = []

    def generate(self, prompts: Sequence[str], num_samples: int = 1, sampling: Any = None) -> list[list[Completion]]:
        self.asked.append((list(prompts), num_samples, sampling))
        return [[Completion([], text, [], "stop") for text in self.answer(prompt)] for prompt in prompts]


def test_an_engine() -> None:
    said = {"a": ["yes", "no", "no", "hm"], "b": ["perhaps", "who\nknows", "", ""]}
    sampling = SamplingParams(max_new_tokens=3)
    engine: Any = Scripted(lambda prompt: said[prompt])
    good, bad = EngineJudge(engine, num_samples=4, sampling=sampling)(["a", "b"])
    assert good == pytest.approx(1 / 3)
    assert str(bad) == "the judge wrote 'perhaps': neither yes nor no nor a number from 0 to 1"
    assert engine.asked == [(["a", "b"], 4, sampling)]
    plain: Any = Scripted(lambda prompt: ["yes"])
    assert EngineJudge(plain)(["a"]) == [1.0]
    assert plain.asked[0][2].greedy
    assert EngineJudge(plain)([]) == []


class TestConstitution:
    PRINCIPLES = (
        Principle("polite", weight=3.0, require="please"),
        Principle("kind", weight=2.0, statement="It is kind."),
        Principle("true", weight=1.0, statement="It is true."),
    )

    @staticmethod
    def verdicts(prompt: str) -> list[str]:
        if "odd" in prompt:
            return ["I cannot say"]
        return ["yes" if "kind" in prompt else "0.5"]

    def test_weighted_sum(self) -> None:
        engine: Any = Scripted(self.verdicts)
        reward = ConstitutionReward(list(self.PRINCIPLES), judge=engine)
        assert reward(["p", "p"], ["please", "wait"]) == [pytest.approx(5.5 / 6), pytest.approx(2.5 / 6)]
        [(asked, _, _)] = engine.asked
        assert len(asked) == 4
        assert asked[1] == (
            "Someone was asked:\np\n\nThey answered:\nplease\n\nIs this true of the answer: It is true.\n"
            "Reply with yes or no.\n"
        )

    def test_a_failure_costs_its_own_sample(self) -> None:
        """The unreadable verdict and the broken predicate; nobody is asked twice."""

        def fragile(prompt: str, completion: str) -> float:
            return 1 / len(completion)

        engine: Any = Scripted(self.verdicts)
        principles = [*self.PRINCIPLES, Principle("short", predicate=fragile)]
        rewards = RewardSet([ConstitutionReward(principles, judge=engine)])
        scores = rewards(["p"] * 3, ["please", "odd", ""])
        assert scores.failures == {"ConstitutionReward": 2}
        assert scores.values[0, 0] == pytest.approx((3 + 2 + 0.5 + 1 / 6) / 7)
        assert scores.errors["ConstitutionReward"].startswith("ValueError: principle 'kind': the judge wrote 'I cannot")
        assert [len(asked) for asked, _, _ in engine.asked] == [4]

    def test_from_plain_values(self, tiny_model_folder: Callable[..., Path]) -> None:
        """As in a YAML file, with a folder for a judge, an own question, and a chat for a prompt."""
        folder = tiny_model_folder("qwen3")
        reward = ConstitutionReward(
            [{"name": "kind", "statement": "kind"}], judge=str(folder), question="{prompt}|{completion}|{statement}"
        )
        chat = [{"role": "user", "content": "hi"}]
        expected = [naive(folder, f"<user>{q}\n<assistant>", ("yes", "no")) for q in ("p|c|kind", "user: hi|c|kind")]
        assert reward(["p", chat], ["c", "c"]) == pytest.approx(expected, rel=1e-4)
        spec = {"class_path": f"{__name__}.Always", "init_args": {"verdict": "no"}}
        assert ConstitutionReward([{"name": "a", "statement": "s"}], judge=spec)(["p"], ["c"]) == [0.0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "principle 'a' has a statement: give a judge, such as a model's folder"),
            ({"judge": 3}, "the judge is a int, which has no method generate: give an engine"),
            ({"judge": {"path": "x"}}, r"judge has the keys \['path'\]: write class_path and init_args"),
            ({"judge": {"class_path": "math.nothing"}}, "module 'math' has nothing called 'nothing'"),
            ({"judge": {"class_path": f"{__name__}.Always"}}, "the init_args of the judge do not fit it"),
            ({"judge": "./nowhere"}, "there is no folder"),
            ({"judge": len, "question": "{answer}"}, "question has the wrong field 'answer': its fields are"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            ConstitutionReward([{"name": "a", "statement": "s"}], **options)
        assert "\n" not in str(error.value)

    def test_a_principle_of_other_keys(self) -> None:
        with pytest.raises(ValueError, match=r"a principle is \{'nom': 'a'\}: "):
            ConstitutionReward([{"nom": "a"}])


class Always(Scripted):
    def __init__(self, verdict: str) -> None:
        super().__init__(lambda prompt: [verdict])
