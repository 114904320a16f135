"""What models are measured on: all turns of a conversation, each in its context."""

from __future__ import annotations

from rlhf_lightning.merging.data import row_tokens

from ..helpers import CHAT_TEMPLATE, char_tokenizer


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
