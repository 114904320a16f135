"""Fills places in texts that a model is asked with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLACE = re.compile(r"\{(\w+)\}")


def check_places(name: str, template: str, required: Iterable[str], allowed: Iterable[str] = ()) -> None:
    """Raises unless a template has all required places, and no others than the allowed ones.

    Example:
        >>> check_places("critique", "Is {answer} right?", ["prompt", "answer"])
        Traceback (most recent call last):
        ValueError: critique has no {prompt}: write where it stands; got 'Is {answer} right?'
    """
    places, required = _PLACE.findall(template), list(required)
    for place in required:
        if place not in places:
            raise ValueError(f"{name} has no {{{place}}}: write where it stands; got {template!r:.120}")
    known = [*required, *allowed]
    for place in places:
        if place not in known:
            raise ValueError(f"{name} has the place {{{place}}}; it may have {', '.join(known)}; got {template!r:.120}")


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Fills the places of a template, once: values may hold braces.

    Raises:
        ValueError: a place without a value.

    Example:
        >>> fill("{prompt} It is {answer}.", {"prompt": "What is {answer}?", "answer": 4})
        'What is {answer}? It is 4.'
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"the template {template!r:.120} has the place {match[0]}; known are {', '.join(values)}")
        return str(values[match[1]])

    return _PLACE.sub(value, template)


def last_words(prompt: Any) -> str:
    """Returns a prompt as text: of messages, the last one's content.

    Example:
        >>> last_words([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2=?"}])
        '2+2=?'
    """
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def asked_like(prompt: Any, text: str) -> Any:
    """Returns a text as a request of the prompt's kind: a text, or messages with the user's last one replaced.

    Example:
        >>> asked_like("2+2=?", "Check it."), asked_like([{"role": "user", "content": "2+2=?"}], "Check it.")
        ('Check it.', [{'role': 'user', 'content': 'Check it.'}])
    """
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
