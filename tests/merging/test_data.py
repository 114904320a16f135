"""Calibration data of merges: all turns of a conversation, each in its context."""

from __future__ import annotations

import pytest

from rlhf_lightning.merging import EnsemblePolicy
from rlhf_lightning.merging.data import estimate_fisher, estimate_products, row_tokens

from ..helpers import CHAT_TEMPLATE, char_tokenizer, tiny_model


def test_a_row_that_is_too_long_for_a_model_is_named():
    tokenizer, model = char_tokenizer(), tiny_model("gpt2")
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "2" * 198}]
    sequences = list(row_tokens(tokenizer, rows))
    assert [len(tokens) for tokens in sequences] == [6, 200]
    message = "sequence 1 of rows has 200 tokens, and the model 128 positions: shorten or remove it"
    for measure in (estimate_fisher, estimate_products):
        with pytest.raises(ValueError, match=message):
            measure(model, sequences)
    with pytest.raises(ValueError, match=message):
        EnsemblePolicy([model, model], tokenizer).learn_weights(rows)


def test_a_conversation_whose_template_drops_earlier_words_is_measured_turn_by_turn():
    tokenizer = char_tokenizer()
    # As templates that leave out the reasoning of earlier turns.
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content'] + eos_token", "(message['content'] if loop.last else '-') + eos_token"
    )
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in said]},
        {"prompt": "1+1=", "completion": "2"},
    ]
    texts = [tokenizer.decode(tokens) for tokens in row_tokens(tokenizer, rows)]
    assert texts == [
        "<user>a\n<assistant>b<eos>",
        "<user>a\n<assistant>-<eos><user>c\n<assistant>d<eos>",
        "<user>a\n<assistant>-<eos><user>c\n<assistant>-<eos><user>e\n<assistant>f<eos>",
        "1+1=2<eos>",
    ]
