"""Recall from long contexts: facts far back, noise and denials between, and a question about one of the facts.

A fact is a key in small letters followed by its value in capitals, so that ``kQZ`` says that the value of ``k`` is
``QZ``. Everything between facts is noise, or, where the task has decoys, a denial: ``k!RB`` says that ``RB`` is not the
value of ``k``.

    context                               prompt    completion
    3.8kQZ 7-,0aMP;4k!RB25bTT:            ?k        #QZ

To answer, a model looks one key up; to compress a context for questions it has not seen, it keeps all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from .query import Query
from .sums import SPLITS, split_of

CONTRACTS = ("demonstrations", "prompts")
_NOISE = digits + " .,;:-"


@dataclass(frozen=True)
class _Shape:
    """Lengths in characters and numbers of things in a context."""

    length: int
    facts: int
    key: int
    value: int
    decoys: int

    @property
    def used(self) -> int:
        """Characters that are no noise."""
        return self.facts * (self.key + self.value) + self.decoys * (self.key + 1 + self.value)


@dataclass(frozen=True)
class _Problem:
    """A context with its facts: key, value and where it begins, in order."""

    context: str
    facts: list[tuple[str, str, int]]


def load(contract: str, query: Query) -> list[dict[str, Any]]:
    """Makes the rows of the task for one contract.

    Row ``i`` is a function of the keys and ``i`` alone: more rows begin with the same rows, and the same ``seed`` and
    ``split`` give the same contexts for every contract. A context belongs to a split by its hash, so splits have none
    in common whatever the seeds.

    Keys: ``split=train|validation|test``; ``rows=1000``; ``seed=0``; ``questions=1``, the number of rows in turn that
    ask for different facts of one context; ``place=column``, or ``prompt`` for the context at the beginning of the
    prompt; and the difficulty: ``length=128`` characters of a context with ``facts=16`` among them at random places,
    ``key=1`` (1 to 3) and ``value=2`` (1 to 4) letters of each, and ``decoys=0`` denials of a wrong value of one of the
    keys.

    * ``demonstrations``: ``context, prompt, completion``.
    * ``prompts``: ``context, prompt``.

    All rows have ``answer``, the value of the key that is asked for, and ``offset``, the number of characters before
    its fact. Facts are asked for with equal probability, and one context has no key twice.

    Args:
        contract: one of the two above.
        query: the keys.

    Raises:
        ValueError: for an unknown contract, key or value, and for facts that do not fit into the length.

    Example:
        >>> from rlhf_lightning.data.tasks import open_task
        >>> row = open_task("recall:demonstrations?rows=1&length=24&facts=4")[0]
        >>> row["context"], row["prompt"], row["completion"], row["offset"]
        (' 7wFL1nWX19lCS-56 --vBJ0', '?w', '#FL', 2)
    """
    if contract not in CONTRACTS:
        raise ValueError(f"unknown contract {contract!r} in {query.source!r}: allowed are {', '.join(CONTRACTS)}")

    # All keys are read before `done`, which refuses any others.
    split = query.choice("split", "train", SPLITS)
    rows = query.integer("rows", 1000, low=1)
    seed = query.integer("seed", 0, low=0)
    length = query.integer("length", 128, low=1)
    letters = query.integer("key", 1, low=1, high=3)
    shape = _Shape(
        length=length,
        key=letters,
        value=query.integer("value", 2, low=1, high=4),
        facts=query.integer("facts", 16, low=1, high=len(ascii_lowercase) ** letters),
        decoys=query.integer("decoys", 0, low=0),
    )
    if shape.used > length:
        raise query.refusal("length", length, f"at least {shape.used}, the characters of its facts and decoys")
    in_prompt = query.choice("place", "column", ("column", "prompt")) == "prompt"
    questions = query.integer("questions", 1, low=1, high=shape.facts)
    query.done()

    found: list[dict[str, Any]] = []
    for number in range(-(-rows // questions)):
        problem, random = _problem(f"recall/{seed}/{split}/{number}", split, shape)
        for key, value, offset in random.sample(problem.facts, shape.facts)[:questions]:
            before = {} if in_prompt else {"context": problem.context}
            row = before | {"prompt": f"{problem.context if in_prompt else ''}?{key}"}
            row |= {"completion": f"#{value}"} if contract == "demonstrations" else {}
            found.append(row | {"answer": value, "offset": offset})
    return found[:rows]


def _problem(name: str, split: str, shape: _Shape) -> tuple[_Problem, Random]:
    """Draws the context of a name, and returns what further draws continue."""
    # Seeded by text, which Python hashes with SHA-512: the same in every process, whatever PYTHONHASHSEED is.
    random = Random(name)
    problem = _draw(shape, random)
    # A hash decides; even the smallest shape has hundreds of contexts, so every split has some.
    while split_of(problem.context) != split:
        problem = _draw(shape, random)
    return problem, random


def _draw(shape: _Shape, random: Random) -> _Problem:
    """Draws a context: its facts and decoys in a random order, at random places among noise."""
    keys: list[str] = []
    while len(keys) < shape.facts:
        key = _letters(ascii_lowercase, shape.key, random)
        keys += [] if key in keys else [key]
    values = {key: _letters(ascii_uppercase, shape.value, random) for key in keys}
    things = [(key, key + values[key]) for key in keys]
    for _ in range(shape.decoys):
        key = random.choice(keys)
        things.append((key, f"{key}!{_other(values[key], random)}"))
    random.shuffle(things)

    # Noise and things in one row of places; things take a random choice of them.
    noise = shape.length - shape.used
    places = set(random.sample(range(noise + len(things)), len(things)))
    waiting, facts, context = iter(things), [], ""
    for place in range(noise + len(things)):
        if place not in places:
            context += random.choice(_NOISE)
            continue
        key, text = next(waiting)
        if "!" not in text:
            facts.append((key, values[key], len(context)))
        context += text
    return _Problem(context, facts)


def _letters(alphabet: str, number: int, random: Random) -> str:
    return "".join(random.choice(alphabet) for _ in range(number))


def _other(value: str, random: Random) -> str:
    """Draws a value that is not this one."""
    other = value
    while other == value:
        other = _letters(ascii_uppercase, len(value), random)
    return other
