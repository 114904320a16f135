"""Tokenizers small enough to know every id by heart."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
LETTERS = "\n" + "".join(map(chr, range(32, 127)))


def char_tokenizer(**settings: object) -> PreTrainedTokenizerFast:
    """One token per character; 0-3 are special, then the line's end, then printable ASCII from the space on."""
    vocab = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**names, **settings})


@pytest.fixture
def chars() -> PreTrainedTokenizerFast:
    return char_tokenizer()
