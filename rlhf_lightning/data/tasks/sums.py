"""Step-by-step sums: a task generated from a seed, in which every step and answer can be checked.

Its solutions come from two authors. The careful one writes each step and then the answer; the careless one guesses an
answer near the right one and writes no step:

    prompt            careful                             careless
    3+14+9=?          3+14=17 / 17+9=26 / #26             #28

A model fine-tuned on both imitates both; preferences and rewards teach it whom to follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

from .query import Query

STEP_SEPARATOR = "\n"
SPLITS = ("train", "validation", "test")
# How far a guess or a slip may be from the right number.
_NEAR = 5
# Eight problems in ten are for training, one for validation, one for testing.
_SPLIT_OF_BUCKET = ("train",) * 8 + ("validation", "test")
# A split with a tenth of the problems is missed this often in a row once in 10^45 times, unless it is empty.
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class _Authors:
    """Who writes: how often a solution is a careless guess, and how often a careful one has a slip in it."""

    careless: float
    slips: float


def load(contract: str, query: Query) -> list[dict[str, Any]]:
    r"""Makes the rows of the task for one contract.

    Row ``i`` is a function of the keys and ``i`` alone: more rows begin with the same rows, and the same ``seed`` and
    ``split`` give the same problems for every contract. A problem belongs to a split by a hash of its prompt, so splits
    have no problem in common whatever the seeds. Problems are drawn with replacement.

    Keys: ``split=train|validation|test``; ``rows=1000``; ``seed=0``; the difficulty ``terms=4`` (2 to 16) numbers from
    ``low=1`` to ``high=20``; ``careless``, the fraction of solutions by the careless author; ``slips``, the fraction of
    careful solutions with one wrong number, which the later steps continue consistently.

    * ``demonstrations``: ``prompt, completion, author``; ``careless=0.5``, ``slips=0``.
    * ``preference``: ``prompt, chosen, rejected``: a careful right solution against a wrong guess (``careless=0.5`` of
      the rows) or against a careful solution with a slip (the others). A guess differs from a solution at the
      first token; to tell a slip takes the arithmetic.
    * ``unpaired``: ``prompt, completion, label``: the label tells whether the answer is right; ``careless=0.5``,
      ``slips=0``.
    * ``stepwise``: ``prompt, completions, labels``: the steps of a careful solution, to be joined by
      :data:`STEP_SEPARATOR`; a label is true before the first wrong number and false from there on; ``slips=0.5``.
    * ``prompts``: ``prompt``.

    All rows have ``answer``, the right sum as text.

    Args:
        contract: one of the five above.
        query: the keys.

    Raises:
        ValueError: for an unknown contract, key or value, and for a split that has no problems at such a difficulty.

    Example:
        >>> from rlhf_lightning.data.tasks import open_task
        >>> open_task("sums:preference?rows=1&seed=3&terms=3")[0]["chosen"]
        '19+15=34\n34+20=54\n#54'
    """
    if contract not in _CONTRACTS:
        raise ValueError(f"unknown contract {contract!r} in {query.source!r}: allowed are {', '.join(_CONTRACTS)}")

    # All keys are read before `done`, which refuses any others.
    write, careless, slips = _CONTRACTS[contract]
    split = query.choice("split", "train", SPLITS)
    rows = query.integer("rows", 1000, low=1)
    seed = query.integer("seed", 0, low=0)
    terms = query.integer("terms", 4, low=2, high=16)
    low = query.integer("low", 1, low=0)
    high = query.integer("high", 20, low=0)
    if high < low:
        raise query.refusal("high", high, f"at least low, which is {low}")
    authors = _Authors(
        careless=0.0 if careless is None else query.fraction("careless", careless),
        slips=0.0 if slips is None else query.fraction("slips", slips),
    )
    query.done()

    return list(_rows(contract, write, authors, (split, rows, seed, terms, low, high), query))


def split_of(prompt: str) -> str:
    """Returns the split to which a problem belongs, by a hash of its prompt.

    Args:
        prompt: such as ``"3+14+9=?"``.

    Example:
        >>> split_of("3+14+9=?")
        'train'
    """
    digest = blake2b(prompt.encode(), digest_size=8).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest, "big") % len(_SPLIT_OF_BUCKET)]


def _rows(
    contract: str,
    write: Callable[[list[int], _Authors, Random], dict[str, Any]],
    authors: _Authors,
    keys: tuple[str, int, int, int, int, int],
    query: Query,
) -> Iterator[dict[str, Any]]:
    split, rows, seed, terms, low, high = keys
    for row in range(rows):
        # Seeded by text, which Python hashes with SHA-512: the same in every process, whatever PYTHONHASHSEED is.
        problems = Random(f"sums/{seed}/{split}/{row}")
        for _ in range(_MAX_DRAWS):
            # Draw until a problem falls into the split, which a hash of its text decides.
            numbers = [problems.randint(low, high) for _ in range(terms)]
            prompt = "+".join(map(str, numbers)) + "=?"
            if split_of(prompt) == split:
                break
        else:
            raise query.refusal("split", split, f"empty for terms={terms}, low={low}, high={high}; raise terms or high")
        written = write(numbers, authors, Random(f"sums/{seed}/{split}/{row}/{contract}"))
        yield {"prompt": prompt, **written, "answer": str(sum(numbers))}


def _demonstration(numbers: list[int], authors: _Authors, random: Random) -> dict[str, Any]:
    if random.random() < authors.careless:
        return {"completion": _guess(numbers, random), "author": "careless"}
    return {"completion": STEP_SEPARATOR.join(_solution(numbers, authors, random)[0]), "author": "careful"}


def _preference(numbers: list[int], authors: _Authors, random: Random) -> dict[str, Any]:
    chosen, _ = _steps(numbers, None, random)
    if random.random() < authors.careless:
        rejected = f"#{_near(sum(numbers), random, wrong=True)}"
    else:
        rejected = STEP_SEPARATOR.join(_steps(numbers, random.randrange(len(numbers)), random)[0])
    return {"chosen": STEP_SEPARATOR.join(chosen), "rejected": rejected}


def _unpaired(numbers: list[int], authors: _Authors, random: Random) -> dict[str, Any]:
    completion = _demonstration(numbers, authors, random)["completion"]
    return {"completion": completion, "label": completion.rpartition("#")[2] == str(sum(numbers))}


def _stepwise(numbers: list[int], authors: _Authors, random: Random) -> dict[str, Any]:
    completions, labels = _solution(numbers, authors, random)
    return {"completions": completions, "labels": labels}


def _prompt(numbers: list[int], authors: _Authors, random: Random) -> dict[str, Any]:
    return {}


def _solution(numbers: list[int], authors: _Authors, random: Random) -> tuple[list[str], list[bool]]:
    """Writes the careful author's steps, with a slip in a random one with probability ``authors.slips``."""
    slip = random.randrange(len(numbers)) if random.random() < authors.slips else None
    return _steps(numbers, slip, random)


