"""Compressors that learn nothing, against loops over a model's own cache and its own attention."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import DynamicCache

from rlhf_lightning.inference import AttentionEviction, Completion, SinkWindow, TextSummary, Truncation, kept_contexts
from rlhf_lightning.models.compressed_context import run_after
from rlhf_lightning.models.own_attention import using_attention
from rlhf_lightning.sequences import register_attention

from ..helpers import char_tokenizer, tiny_model

ARCHITECTURES = ("llama", "qwen3", "gemma2")
CONTEXT = [(5 + 7 * n) % 60 + 3 for n in range(22)]
QUERY = [9, 4, 31]


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param, dtype=torch.float64)


def own_cache(model, tokens):
    """Keys and values of each layer, ``(K, T, D)``, by the model's own forward."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens]), past_key_values=DynamicCache())
    return [(layer.keys[0], layer.values[0]) for layer in output.past_key_values.layers]


def assert_entries(kept, expected, columns):
    """Checks that a compressed context has these columns, per layer and head, of a cache.

    Models round eager attention to fp32.
    """
    for layer, (states, full) in enumerate(zip(kept.states, expected, strict=True)):
        for mine, whole in zip(states, full, strict=True):
            for head in range(len(whole)):
                torch.testing.assert_close(mine[head], whole[head][columns(layer, head)], rtol=0, atol=1e-5)


def test_truncation_is_the_cache_of_the_last_tokens(model):
    [kept, short] = Truncation(model, ratio=4).compress([CONTEXT, CONTEXT[:3]])
    assert (kept.size, kept.position, kept.num_tokens) == (6, 6, 22)
    assert (short.size, short.position, short.num_tokens) == (1, 1, 3)
    assert_entries(kept, own_cache(model, CONTEXT[-6:]), lambda layer, head: list(range(6)))


@pytest.mark.parametrize(("sinks", "columns"), [(2, [0, 1, 18, 19, 20, 21]), (0, [*range(16, 22)]), (9, [*range(6)])])
def test_window_with_sinks_keeps_columns_of_the_whole_cache(model, sinks, columns):
    [kept] = SinkWindow(model, ratio=4, sinks=sinks).compress([CONTEXT])
    assert (kept.size, kept.position, kept.num_tokens) == (6, 22, 22)
    assert_entries(kept, own_cache(model, CONTEXT), lambda layer, head: columns)


def attention_of(model, tokens):
    """The model's own attention of every layer, ``(H, T, T)``, in one pass."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens]), use_cache=False, output_attentions=True)
    return [weights[0] for weights in output.attentions]


def best_columns(weights, head, queries, count, recent):
    """Loops over queries, the heads of a group and columns."""
    group = len(weights) // 2
    length = len(CONTEXT)
    scores = [
        sum(float(weights[group * head + h, q, column]) for q in queries for h in range(group))
        for column in range(length)
    ]
    kept = sorted(range(length - recent), key=lambda column: (-scores[column], -column))[: count - recent]
    return sorted([*kept, *range(length - recent, length)])


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ({}, range(22)),
        ({"window": 5, "recent": 2}, range(17, 22)),
        ({"window": 50}, range(22)),
        ({"observed": "query", "recent": 1}, range(22, 25)),
    ],
)
def test_eviction_keeps_what_is_attended_to_most(model, options, queries, monkeypatch):
    monkeypatch.setattr(kept_contexts, "_CHUNK", 4)  # several chunks, and one that the window begins in
    [kept] = AttentionEviction(model, ratio=4, **options).compress([CONTEXT], [QUERY])
    weights = attention_of(model, CONTEXT + QUERY)
    chosen = {
        (layer, head): best_columns(weights[layer], head, queries, 6, options.get("recent", 0))
        for layer in range(2)
        for head in range(2)
    }
    assert len(set(map(tuple, chosen.values()))) > 1  # heads differ in what they keep
    assert (kept.size, kept.position, kept.num_tokens) == (6, 22, 22)
    assert_entries(kept, own_cache(model, CONTEXT), lambda layer, head: chosen[layer, head])


@pytest.mark.parametrize("cls", [Truncation, SinkWindow, AttentionEviction])
def test_all_kept_is_the_whole_context(model, cls):
    [kept] = cls(model, ratio=1).compress([CONTEXT])
    assert kept.size == kept.position == 22
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.base_model(input_ids=torch.tensor([CONTEXT + QUERY])).last_hidden_state[0, -3:]
        with using_attention(model, register_attention()):
            found, _ = run_after(model, kept.states, torch.tensor(QUERY), torch.arange(22, 25))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Writer:
    """An engine that answers with texts, and keeps what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked = texts, None

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None, limits=None):
        self.asked = (prompts, sampling.temperature, limits)
        return [[Completion(text=text, token_ids=(), logprobs=(), finish_reason="stop")] for text in self.texts]


def test_a_summary_replaces_the_context():
    model, tokenizer = tiny_model("llama", dtype=torch.float64), char_tokenizer()
    contexts = [tokenizer("a=1; noise; b=2.")["input_ids"], tokenizer("(c)=3; more noise..")["input_ids"]]
    engine = Writer("a1b2 and far too much", "c3")
    compressor = TextSummary(model, tokenizer, ratio=4, engine=engine, prompt="{query}|{context}|{tokens}>")
    kept = compressor.compress(contexts, [tokenizer("a?")["input_ids"], tokenizer("c?")["input_ids"]])
    assert engine.asked == (["a?|a=1; noise; b=2.|4>", "c?|(c)=3; more noise..|5>"], 0.0, [4, 5])
    assert [(one.size, one.position, one.num_tokens) for one in kept] == [(4, 4, 16), (2, 2, 19)]
    for one, text in zip(kept, ("a1b2", "c3"), strict=True):
        tokens = tokenizer(text)["input_ids"]
        assert_entries(one, own_cache(model, tokens), lambda layer, head: slice(None))


def test_a_model_writes_its_own_summaries():
    model, tokenizer = tiny_model("llama"), char_tokenizer()
    [kept] = TextSummary(model, tokenizer, ratio=4).compress([tokenizer("a=1; b=2; c=3")["input_ids"]])
    assert 1 <= kept.size <= 4
    assert kept.num_tokens == 13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: Truncation(model, ratio=0),
            "ratio is 0; it must be a whole number of at least 1 (4 keeps a quarter; 1 keeps all)",
        ),
        (
            lambda model: SinkWindow(model, sinks=-1),
            "sinks is -1; it must be a whole number of at least 0 (4 is usual)",
        ),
        (
            lambda model: AttentionEviction(model, observed="all"),
            "observed is 'all'; it must be one of context, query",
        ),
        (
            lambda model: AttentionEviction(model, observed="query", window=4),
            "window is 4, and observed='query' observes the query's tokens: leave out one of them",
        ),
        (
            lambda model: TextSummary(model, char_tokenizer(), prompt="Summarise!"),
            "prompt is 'Summarise!', without a place for the context: write {context} there",
        ),
        (
            lambda model: AttentionEviction(model, observed="query").compress([CONTEXT]),
            "observed='query' needs the tokens that follow each context: give queries, none empty",
        ),
        (
            lambda model: AttentionEviction(model).compress([CONTEXT, []]),
            "a context has no tokens: leave it out, or give it one",
        ),
        (
            lambda model: Truncation(model).compress([[]]),
            "a context has no tokens: leave it out, or give it one",
        ),
        (
            lambda model: TextSummary(model, char_tokenizer(), prompt="{context}{query}").compress([CONTEXT]),
            "the prompt for summaries has {query}: give queries, the tokens that follow each context",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        make(tiny_model("llama"))
