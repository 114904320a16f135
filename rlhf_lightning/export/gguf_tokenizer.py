"""A tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..data.text_tokens import opening_tokens

# Kinds of tokens in the format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Names of ways to split text before merging, in the order of preference where several are the same.
_SPLITS: Final = ("qwen2", "llama-bpe", "tekken", "gpt-4o", "qwen35")
_SPECIAL: Final = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unk_token_id",
    "pad": "pad_token_id",
}


@dataclass(frozen=True)
class TokenizerFields:
    """Everything that a file says about its tokenizer.

    Args:
        model: ``gpt2`` for byte-level merges, ``llama`` for merges by score with bytes for unknown characters.
        split: how text is split before merging.
        tokens: texts of all tokens, one for each row of the embedding.
        types: kinds of the tokens.
        merges: pairs of texts, the first merged first.
        scores: of the tokens, where a reader needs them.
        special: token numbers by role.
        add_bos: whether every text begins with the beginning-of-sequence token.
        add_space_prefix: whether a space is put before a text.
        chat_template: the template, or ``None``.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool
    chat_template: str | None


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerFields:
    """Describes a tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: the format has no kind of tokenizer that does the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library: convert it first")
    described = json.loads(backend.to_str())
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= vocab_size:
        raise ValueError(
            f"the tokenizer has tokens up to {max(vocab.values())}, and the model's embedding {vocab_size}"
        )
    added = {entry["content"]: bool(entry["special"]) for entry in described.get("added_tokens") or ()}
    model, split = _kind(described)
    spelled = _spelled(vocab, added, described) if model == "characters" else {token: token for token in vocab}
    tokens, types = [f"[PAD{n}]" for n in range(vocab_size)], [UNUSED] * vocab_size
    unknown = tokenizer.unk_token_id
    for token, number in vocab.items():
        tokens[number] = spelled[token]
        types[number] = _type(token, number, added, unknown, by_score=model == "llama")
    merges = [_pair(merge) for merge in described["model"].get("merges") or ()]
    opening = opening_tokens(tokenizer)
    if opening not in ([], [tokenizer.bos_token_id]):
        raise ValueError(f"the tokenizer begins texts with the tokens {opening}; the format knows the bos token alone")
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        raise ValueError("the tokenizer has several chat templates; the format has place for one: keep one")
    special = {role: getattr(tokenizer, name) for role, name in _SPECIAL.items()}
    return TokenizerFields(
        model="gpt2" if model == "characters" else model,
        split=split,
        tokens=tokens,
        types=types,
        merges=merges,
        # Without merges, readers make them of scores: single characters give none.
        scores=_scores(tokens, merges) if model != "gpt2" else None,
        special={role: int(number) for role, number in special.items() if number is not None},
        add_bos=bool(opening),
        add_space_prefix=_adds_space(described),
        chat_template=template,
    )


def write_tokenizer(writer: Any, fields: TokenizerFields) -> None:
    """Writes a tokenizer as metadata.

    Args:
        writer: a ``gguf.GGUFWriter``.
        fields: the tokenizer.
    """
    writer.add_tokenizer_model(fields.model)
    writer.add_tokenizer_pre(fields.split)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    if fields.scores is not None:
        writer.add_token_scores(fields.scores)
    if fields.model == "llama":
        writer.add_add_space_prefix(fields.add_space_prefix)
    # An empty list has no type in the format.
    if fields.merges:
        writer.add_token_merges(fields.merges)
    for role, number in fields.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(fields.add_bos)
    writer.add_add_eos_token(False)
    if fields.chat_template is not None:
        writer.add_chat_template(fields.chat_template)


def _kind(described: Mapping[str, Any]) -> tuple[str, str]:
    """Finds the kind of a tokenizer, and the name of its way to split text."""
    model = described["model"]
    parts = _parts(described.get("pre_tokenizer"))
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama", "default"
    if model["type"] == "BPE" and any(part["type"] == "ByteLevel" for part in parts):
        patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
        if not patterns:
            return "gpt2", "gpt-2"
        # The patterns of the format's names, as the library that reads such files has them.
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known

        for name in _SPLITS:
            if patterns == [known.get(name)]:
                return "gpt2", name
        raise ValueError(f"the tokenizer splits text by {patterns[0]!r}, which has no name in the format")
    if model["type"] in ("BPE", "WordLevel") and not model.get("merges"):
        return "characters", "default"
    raise ValueError(
        f"the tokenizer is a {model['type']} of a kind that the format does not have: byte-level merges, merges with "
        "bytes for unknown characters, and single characters can be written"
    )


def _parts(part: Any) -> list[Mapping[str, Any]]:
    """Lists the parts of a pre-tokenizer or normalizer."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [part] if inner is None else [each for item in inner for each in _parts(item)]


def _spelled(vocab: Mapping[str, int], added: Mapping[str, bool], described: Mapping[str, Any]) -> dict[str, str]:
    """Spells single characters in the alphabet of byte-level tokens."""
    alphabet = bytes_to_unicode()
    if _parts(described.get("normalizer")):
        raise ValueError("the tokenizer of characters has a normalizer, which the format has no place for")
    found = {}
    for token in vocab:
        if (
            token not in added
            and (len(token) != 1 or not token.isascii())
            and token != described["model"].get("unk_token")
        ):
            raise ValueError(f"the tokenizer has no merges, and the token {token!r}, which is not one ASCII character")
        single = len(token) == 1 and token.isascii()
        found[token] = alphabet[ord(token)] if single and token not in added else token
    return found


def _type(token: str, number: int, added: Mapping[str, bool], unknown: int | None, *, by_score: bool) -> int:
    if by_score and number == unknown:
        return UNKNOWN
    if token in added:
        return CONTROL if added[token] else USER_DEFINED
    if by_score and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _pair(merge: Any) -> str:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    if " " in left or " " in right:
        raise ValueError(f"the merge {merge!r} has a space, with which the format separates the two parts")
    return f"{left} {right}"


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Returns scores by which merging the best neighbours first is merging by the list."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(described: Mapping[str, Any]) -> bool:
    parts = [*_parts(described.get("normalizer")), *_parts(described.get("pre_tokenizer"))]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
