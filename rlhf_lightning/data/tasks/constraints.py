"""Constraints on a text that can be checked: their wording in a prompt, and whether a text keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Constraint:
    """One kind of constraint.

    Attributes:
        asks: its wording, with a place for the value.
        keeps: whether a text keeps it, called with the text and the value.
        fits: whether a value can be one of this kind.
        needs: describes such a value.
        group: constraints of different groups can be kept at once.
    """

    asks: str
    keeps: Callable[[str, Any], bool]
    fits: Callable[[Any], bool]
    needs: str
    group: str


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_true(value: Any) -> bool:
    return value is True


def _is_word_and_count(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and _is_text(value[0]) and _is_count(value[1])


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(_is_text, value))


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _has_keys(text: str, keys: Sequence[str]) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and sorted(found) == sorted(keys)


def _one_case(text: str, cased: str) -> bool:
    return text == cased and any(character.isalpha() for character in text)


CONSTRAINTS: dict[str, Constraint] = {
    "words_at_most": Constraint(
        "Use at most {} words.", lambda text, n: len(text.split()) <= n, _is_count, "a number from 1", "length"
    ),
    "words_at_least": Constraint(
        "Use at least {} words.", lambda text, n: len(text.split()) >= n, _is_count, "a number from 1", "length"
    ),
    "sentences": Constraint(
        "Write exactly {} sentences, each ended by a full stop.",
        lambda text, n: len(_END.findall(text)) == n,
        _is_count,
        "a number from 1",
        "length",
    ),
    "lines": Constraint(
        "Write exactly {} lines.", lambda text, n: len(_lines(text)) == n, _is_count, "a number from 1", "layout"
    ),
    "paragraphs": Constraint(
        "Write exactly {} paragraphs, with an empty line between them.",
        lambda text, n: len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == n,
        _is_count,
        "a number from 1",
        "layout",
    ),
    "bullets": Constraint(
        'Write exactly {} bullet points, each a line that begins with "- ".',
        lambda text, n: sum(line.startswith("- ") for line in text.splitlines()) == n,
        _is_count,
        "a number from 1",
        "layout",
    ),
    "json_keys": Constraint(
        "Answer with a JSON object and nothing else, with the keys {}.",
        _has_keys,
        _are_names,
        "a list of names",
        "alone",
    ),
    "contains": Constraint(
        'Use the word "{}".', lambda text, word: _occurrences(text, word) > 0, _is_text, "a word", "words"
    ),
    "avoids": Constraint(
        'Do not use the word "{}".', lambda text, word: not _occurrences(text, word), _is_text, "a word", "words"
    ),
    "times": Constraint(
        'Use the word "{}" exactly {} times.',
        lambda text, given: _occurrences(text, given[0]) == given[1],
        _is_word_and_count,
        "a word and a number from 1, such as [sea, 2]",
        "words",
    ),
    "begins_with": Constraint(
        'Begin with "{}".',
        lambda text, phrase: text.casefold().startswith(phrase.casefold()),
        _is_text,
        "a text",
        "ends",
    ),
    "ends_with": Constraint(
        'End with "{}".', lambda text, phrase: text.casefold().endswith(phrase.casefold()), _is_text, "a text", "ends"
    ),
    "quoted": Constraint(
        "Put the whole answer in double quotation marks.",
        lambda text, _: len(text) > 1 and text[0] == text[-1] == '"',
        _is_true,
        "true",
        "ends",
    ),
    "lower_case": Constraint(
        "Write in lower case only.", lambda text, _: _one_case(text, text.lower()), _is_true, "true", "case"
    ),
    "upper_case": Constraint(
        "Write in capital letters only.", lambda text, _: _one_case(text, text.upper()), _is_true, "true", "case"
    ),
    "no_commas": Constraint("Do not use commas.", lambda text, _: "," not in text, _is_true, "true", "commas"),
}


def read_constraints(given: Any) -> list[tuple[str, Any]]:
    """Checks the constraints of a row.

    Args:
        given: a mapping of kinds to values, or a list of them.

    Returns:
        Kinds with their values.

    Raises:
        ValueError: an unknown kind, or a value that does not fit it.

    Example:
        >>> read_constraints([{"words_at_most": 20}, {"no_commas": True}])
        [('words_at_most', 20), ('no_commas', True)]
    """
    parts = [given] if isinstance(given, Mapping) else given
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not all(isinstance(p, Mapping) for p in parts):
        raise ValueError(f"constraints is {given!r:.80}; write a list such as [{{words_at_most: 20}}]")
    # Tables fill the columns that a row does not have with None.
    found = [(str(kind), value) for part in parts for kind, value in part.items() if value is not None]
    for kind, value in found:
        if kind not in CONSTRAINTS:
            raise ValueError(f"there is no constraint {kind!r}: the kinds are {', '.join(CONSTRAINTS)}")
        if not CONSTRAINTS[kind].fits(value):
            raise ValueError(f"constraint {kind} is {value!r}; it must be {CONSTRAINTS[kind].needs}")
    return found


def wording(kind: str, value: Any) -> str:
    """Words a constraint as part of a prompt.

    Example:
        >>> wording("times", ["sea", 2]), wording("json_keys", ["name", "size"])
        ('Use the word "sea" exactly 2 times.', 'Answer with a JSON object and nothing else, with the keys name, size.')
    """
    asks = CONSTRAINTS[kind].asks
    if kind == "json_keys":
        return asks.format(", ".join(value))
    return asks.format(*value) if kind == "times" else asks.format(value)


def kept(text: str, constraints: Sequence[tuple[str, Any]]) -> list[bool]:
    """Tells which constraints a text keeps, without the white space around it.

    Example:
        >>> kept(" One, two. ", [("words_at_most", 2), ("no_commas", True), ("sentences", 1)])
        [True, False, True]
    """
    stripped = text.strip()
    return [CONSTRAINTS[kind].keeps(stripped, value) for kind, value in constraints]
