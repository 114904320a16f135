"""Ratings of models that play against each other, and how often each is drawn as an opponent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Literal, get_args

from ..utils.validation import check_choice, check_fraction, check_positive

Game = tuple[str, str, float]
Weighting = Literal["uniform", "hard", "even"]


def expected_score(rating: float, other: float) -> float:
    """Returns the score that Elo's model expects of a player against another.

    Example:
        >>> expected_score(1000, 1000), round(expected_score(1400, 1000), 4)
        (0.5, 0.9091)
    """
    return float(1.0 / (1.0 + 10.0 ** ((other - rating) / 400.0)))


def elo_ratings(
    games: Iterable[Game], *, k: float = 32.0, start: float = 1000.0, ratings: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Rates players by Elo's rule, game after game (Elo, 1978).

    After a game with score s (1 won, 0.5 drawn, 0 lost) the first player's rating rises by ``k (s - e)``, where e is
    its ``expected_score`` before the game, and the other's falls by as much: the sum of ratings stays the same.

    Args:
        games: first player, second player, the first one's score in [0, 1], in the order in which they were played;
            such as two exports and the share of prompts on which the first one's answer is better.
        k: largest change of one game, above 0.
        start: rating of a player that has not played.
        ratings: from before.

    Returns:
        Ratings of all players.

    Raises:
        ValueError: a score outside of [0, 1], a player against itself, or ``k`` out of its range.

    Example:
        >>> elo_ratings([("a", "b", 1.0)])
        {'a': 1016.0, 'b': 984.0}
    """
    check_positive("k", k, "32 is usual")
    found = dict(ratings or {})
    for number, (one, other, score) in enumerate(games):
        if one == other:
            raise ValueError(f"game {number} is of {one!r} against itself: name two players")
        if not 0 <= score <= 1:
            raise ValueError(f"the score of game {number} is {score}; it must be in [0, 1]: 1 if {one!r} has won")
        before, against = found.setdefault(one, start), found.setdefault(other, start)
        change = k * (score - expected_score(before, against))
        found[one], found[other] = before + change, against - change
    return found


def games_of(scores: Mapping[str, Sequence[float | None]]) -> list[Game]:
    """Makes a game of each prompt and pair of players: the better answer wins, equals draw.

    Args:
        scores: by player, those of its answers to the same prompts; without a score there is no game.

    Returns:
        Games in the order of the prompts, and of the players.

    Example:
        >>> games_of({"a": [1.0, 0.5], "b": [0.0, 0.5]})
        [('a', 'b', 1.0), ('a', 'b', 0.5)]
    """
    found = []
    for answers in zip(*scores.values(), strict=True):
        for (one, ours), (other, theirs) in combinations(zip(scores, answers, strict=True), 2):
            if ours is not None and theirs is not None:
                found.append((one, other, 0.5 if ours == theirs else float(ours > theirs)))
    return found


def win_rates(games: Iterable[Game], player: str) -> dict[str, float]:
    """Returns a player's mean score against each of its opponents, in the order in which they met.

    Example:
        >>> win_rates([("a", "b", 1.0), ("c", "a", 1.0), ("a", "b", 0.5)], "a")
        {'b': 0.75, 'c': 0.0}
    """
    found: dict[str, list[float]] = {}
    for one, other, score in games:
        if player == one:
            found.setdefault(other, []).append(score)
        elif player == other:
            found.setdefault(one, []).append(1 - score)
    return {opponent: fmean(scores) for opponent, scores in found.items()}


def league_weights(
    win_rates: Sequence[float],
    kind: Weighting = "hard",
    *,
    power: float = 2.0,
    floor: float = 0.0,
) -> list[float]:
    r"""Weights opponents of a league by how a player does against each: prioritised fictitious self-play.

    Paper: AlphaStar (Vinyals et al., 2019). With the win rate x against an opponent, ``hard`` is
    :math:`(1 - x)^\text{power}`, which prefers opponents that win, ``even`` is :math:`x (1 - x)`, which prefers equals,
    and ``uniform`` is 1. Weights are normalised; where all are 0, each opponent has the same.

    Args:
        win_rates: of the player against each opponent, such as earlier exports, in [0, 1].
        kind: of these.
        power: of ``hard``, above 0.
        floor: share of all draws that goes to all opponents alike, in [0, 1).

    Returns:
        Probabilities of being drawn, which add up to 1.

    Raises:
        ValueError: no opponent, or a number out of its range.

    Example:
        >>> league_weights([0.5, 1.0, 0.0], "hard", power=1.0)
        [0.3333333333333333, 0.0, 0.6666666666666666]
    """
    check_choice("kind", kind, get_args(Weighting))
    check_positive("power", power, "2 is usual")
    check_fraction("floor", floor, "0 draws no opponent that has lost every game")
    if not win_rates:
        raise ValueError("win_rates is empty: a league has at least one opponent, such as the first export")
    for rate in win_rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"win_rates has {rate}; each must be in [0, 1]")
    raw = [1.0 if kind == "uniform" else (1 - x) ** power if kind == "hard" else x * (1 - x) for x in win_rates]
    total, even = sum(raw), 1.0 / len(raw)
    return [floor * even + (1 - floor) * (weight / total if total > 0 else even) for weight in raw]