def _steps(numbers: list[int], slip: int | None, random: Random) -> tuple[list[str], list[bool]]:
    """Writes one step per addition and one for the answer, with labels; step ``slip`` has a wrong number."""
    steps: list[str] = []
    total = numbers[0]
    for number in numbers[1:]:
        right = total + number
        shown = _near(right, random, wrong=True) if len(steps) == slip else right
        steps.append(f"{total}+{number}={shown}")
        # The next step continues from the number that was written, right or wrong.
        total = shown
    steps.append(f"#{_near(total, random, wrong=True) if len(steps) == slip else total}")
    return steps, [slip is None or index < slip for index in range(len(steps))]


def _guess(numbers: list[int], random: Random) -> str:
    return f"#{_near(sum(numbers), random)}"


def _near(value: int, random: Random, *, wrong: bool = False) -> int:
    """Draws a number near ``value``, never negative; ``value`` itself is possible unless ``wrong``."""
    return random.choice([n for n in range(max(0, value - _NEAR), value + _NEAR + 1) if not (wrong and n == value)])


# The writer of each contract's columns, and the defaults of `careless` and `slips` (None: no such key).
_CONTRACTS: dict[str, tuple[Callable[[list[int], _Authors, Random], dict[str, Any]], float | None, float | None]] = {
    "demonstrations": (_demonstration, 0.5, 0.0),
    "preference": (_preference, 0.5, None),
    "unpaired": (_unpaired, 0.5, 0.0),
    "stepwise": (_stepwise, None, 0.5),
    "prompts": (_prompt, None, None),
}
