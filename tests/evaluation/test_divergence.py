"""Divergences against the definition: one sequence at a time, the models' own logits, the whole vocabulary."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.evaluation import divergence, logits, mean_interval, own_samples
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.sequences import Example, Segment

from ..helpers import char_tokenizer, tiny_model


def rows() -> list[Example]:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 30, (count,), generator=draw).tolist()

    found = []
    for n in range(4):
        children = [Segment(ids(3 + n), [1.0] * (2 + n) + [0.0]), Segment(ids(2), [1.0, 1.0])]
        found.append(Example(f"rows:{n}", Segment(ids(4 + n), children=children)))
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("budget", [1, 8192])
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_it_is_the_definition(arch: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_ENTRIES", 300)  # a few tokens at a time
    model, reference = (tiny_model(arch, seed=n, dtype=torch.float64).eval() for n in (0, 1))
    close = partial(pytest.approx, rel=1e-9)
    if arch == "gemma2":
        # Soft caps are in the eager attention alone, whose softmax is in fp32.
        close = partial(pytest.approx, rel=1e-6)
        for part in (model, reference):
            set_attention(part, "eager")
    forward, reverse, k1, k3, own, other, totals = [], [], [], [], [], [], []
    for example in rows():
        for prompt, child in example.root.paths():
            tokens = torch.tensor([*prompt.tokens, *child.tokens])
            with torch.no_grad():
                log_p, log_q = (part(tokens[None]).logits[0].log_softmax(-1) for part in (model, reference))
            total = 0.0
            for place, weight in enumerate(child.weights):
                if weight > 0:
                    at = len(prompt.tokens) + place
                    p, q, token = log_p[at - 1], log_q[at - 1], tokens[at]
                    forward.append(float(kl_div(q, p, log_target=True, reduction="sum")))
                    reverse.append(float(kl_div(p, q, log_target=True, reduction="sum")))
                    own.append(float(p[token]))
                    other.append(float(q[token]))
                    ratio = float(q[token] - p[token])
                    k1.append(-ratio)
                    k3.append(math.exp(ratio) - 1 - ratio)
                    total += forward[-1]
            totals.append(total)
    found = divergence(model, reference, rows(), micro_batch_tokens=budget)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert (found.tokens, found.sequences) == (len(forward), 8)
    assert found.forward == close(mean(forward))
    assert found.reverse == close(mean(reverse))
    assert found.symmetric == close(mean(forward) + mean(reverse))
    assert (found.k1, found.k3) == close((mean(k1), mean(k3)))
    assert found.perplexity == close(math.exp(-mean(own)))
    assert found.reference_perplexity == close(math.exp(-mean(other)))
    expected = mean_interval(totals)
    assert found.per_sequence.value == close(expected.value)
    assert found.per_sequence.low == close(expected.low)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama")
    found = divergence(model, model, rows())
    assert (found.forward, found.reverse, found.k1, found.k3) == (0.0, 0.0, 0.0, 0.0)
    assert found.perplexity == found.reference_perplexity


def test_estimates_on_own_samples_agree_with_the_exact_value() -> None:
    model, reference = (tiny_model("llama", seed=n, initializer_range=0.3) for n in (0, 1))
    engine = LocalEngine(model, char_tokenizer())
    prompts = [Example(f"p:{n}", Segment([5 + n, 6])) for n in range(4)]
    params = SamplingParams(max_new_tokens=6, min_new_tokens=6, seed=3)
    found = divergence(model, reference, own_samples(engine, prompts, num_samples=150, sampling=params))
    assert found.tokens == 4 * 150 * 6
    # Standard errors of a mean over 3,600 dependent tokens are below 0.03 of these values.
    assert found.k1 == pytest.approx(found.forward, rel=0.1)
    assert found.k3 == pytest.approx(found.forward, rel=0.1)


def test_engines_speak_in_the_same_tokens() -> None:
    """Of equal size, with two tokens exchanged: the numbers alone would give a divergence."""
    model, reference = (tiny_model("llama", seed=n) for n in (0, 1))
    engines = [LocalEngine(part, char_tokenizer()) for part in (model, reference)]
    assert divergence(*engines, rows()) == divergence(model, reference, rows())
    backend = json.loads(char_tokenizer().backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    assert vocab["b"] < vocab["a"]
    text = f"differ: the token 'a' is {vocab['b']} in one and {vocab['a']} in the other; distributions"
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<eos>")
    assert len(other) == len(char_tokenizer())
    with pytest.raises(ValueError, match=text):
        divergence(engines[0], LocalEngine(reference, other), rows())


def test_bad_input() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="vocabulary of"):
        divergence(model, tiny_model("llama", vocab_size=200), rows())
    with pytest.raises(ValueError, match="none of the 1 rows has a scored token"):
        divergence(model, model, [Example("a", Segment([3, 4]))])
    with pytest.raises(ValueError, match="micro_batch_tokens is 0"):
        divergence(model, model, rows(), micro_batch_tokens=0)
