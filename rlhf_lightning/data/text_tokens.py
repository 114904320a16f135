"""Encodes and decodes text, at the beginning of a sequence and in the middle of one.

Many tokenizers put a space before a text (Metaspace, the Prepend normalizer, a ByteLevel prefix) and strip it again
when they decode. That is right at the beginning of a sequence, and wrong for its continuation: ``1+2=`` and ``3``
would become ``1+2= 3``, and a sampled `` 3`` would be read as ``3``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_Known = tuple[int, PreTrainedTokenizerBase | None]  # how many tokens it had, and another one if that is needed
_CONTINUING: WeakKeyDictionary[PreTrainedTokenizerBase, _Known] = WeakKeyDictionary()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, continues: bool = False) -> list[int]:
    """Tokenizes a text without the special tokens that the tokenizer puts around one.

    Args:
        tokenizer: any.
        text: the text.
        continues: whether the text continues another one, so that no space is put before it.

    Raises:
        ValueError: the text holds half of a character (a lone surrogate).
    """
    if continues:
        tokenizer = continuing(tokenizer)
    return list(tokenizer(check_encodable(text), add_special_tokens=False, verbose=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Decodes tokens that continue others: special tokens are skipped, and all whitespace is kept."""
    return str(
        continuing(tokenizer).decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that a tokenizer puts before every text: a beginning-of-sequence token, or none."""
    # Compared on a sample, because tokenizers add these tokens by a post-processor or by an option.
    bare, dressed = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return dressed[:at]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenizes a text that a model continues.

    The tokens begin once with the tokens that the tokenizer puts before every text; a chat that was rendered by hand
    may have them already. An empty text is the beginning-of-sequence token, or else the end-of-sequence token.
    """
    opening = opening_tokens(tokenizer)
    tokens = encode(tokenizer, text) if text else []
    if tokens[: len(opening)] != opening or not tokens:
        tokens = opening + tokens
    if tokens:
        return tokens

    # A model needs at least one token to continue.
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    token: Any = last if first is None else first
    return [] if token is None else [int(token)]


def continuing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a version of a tokenizer for continuations: it neither adds a leading space nor strips one.

    Args:
        tokenizer: any; one that does neither is returned unchanged.
    """
    known = _CONTINUING.get(tokenizer)
    if known is None or known[0] != len(tokenizer):  # tokens may have been added since
        other = _without_blank(tokenizer)
        # One that stays as it is must not be kept alive by its own entry.
        known = _CONTINUING[tokenizer] = len(tokenizer), None if other is tokenizer else other
    return tokenizer if known[1] is None else known[1]


def shared_prefix(one: str, other: str) -> int:
    """Counts the leading characters that two texts share.

    Example:
        >>> shared_prefix("abc", "abx")
        2
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def check_encodable(text: str) -> str:
    """Returns a text that can be encoded; JSON can contain lone surrogates (half characters), which cannot.

    Raises:
        ValueError: naming the surrogate and its position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = repr(text[error.start])
        raise ValueError(
            f"character {error.start + 1} of a text is {half}, half of a surrogate pair: write the whole character, or "
            "remove it"
        ) from None
    return text


def _without_blank(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return tokenizer
    parts = ("normalizer", "pre_tokenizer", "decoder")
    described = {name: _described(getattr(backend, name)) for name in parts}
    changed = {name: _plain(part) for name, part in described.items()}
    if changed == described:
        return tokenizer
    # Rebuilt from its description, since the parts of the original are shared with it.
    whole = json.loads(backend.to_str())
    other = copy.copy(tokenizer)
    replaced: Any = other
    replaced._tokenizer = Tokenizer.from_str(json.dumps({**whole, **changed}))
    return other


def _described(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _plain(part: Any) -> Any:
    """Returns a part of a tokenizer changed so that it neither adds a leading space nor strips one."""
    if part is None:
        return None
    kind = part["type"]
    if kind == "Prepend" or (kind == "Strip" and part.get("content") == " "):
        return None
    if kind == "Metaspace":
        # Older files have add_prefix_space alone.
        return {**{k: v for k, v in part.items() if k != "add_prefix_space"}, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            inner = [_plain(item) for item in part[name]]
            return {**part, name: [item for item in inner if item is not None]}
    return part
