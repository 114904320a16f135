"""Instructions with constraints that can be checked: prompts generated from a seed, of our own wording."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from .constraints import CONSTRAINTS, wording
from .query import Query
from .sums import SPLITS, split_of

_MAX_DRAWS = 1000
_REQUESTS = (
    *("Write about {}.", "Describe {}.", "Explain {} to a child.", "Give advice about {}.", "Tell a story about {}."),
    *("Write a letter about {}.", "Write a news report about {}.", "Say why {} matters."),
)
_SUBJECTS = (
    *("the moon", "a river", "bread", "winter", "an old bridge", "the market", "a lighthouse", "trains", "honey"),
    *("a small garden", "the library", "chess", "a long journey", "rain", "the city at night", "a broken clock"),
    *("mountains", "a good friend", "music", "the harbour", "a lost key", "the first day of school", "tea", "maps"),
    *("a new recipe", "the forest", "bicycles", "an island", "the weather", "a family dinner"),
)
_WORDS = ("stone", "light", "water", "time", "road", "hand", "green", "quiet", "open", "north", "story", "small")
_OPENINGS = ("To begin with", "Long ago", "In short", "Dear reader", "It is said that", "Every morning")
_CLOSINGS = ("That is all.", "The end.", "Thank you.", "So it was.", "Good night.", "More tomorrow.")
_KEYS = ("name", "size", "place", "year", "reason", "colour", "price", "notes")


def load(contract: str, query: Query) -> list[dict[str, Any]]:
    """Makes prompts that ask for a text and constrain it.

    Row ``i`` is a function of the keys and ``i`` alone. Keys: ``split=train|validation|test``, by a hash of the
    prompt; ``rows=1000``; ``seed=0``; ``constraints=1`` (1 to 4) of each prompt, of different groups, so that a text
    can keep all of them; ``kinds``, names of ``data.tasks.constraints.CONSTRAINTS`` with commas between them (all by
    default). Rows have ``prompt``, ``constraints`` (a list of kinds with their values) and ``kind``: that of the only
    constraint, or how many there are.

    Args:
        contract: ``prompts``.
        query: the keys.

    Raises:
        ValueError: for an unknown contract, key or value, and for kinds that cannot be combined.

    Example:
        >>> from rlhf_lightning.data.tasks import open_task
        >>> row = open_task("instructions:prompts?rows=1&kinds=no_commas")[0]
        >>> row["constraints"], row["kind"], row["prompt"].endswith("Do not use commas.")
        ([{'no_commas': True}], 'no_commas', True)
    """
    if contract != "prompts":
        raise ValueError(f"unknown contract {contract!r} in {query.source!r}: allowed is prompts")
    split = query.choice("split", "train", SPLITS)
    rows = query.integer("rows", 1000, low=1)
    seed = query.integer("seed", 0, low=0)
    count = query.integer("constraints", 1, low=1, high=4)
    kinds = query.text("kinds", ",".join(CONSTRAINTS)).split(",")
    if unknown := [kind for kind in kinds if kind not in CONSTRAINTS]:
        raise query.refusal("kinds", unknown[0], f"of {', '.join(CONSTRAINTS)}")
    query.done()
    groups = {CONSTRAINTS[kind].group for kind in kinds}
    if count > 1:
        groups -= {"alone"}
        kinds = [kind for kind in kinds if CONSTRAINTS[kind].group in groups]
    if len(groups) < count:
        raise query.refusal("constraints", count, f"at most {len(groups)} for these kinds, which cannot be combined")
    return list(_rows(split, rows, seed, count, kinds, query))


def _rows(split: str, rows: int, seed: int, count: int, kinds: list[str], query: Query) -> Iterator[dict[str, Any]]:
    for row in range(rows):
        # Seeded by text, as sums: the same in every process.
        draw = Random(f"instructions/{seed}/{split}/{row}/{count}/{','.join(kinds)}")
        for _ in range(_MAX_DRAWS):
            chosen = _chosen(draw, count, kinds)
            asked = [draw.choice(_REQUESTS).format(draw.choice(_SUBJECTS)), *(wording(*part) for part in chosen)]
            if split_of(" ".join(asked)) == split:
                break
        else:
            raise query.refusal("split", split, "empty for these kinds")
        kind = chosen[0][0] if count == 1 else f"{count} constraints"
        yield {"prompt": " ".join(asked), "constraints": [dict([part]) for part in chosen], "kind": kind}


def _chosen(draw: Random, count: int, kinds: list[str]) -> list[tuple[str, Any]]:
    """Draws kinds of different groups, with values."""
    found: list[tuple[str, Any]] = []
    left = list(kinds)
    for _ in range(count):
        kind = draw.choice(left)
        found.append((kind, _value(draw, kind)))
        left = [other for other in left if CONSTRAINTS[other].group != CONSTRAINTS[kind].group]
    return found


def _value(draw: Random, kind: str) -> Any:
    """Draws a value that can be kept together with those of other groups."""
    made: dict[str, Any] = {
        "words_at_most": draw.randint(30, 80),
        "words_at_least": draw.randint(20, 60),
        "sentences": draw.randint(4, 8),
        "lines": draw.randint(2, 4),
        "paragraphs": draw.randint(2, 4),
        "bullets": draw.randint(2, 4),
        "json_keys": draw.sample(_KEYS, draw.randint(2, 4)),
        "contains": draw.choice(_WORDS),
        "avoids": draw.choice(_WORDS),
        "times": [draw.choice(_WORDS), draw.randint(2, 4)],
        "begins_with": draw.choice(_OPENINGS),
        "ends_with": draw.choice(_CLOSINGS),
    }
    return made.get(kind, True)
