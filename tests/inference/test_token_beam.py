"""Beam search over tokens, against all completions of a tiny model."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rlhf_lightning.inference import Budget, LocalEngine, RemoteEngine, SamplingParams, TokenBeamSearch
from tests.helpers import EOS_ID, char_tokenizer, tiny_model

LONGEST = 3


class Narrow(LocalEngine):
    """A model that may say four tokens only, so that all completions can be listed."""

    words = (EOS_ID, 5, 6, 7)

    def next_token_logprobs(self, prompts):
        self.asked = getattr(self, "asked", 0) + len(prompts)
        logprobs = super().next_token_logprobs(prompts)
        kept = torch.full_like(logprobs, -torch.inf)
        kept[:, list(self.words)] = logprobs[:, list(self.words)]
        return kept.log_softmax(-1)


@pytest.fixture(scope="module")
def engine():
    return Narrow(tiny_model("llama"), char_tokenizer())


def scores(engine, prompt, penalty, least=0):
    """All completions of at most three tokens, each with its score, by one pass per beginning."""
    found = {}
    for length in range(LONGEST):
        for words in product(engine.words, repeat=length + 1):
            beginning, last = words[:-1], words[-1]
            ended = last == EOS_ID
            if EOS_ID in beginning or (not ended and length + 1 < LONGEST) or (ended and length + 1 < least):
                continue
            total = 0.0
            for place, word in enumerate(words):
                row = engine.next_token_logprobs([[*prompt, *words[:place]]])[0].double()
                total += float(row[word])
            found[words] = total / len(words) ** penalty
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [[9, 10, 11], [20, 3]])
def test_a_wide_beam_finds_the_likeliest_completion(engine, penalty, prompt):
    found = scores(engine, prompt, penalty)
    ended = {words: score for words, score in found.items() if words[-1] == EOS_ID}
    strategy = TokenBeamSearch(
        engine, width=27, length_penalty=penalty, sampling=SamplingParams(max_new_tokens=LONGEST)
    )
    before = engine.asked
    (result,) = strategy.search([prompt])
    best = max(ended, key=ended.__getitem__)
    assert result.token_ids == best
    assert result.score == pytest.approx(ended[best], abs=1e-5)
    assert result.best.finish_reason == "stop"
    assert result.tokens == result.expansions == engine.asked - before
    for candidate in result.candidates:
        assert candidate.score == pytest.approx(found[candidate.token_ids], abs=1e-5)


def test_minimum_length_and_batch(engine):
    sampling = SamplingParams(max_new_tokens=LONGEST, min_new_tokens=2)
    strategy = TokenBeamSearch(engine, width=27, sampling=sampling)
    prompts = [[9, 10, 11], [20, 3], [4]]
    for prompt, result in zip(prompts, strategy.search(prompts), strict=True):
        found = scores(engine, prompt, 0.0, least=2)
        # The end is impossible at first, and what it would have taken is not shared among the others.
        ended = {words: score for words, score in found.items() if words[-1] == EOS_ID}
        assert result.token_ids == max(ended, key=ended.__getitem__)
        (alone,) = strategy.search([prompt])
        assert alone.token_ids == result.token_ids


def test_width_one_is_greedy(engine):
    sampling = SamplingParams(max_new_tokens=8)
    (result,) = TokenBeamSearch(LocalEngine(engine.model, engine.tokenizer), width=1, sampling=sampling).search(
        ["1+2=?"]
    )
    greedy = LocalEngine(engine.model, engine.tokenizer).generate(
        ["1+2=?"], sampling=SamplingParams(max_new_tokens=8, temperature=0)
    )[0][0]
    assert list(result.token_ids) == greedy.token_ids
    assert result.text == greedy.text


def test_budgets_stop_exactly(engine):
    for tokens in range(1, 9):
        strategy = TokenBeamSearch(
            engine, width=3, sampling=SamplingParams(max_new_tokens=6, min_new_tokens=6), budget=Budget(tokens=tokens)
        )
        before = engine.asked
        (result,) = strategy.search([[9, 10]])
        assert result.tokens == engine.asked - before == tokens
        assert result.stopped_by == "tokens"
        assert result.best.finish_reason == "length"


def test_log_probabilities_are_those_of_one_pass_each():
    engine = LocalEngine(tiny_model("llama"), char_tokenizer(), max_batch_tokens=9)
    prompts = [[3, 4, 5, 6], [7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [7], [3, 4, 9]]
    found = engine.next_token_logprobs(prompts)
    for prompt, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = engine.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(row, expected, atol=1e-5)
    with pytest.raises(ValueError, match="a prompt of 128 tokens leaves no room"):
        engine.next_token_logprobs([[3] * 128])


def test_bad_options_are_refused(engine):
    with pytest.raises(ValueError, match="width is 0"):
        TokenBeamSearch(engine, width=0)
    with pytest.raises(ValueError, match="length_penalty is -1"):
        TokenBeamSearch(engine, length_penalty=-1)
    remote = RemoteEngine("http://localhost:1", model="m")
    with pytest.raises(
        ValueError, match="TokenBeamSearch continues token ids, which RemoteEngine cannot make of texts"
    ):
        TokenBeamSearch(remote).search(["a"])
