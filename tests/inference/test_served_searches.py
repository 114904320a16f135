"""Searches on a server: where answers end, and how many tokens there are for them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.inference import MCTS, BeamSearch, HiddenReasoning, RemoteEngine, SamplingParams

from ..helpers import EOS_ID, char_tokenizer
from .served import completion, serve
from .toy import Judge

IDS = char_tokenizer()("1+1=")["input_ids"]
LISTED = {"data": [{"id": "m", "max_model_len": 4096}]}


@pytest.mark.parametrize("reports_end", [True, False])
@pytest.mark.parametrize("simulates", [False, True])
def test_an_answer_ends_with_the_step_that_the_server_ends(reports_end: bool, simulates: bool) -> None:
    asked = []

    def answer(path: str, body: dict[str, Any] | None, number: int) -> dict[str, Any]:
        if body is None:
            return LISTED
        asked.append(body["prompt"])
        # A step "1\n" first; a rollout has both in one.
        text = "2" if len(body["prompt"]) > len(IDS) else "1\n" if body.get("stop") else "1\n2"
        ended = [] if text.endswith("\n") or not reports_end else [EOS_ID]
        return completion(text.rstrip("\n"), token_ids=[*char_tokenizer()(text)["input_ids"], *ended])

    with serve(answer) as served:
        engine = RemoteEngine(served.url, "m", tokenizer=char_tokenizer())
        assert engine.end_token_ids == {EOS_ID}
        options: dict[str, Any] = {"scorer": Judge(len), "sampling": SamplingParams(max_new_tokens=12)}
        search = (
            MCTS(engine, simulations=2, actions=1, rollouts=1, rollout_weight=1.0, **options)
            if simulates
            else BeamSearch(engine, width=1, expand=1, **options)
        )
        (result,) = search.search(["1+1="], [0], encoded=[IDS])
    expected = (*char_tokenizer()("1\n2")["input_ids"], *([EOS_ID] if reports_end else []))
    assert (result.token_ids, result.best.finish_reason, result.text) == (expected, "stop", "1\n2")
    assert max(map(len, asked)) == len(IDS) + 2


def test_steps_without_tokens_are_refused() -> None:
    with serve(lambda path, body, number: LISTED if body is None else completion("4")) as served:
        search = BeamSearch(RemoteEngine(served.url, "m", tokenizer=char_tokenizer()), scorer=Judge(len), width=1)
        with pytest.raises(ValueError, match="RemoteEngine returns the text '4' without its tokens"):
            search.search(["1+1="], [0], encoded=[IDS])


@pytest.mark.parametrize(
    ("length", "thought", "answers"),
    # By hand: 4096 positions, 15 tokens of marks, and two thirds of what is left for the thought, 2000 at most.
    [(1000, 2000, 1000), (2081, 1333, 667), (4080, 0, 1)],
)
def test_a_thought_has_all_tokens_that_the_server_has(length: int, thought: int, answers: int) -> None:
    def answer(path: str, body: dict[str, Any] | None, number: int) -> dict[str, Any]:
        if body is None:
            return LISTED
        assert len(body["prompt"]) + body["max_tokens"] <= 4096
        return completion("1", "length", token_ids=IDS[:1])

    with serve(answer) as served:
        engine = RemoteEngine(served.url, "m", tokenizer=char_tokenizer())
        strategy = HiddenReasoning(engine, thinking_tokens=2000, answer_tokens=1000)
        prompt, sampling = IDS[:1] * length, SamplingParams(max_new_tokens=3015)
        strategy.search([prompt], [0], sampling=sampling, encoded=[prompt])
    asked = [body["max_tokens"] for body in served.bodies]
    assert asked == [number for number in (thought, answers) if number]


def test_a_solution_step_by_step_has_all_tokens_that_the_server_has() -> None:
    def answer(path: str, body: dict[str, Any] | None, number: int) -> dict[str, Any]:
        return LISTED if body is None else completion("1\n", token_ids=[*IDS[:1], *char_tokenizer()("\n")["input_ids"]])

    with serve(answer) as served:
        engine = RemoteEngine(served.url, "m", tokenizer=char_tokenizer())
        search = BeamSearch(engine, scorer=Judge(len), width=1, expand=1, sampling=SamplingParams(max_new_tokens=3000))
        search.search(["1"], [0], encoded=[IDS[:1] * 4091])
    assert [body["max_tokens"] for body in served.bodies] == [5, 3, 1]
