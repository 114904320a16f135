from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.inference.completion import Request, StopFinder, decode
from rlhf_lightning.inference.sampling import SamplingParams

from ..helpers import EOS_ID


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after an end token: characters beyond ASCII take several."""
    vocab = {"<eos>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<eos>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def byte_tokens(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


@pytest.mark.parametrize(
    ("text", "stop", "tokens_read", "before"),
    [
        ("one two three", ("two",), 7, "one "),
        ("one two three", ("three", "wo t"), 9, "one t"),
        ("größe = 3€ viel", ("€",), len("größe = 3€".encode()), "größe = 3"),
        ("größe = 3€ viel", ("ße",), len("größe".encode()), "grö"),
        ("aab", ("ab",), 3, "a"),
        ("abcabc", ("abcabc",), 6, ""),
    ],
)
def test_a_stop_string_is_found_with_the_token_that_completes_it(
    text: str, stop: tuple[str, ...], tokens_read: int, before: str
) -> None:
    finder = StopFinder(byte_tokenizer(), stop)
    tokens = byte_tokens(text)
    found = [finder.push(tokens[:count]) for count in range(1, tokens_read + 1)]
    assert found == [None] * (tokens_read - 1) + [before]


def test_without_a_stop_string_the_text_is_the_whole_decoding() -> None:
    tokenizer = byte_tokenizer()
    finder = StopFinder(tokenizer, ("never",))
    tokens = byte_tokens("für 3€\n\n weiter")
    assert all(finder.push(tokens[:count]) is None for count in range(1, len(tokens) + 1))
    assert finder.text == decode(tokenizer, tokens) == "für 3€\n\n weiter"


def request(params: SamplingParams, limit: int = 10) -> Request:
    return Request((5,), (0, 0), 0, limit, params, frozenset({EOS_ID}), byte_tokenizer())


def test_an_end_token_stops_and_is_kept_out_of_the_text() -> None:
    sample = Request((5,), (0, 0), 0, 10, SamplingParams(), frozenset({0}), byte_tokenizer())
    for token in [*byte_tokens("ab"), 0]:
        assert sample.finish_reason is None
        sample.push(token, -0.5, None)
    completion = sample.completion()
    assert (completion.token_ids[-1], completion.text, completion.finish_reason) == (0, "ab", "stop")
    assert completion.logprobs == [-0.5] * 3
    assert completion.model_logprobs is None


def test_the_last_allowed_token_ends_by_length_unless_it_stops() -> None:
    for token, reason in [(byte_tokens("c")[0], "length"), (EOS_ID, "stop")]:
        sample = request(SamplingParams(), limit=3)
        for each in [*byte_tokens("ab"), token]:
            sample.push(each, 0.0, None)
        assert sample.finish_reason == reason


def test_stops_before_the_minimum_length_are_passed_over() -> None:
    sample = request(SamplingParams(stop=("a",), min_new_tokens=3))
    for each in byte_tokens("ab"):
        sample.push(each, 0.0, None)
    assert sample.finish_reason is None
    for each in byte_tokens("ca"):
        sample.push(each, 0.0, None)
    assert sample.finish_reason == "stop"
    assert sample.completion().text == "abc"
