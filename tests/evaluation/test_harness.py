"""The harness's requests against transformers' own forward, one request at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.evaluation.harness import HarnessModel, harness_model
from rlhf_lightning.inference import EnsemblePolicy, LocalEngine, SamplingParams

from ..helpers import char_tokenizer, tiny_model


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny_model("llama", max_position_embeddings=24).eval(), char_tokenizer())


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def naive(engine: LocalEngine, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([[*context, *tokens][:-1]])).logits[0].double().log_softmax(-1)
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
        naive(engine, ids("x" * 23), ids("yz")),  # the last of 25 tokens is predicted, and read by nobody
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
    # Two windows of 24 tokens, and the last token after as many.
    assert len(tokens) == 1 + 24 + 24 + 1
    windows = [
        naive(engine, tokens[:1], tokens[1:25]),
        naive(engine, tokens[24:25], tokens[25:49]),
        naive(engine, tokens[25:49], tokens[49:]),
    ]
    total = sum(value for value, _ in windows)
    assert found == pytest.approx([naive(engine, [first(engine)], ids("ab"))[0], total, 0.0], rel=1e-5)


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


def with_first_token() -> PreTrainedTokenizerFast:
    """A tokenizer that puts its first token before a text, as those of llama do."""
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 0
    return tokenizer


def test_texts_begin_as_the_tokenizer_has_them_begin(engine: LocalEngine) -> None:
    tokenizer = with_first_token()
    model = HarnessModel(LocalEngine(engine.model, tokenizer), max_gen_toks=4)
    given = [("1+1=", "2"), ("", "2"), ("<pad>1+1=", "2"), ("", "<pad>2")]
    found = model.loglikelihood([request(*pair) for pair in given])
    # A chat that was rendered with it has the first token already.
    after, alone = naive(engine, [0, *ids("1+1=")], ids("2")), naive(engine, [0], ids("2"))
    assert [value for value, _ in found] == pytest.approx([after[0], alone[0], after[0], alone[0]], rel=1e-5)
    # As the harness counts: the first token of a text is predicted, too.
    (rolling,) = model.loglikelihood_rolling([request("ab")])
    assert rolling == pytest.approx(naive(engine, [0], [0, *ids("ab")])[0], rel=1e-5)
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    (expected,) = engine.generate([[0, *ids("1+1=")]], 1, params)
    assert model.generate_until([request("1+1=", {}), request("<pad>1+1=", {})]) == [expected[0].text] * 2


def test_lengths_have_several_names(engine: LocalEngine) -> None:
    model = HarnessModel(engine, max_gen_toks=1)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert model._params({name: 7}).max_new_tokens == 7
    assert model._params({"max_tokens": 3, "max_gen_toks": 5}).max_new_tokens == 5
    assert model._params({}).max_new_tokens == 1


def test_a_template_without_system_messages(engine: LocalEngine) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }};{% endfor %}"
    )
    model, said = HarnessModel(LocalEngine(engine.model, tokenizer)), {"role": "user", "content": "hi"}
    with pytest.warns(UserWarning, match="refuses a system message, which is left out: no system"):
        assert model.apply_chat_template([{"role": "system", "content": "be brief"}, said]) == "hi;"
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    with pytest.raises(TemplateError, match="no chats"):
        model.apply_chat_template([said])


def test_what_is_refused(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        HarnessModel(engine).generate_until([request("a", {"temperatur": 1.0})])
    with pytest.raises(ValueError, match="engine is of class EnsemblePolicy, and log-likelihoods are those of one"):
        HarnessModel(EnsemblePolicy([engine.model], char_tokenizer()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessModel(LocalEngine(engine.model, None))
    with pytest.raises(ValueError, match="max_gen_toks is 0"):
        HarnessModel(engine, max_gen_toks=0)


def test_without_the_harness(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rlhf-lightning\[harness\]'"):
        harness_model(engine)
