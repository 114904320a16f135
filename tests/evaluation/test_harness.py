"""The harness's requests against transformers' own forward, one request at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning.evaluation.harness import HarnessModel, harness_model
from rlhf_lightning.inference import LocalEngine, SamplingParams

from ..helpers import char_tokenizer, tiny_model


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny_model("llama", max_position_embeddings=24).eval(), char_tokenizer())


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def naive(engine: LocalEngine, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(tokens) - 1)
    value = sum(float(logits[place, token]) for place, token in zip(places, tokens, strict=True))
    return value, all(int(logits[place].argmax()) == token for place, token in zip(places, tokens, strict=True))


def ids(text: str) -> list[int]:
    return list(char_tokenizer()(text, add_special_tokens=False)["input_ids"])


def first(engine: LocalEngine) -> int:
    tokenizer: Any = engine.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


@pytest.mark.parametrize("budget", [16, 4096])
def test_log_likelihoods(engine: LocalEngine, budget: int) -> None:
    greedy = engine.generate([ids("1+1=")], 1, SamplingParams(max_new_tokens=3, temperature=0.0))[0][0]
    likely = char_tokenizer().decode(list(greedy.token_ids))
    given = [("1+1=", "2"), ("1+1=", "3 or so"), ("a b ", "c"), ("", "abc"), ("1+1=", likely), ("x" * 40, "yz")]
    found = HarnessModel(engine, micro_batch_tokens=budget).loglikelihood([request(*pair) for pair in given])
    expected = [
        naive(engine, ids("1+1="), ids("2")),
        naive(engine, ids("1+1="), ids("3 or so")),
        naive(engine, ids("a b"), ids(" c")),
        naive(engine, [first(engine)], ids("abc")),
        naive(engine, ids("1+1="), ids(likely)),
        naive(engine, ids("x" * 22), ids("yz")),
    ]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert found[4][1]
    assert HarnessModel(engine).loglikelihood([request("a", "")]) == [(0.0, True)]
    with pytest.raises(ValueError, match="continuation 0 has 30 tokens, and the model 24 positions"):
        HarnessModel(engine).loglikelihood([request("a", "y" * 30)])


def test_rolling_log_likelihoods(engine: LocalEngine) -> None:
    text = "the cat sat on the mat, and the dog lay down too."
    found = HarnessModel(engine).loglikelihood_rolling([request("ab"), request(text), request("")])
    tokens = [first(engine), *ids(text)]
    windows = [naive(engine, tokens[s - 1 : s], tokens[s : s + 23])[0] for s in range(1, len(tokens), 23)]
    assert len(windows) == 3
    assert found == pytest.approx([naive(engine, [first(engine)], ids("ab"))[0], sum(windows), 0.0], rel=1e-5)


def test_completions_in_the_order_of_requests(engine: LocalEngine) -> None:
    model = HarnessModel(engine, max_gen_toks=6)
    whole = engine.generate(
        [ids("1+1="), ids("what?"), ids("b" * 18)], 1, SamplingParams(max_new_tokens=6, temperature=0.0)
    )
    texts = [group[0].text for group in whole]
    stop = texts[0][1]
    asked = [
        request("1+1=", {"until": [], "do_sample": False}),
        request("what?", {"max_gen_toks": 6, "temperature": 0.0}),
        request("1+1=", {"until": [stop]}),
        request("b" * 30, {"until": None}),
    ]
    cut = texts[0][: texts[0].index(stop)]
    assert model.generate_until(asked) == [texts[0], texts[1], cut, texts[2]]
    drawn = request("1+1=", {"do_sample": True, "temperature": 5.0, "top_k": 50})
    assert model.generate_until([drawn]) == model.generate_until([drawn]) != texts[:1]


def test_what_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        HarnessModel(engine).generate_until([request("a", {"temperatur": 1.0})])
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessModel(LocalEngine(engine.model, None))
    with pytest.raises(ValueError, match="max_gen_toks is 0"):
        HarnessModel(engine, max_gen_toks=0)


def test_without_the_harness(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rlhf-lightning\[harness\]'"):
        harness_model(engine)
