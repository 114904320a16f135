"""The ``self-play`` stage: a model against earlier ones, drawn by how it does against each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from ..evaluation.checks import check_scorer
from ..generation.options import sampling_params
from ..inference import Engine, derive_seed
from ..inference.policies import policy_name, policy_spec
from ..self_improvement.samples import ScoredPrompt, model_hash, sample_prompts
from ..self_improvement.scorers import load_scorer
from ..self_improvement.self_play import elo_ratings, games_of, league_weights, win_rates
from ..utils.files import write_atomically
from ..utils.validation import check_count
from .row_files import PROMPTS_AT_ONCE, SAMPLED, Journal, Part, write_rows
from .sample_stage import stage_policy, stage_prompts
from .stages import SelfPlayStage

_ADVICE = "raise num_samples or sampling.temperature, or play against other opponents"
# The model among the players; opponents have the names of their folders, those of several joined.
_SELF = ""


def check_self_play(stage: SelfPlayStage) -> None:
    """Checks the options of a stage before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    policy_spec(stage.model)
    sampling_params(stage.sampling)
    check_scorer(stage.verifier)
    check_count("num_samples", stage.num_samples, "of each player")
    check_count("trial", stage.trial, "prompts that all players answer first")
    stage.check()
    if not isinstance(stage.opponents, list) or not stage.opponents:
        advice = "list at least one folder of a model, or write opponents: ${round.earlier} in the body of rounds"
        raise ValueError(f"opponents is {stage.opponents!r}: {advice}")
    for opponent in stage.opponents:
        policy_spec(opponent, "an opponent")
    league_weights([0.5], stage.weighting, power=stage.power, floor=stage.floor)
    elo_ratings([], k=stage.k)


def run_self_play(
    stage: SelfPlayStage, folder: Path, seed: int, dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Lets all players answer the first prompts, the model and a drawn opponent the others, and writes rows of both.

    Samples are kept in ``sampled.jsonl``, part by part; an interrupted stage continues after the last part.
    If the first prompts give ``max_rows`` rows, no others are answered.

    Args:
        stage: the stage.
        folder: where the rows and ``league.json`` go.
        seed: a sample is a function of this, its player, its prompt's number and its own; so are the opponents.
        dtype: of the models' weights.
        say: shown one line per part.

    Returns:
        Counts, the mean reward of the samples, the model's Elo rating, and its win rate over all opponents.

    Raises:
        NoRowsError: no prompt gave a row.
    """
    game = _Match(stage, seed, dtype)
    journal = Journal(folder / SAMPLED)
    game.play(list(game.trial()), journal, say)
    league = game.league(journal.parts)
    drawn = [] if game.has_enough(journal.parts) else game.draw(league)
    game.play([*game.trial(), *game.rest(drawn)], journal, say)

    # Rows of each prompt from the samples of all who answered it.
    metrics = write_rows(stage, journal, folder, seed, _ADVICE, parts=[Part(game.together(journal.parts), [])])
    table = league | {"opponents": [one | {"prompts": drawn.count(one["place"])} for one in league["opponents"]]}
    write_atomically(folder / stage.league, json.dumps(table, indent=1) + "\n")
    return metrics | {"elo": league["rating"], "win_rate": fmean(one["win_rate"] for one in league["opponents"])}


@dataclass(frozen=True)
class _Turn:
    """Prompts that a player answers together."""

    player: str
    numbers: list[int]


class _Match:
    """The players of a stage, and who answers which prompts."""

    def __init__(self, stage: SelfPlayStage, seed: int, dtype: str) -> None:
        self.stage, self.seed, self.dtype = stage, seed, dtype
        opponents = {policy_name(opponent): opponent for opponent in stage.opponents}
        self.opponents = list(opponents)
        self.places = {_SELF: stage.model} | opponents
        self.hashes = {player: model_hash(place) for player, place in self.places.items()}
        self.scorer, self.sampling = load_scorer(stage.verifier), sampling_params(stage.sampling)
        self._loaded: tuple[str, Any] | None = None
        self.count = len(self._load(_SELF)[1])

    def trial(self) -> Iterator[_Turn]:
        """Who answers the first prompts: all."""
        for player in self.places:
            yield from _turns(player, range(min(self.stage.trial, self.count)))

    def rest(self, drawn: Sequence[str]) -> Iterator[_Turn]:
        """Who answers the others: the model, and the opponents that were drawn for them."""
        first = self.count - len(drawn)
        yield from _turns(_SELF, range(first, self.count))
        for player in self.opponents:
            yield from _turns(player, [n for n, name in enumerate(drawn, start=first) if name == player])

    def play(self, turns: Sequence[_Turn], journal: Journal, say: Callable[[str], None]) -> None:
        """Plays turns that the journal does not have; a model is loaded for its first turn, and left after its last."""
        for turn in turns[len(journal.parts) :]:
            engine, examples = self._load(turn.player)
            found = sample_prompts(
                engine,
                [examples[n] for n in turn.numbers],
                self.scorer,
                num_samples=self.stage.num_samples,
                sampling=self.sampling,
                # The model and a copy of it among its opponents draw different samples.
                seed=derive_seed(self.seed, "player", [*self.places].index(turn.player)),
                numbers=turn.numbers,
                model=self.hashes[turn.player],
            )
            own = "" if turn.player == _SELF else self.hashes[turn.player]
            journal.add([replace(p, samples=tuple(replace(s, model=own) for s in p.samples)) for p in found])
            say(f"{turn.player or 'the model'}: {len(turn.numbers)} prompts, {len(journal.samples)} samples")

    def league(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The table of the trial: ratings, and how often each opponent is drawn."""
        scores: dict[str, list[float | None]] = {player: [] for player in self.places}
        for turn, part in zip(self.trial(), parts, strict=False):
            scores[turn.player] += map(_mean_score, part.prompts)
        games = games_of(scores)
        ratings, rates = elo_ratings(games, k=self.stage.k), win_rates(games, _SELF)
        if missing := [place for place in self.opponents if place not in rates]:
            raise ValueError(
                f"no trial prompt has scores of both the model and {missing[0]!r}: raise trial, or change verifier"
            )
        weights = league_weights(
            [rates[place] for place in self.opponents],
            self.stage.weighting,
            power=self.stage.power,
            floor=self.stage.floor,
        )
        opponents = [
            {"place": place, "model": self.hashes[place], "rating": ratings[place], "win_rate": rates[place]}
            | {"weight": weight}
            for place, weight in zip(self.opponents, weights, strict=True)
        ]
        return {"model": self.hashes[_SELF], "rating": ratings[_SELF], "games": len(games), "opponents": opponents}

    def has_enough(self, trial: Sequence[Part]) -> bool:
        """Whether the trial gave all rows that are wanted; later it is not known before all players' turns."""
        if self.stage.max_rows is None:
            return False
        turns = trial[: len(list(self.trial()))]
        return len(self.stage.make(self.stage.rows[0], self.together(turns))) >= self.stage.max_rows

    def draw(self, league: Mapping[str, Any]) -> list[str]:
        """Draws the opponent of each prompt after the trial."""
        weights = [one["weight"] for one in league["opponents"]]
        later = range(min(self.stage.trial, self.count), self.count)
        return [Random(f"self-play/{self.seed}/{n}").choices(self.opponents, weights)[0] for n in later]

    def together(self, parts: Sequence[Part]) -> list[ScoredPrompt]:
        """Puts the samples of all players under their prompts, the model's first."""
        found: dict[str, ScoredPrompt] = {}
        for scored in (scored for part in parts for scored in part.prompts):
            before = found.setdefault(scored.row_id, replace(scored, samples=()))
            found[scored.row_id] = replace(before, samples=(*before.samples, *scored.samples))
        return list(found.values())

    def _load(self, player: str) -> tuple[Engine, Any]:
        """Loads a player and the prompts as its tokenizer reads them, in place of the one before it."""
        if self._loaded is None or self._loaded[0] != player:
            self._loaded = None
            engine, tokenizer = stage_policy(self.places[player], self.dtype)
            self._loaded = (player, (engine, stage_prompts(self.stage, tokenizer)))
        found: tuple[Engine, Any] = self._loaded[1]
        return found


def _turns(player: str, numbers: Sequence[int]) -> Iterator[_Turn]:
    for start in range(0, len(numbers), PROMPTS_AT_ONCE):
        yield _Turn(player, list(numbers[start : start + PROMPTS_AT_ONCE]))


def _mean_score(scored: ScoredPrompt) -> float | None:
    scores = [sample.score for sample in scored.samples if sample.score is not None]
    return fmean(scores) if scores else None
