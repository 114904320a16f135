"""Tokenizers small enough to know every id by heart, and chat templates of the kinds that exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
LETTERS = "\n" + "".join(map(chr, range(32, 127)))

# Says which tokens the assistant generates; closes every message with the end-of-sequence token and nothing after it.
MARKED = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# The same without marks, and with a line's end after each end-of-sequence token, as ChatML has it.
UNMARKED = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Marks the words alone, so that the end-of-sequence token is outside.
WORDS_MARKED = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Knows no end-of-sequence token.
ENDLESS = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Shortens what the assistant said earlier, as templates for reasoning models do.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ 'a:~' }}{% else %}"
    "{{ m['role'][0] + ':' + m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Opens the answer in the generation prompt with something that the finished conversation does not have.
THINKING = UNMARKED.replace("{{ 'a:' }}{% endif %}", "{{ 'a:<think>' }}{% endif %}")
# Refuses system messages.
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + UNMARKED


def chars(template: str | None = None, *, opening: bool = False, **settings: Any) -> PreTrainedTokenizerFast:
    """One token a character: 0-3 are special, 4 is the line's end, and then printable ASCII from the space on.

    With ``opening``, a text is given a beginning-of-sequence token, as by Llama's tokenizers.
    """
    vocab = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if opening:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **{**names, **settings})
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> list[int]:
    """The ids of a text, computed by hand: ``~`` stands for the end-of-sequence token and ``^`` for the first one."""
    return [{"~": EOS, "^": BOS, "\n": 4}.get(letter, ord(letter) - 32 + 5) for letter in text]


def merging() -> PreTrainedTokenizerFast:
    """Letters and digits, a blank goes with what follows it: ``" 4"`` is one token, as byte-pair encoders have it."""
    letters = ["<eos>", *"Ġ0123456789abcdefghijklmnopqrstuvwxyz:="]
    merges = [("Ġ", letter) for letter in "0123456789abc"]
    vocab = {token: index for index, token in enumerate([*letters, *(left + right for left, right in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def complaint(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """Returns the error of a call, which is one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=r"\A[^\n]+\Z") as caught:
        function(*arguments, **settings)
    return str(caught.value)
