"""Reads token ids and log-probabilities of a sample from a server's answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ..utils.messages import one_line
from .sampling import SamplingParams

_TOKEN_PREFIX: Final = "token_id:"  # how vLLM writes tokens as numbers


class UnusableError(Exception):
    """Token ids or log-probabilities that cannot be those of a sample."""


def spoken_tokens(choice: Mapping[str, Any], api: str) -> tuple[list[int], list[float] | None]:
    """Reads token ids (empty if the server does not return them) and log-probabilities of a choice.

    Args:
        choice: one of an answer's ``choices``.
        api: ``completions`` or ``chat``.

    Raises:
        UnusableError: an id is not a non-negative integer, or the log-probabilities are of other tokens.
        KeyError: an entry is malformed; ``TypeError``, ``AttributeError`` and ``ValueError`` likewise.
    """
    reported = choice.get("logprobs")
    tokens: list[Any] = []
    logprobs: list[float] | None = None
    if reported and api == "chat" and reported.get("content") is not None:
        tokens = [entry["token"] for entry in reported["content"]]
        logprobs = [_number(entry["logprob"]) for entry in reported["content"]]
    elif reported and api == "completions" and reported.get("token_logprobs") is not None:
        tokens = reported.get("tokens") or []
        logprobs = [_number(value) for value in reported["token_logprobs"]]

    # Two places for token ids: vLLM's own field, and names of tokens among the log-probabilities.
    given = None if choice.get("token_ids") is None else [_token_id(token) for token in choice["token_ids"]]
    if tokens and all(str(token).startswith(_TOKEN_PREFIX) for token in tokens):
        named = [_token_id(str(token).removeprefix(_TOKEN_PREFIX)) for token in tokens]
        if given not in (None, named):
            raise UnusableError(
                f"returns log-probabilities of other tokens ({one_line(named, 60)}) than those of the completion "
                f"({one_line(given, 60)})"
            )
        return named, logprobs
    return given or [], logprobs


def before_stop(text: str, params: SamplingParams) -> str:
    """Returns the text before a stop string, for servers that do not cut it."""
    if params.min_new_tokens:
        return text
    found = [at for string in params.stop if (at := text.find(string)) >= 0]
    return text[: min(found)] if found else text


def _token_id(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal() and value.isascii():
        return int(value)
    if type(value) is not int or value < 0:
        raise UnusableError(f"returns the token id {value!r}, which is not a whole number of at least 0")
    return value


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan
