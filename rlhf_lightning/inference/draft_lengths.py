"""Decides how many tokens to draft, and whether to draft at all, from what is measured while a model generates.

Drafts change the time that a sample takes and never the sample, so that the clock may decide. With acceptance rate
``a``, a round of ``k`` drafts yields ``(1 - a**(k+1)) / (1 - a)`` tokens (Leviathan et al. 2023, arXiv 2211.17192). Its
cost is measured in plain steps of the same number of rows and taken as linear in ``k``.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Weight of what was observed before, at each new round.
_MEMORY = 0.9
# Drafts that arrive more rarely than this are not made.
_RARE = 0.05
# Share of the time that may be lost on rounds without an expected gain.
_SHARE_FOR_TRIALS = 0.01
# Plain steps that a few trials may cost together.
_TRIALS = 4
# Rounds after which one plain step is measured again.
_REMEASURE = 32
# Rows that can take several tokens cost up to a tenth more in plain steps, too: drafts have to gain more than that.
_WORTH = 1.1
# Weight, in that, of what was spent before, at each new step.
_RECENT = 0.95
# Steps after which it is judged, and calls that are made without drafts where they are not.
_JUDGED, _CALLS_TO_REST = 32, 16


def expected_tokens(rate: float, length: int) -> float:
    """Tokens of a round with ``length`` drafts that are accepted at ``rate`` each, the target's own token included.

    Example:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4)
        (1.75, 5.0)
    """
    return length + 1.0 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)


class Acceptance:
    """Estimates how often a draft is accepted, given that those before it were; recent rounds count more.

    Args:
        rate: the estimate before anything was observed, in (0, 1).
        weight: drafts that this estimate counts as.

    Example:
        >>> acceptance = Acceptance(0.5, weight=2)
        >>> acceptance.observe(drafted=4, accepted=1)  # the first accepted, the second rejected, the rest unknown
        >>> acceptance.rate
        0.5
    """

    def __init__(self, rate: float, weight: float) -> None:
        self._prior = rate * weight, weight
        self._accepted = 0.0
        self._trials = 0.0

    @property
    def rate(self) -> float:
        """The estimate."""
        return (self._prior[0] + self._accepted) / (self._prior[1] + self._trials)

    def observe(self, drafted: int, accepted: int) -> None:
        """Takes a round in: drafts after the first rejected one were not tried."""
        self._accepted = _MEMORY * self._accepted + accepted
        self._trials = _MEMORY * self._trials + accepted + (accepted < drafted)


class _Costs:
    """Seconds that steps of one number of rows take.

    Args:
        first: cost of a round without its drafts, in plain steps, before it was measured.
        each: cost of one more draft.
    """

    def __init__(self, first: float, each: float) -> None:
        self._prior = first, each
        self._plain: deque[float] = deque(maxlen=7)
        self._sums = [0.0] * 5  # of 1, k, k * k, cost, k * cost
        self._yield = [1.0, 1.0]  # tokens that came, and that were expected
        self.rounds_since_plain = 0

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step; the first of all may have taken longer than others will."""
        return statistics.median_low(self._plain) if len(self._plain) > 1 else None

    def observe_plain(self, seconds: float) -> None:
        self._plain.append(seconds)
        self.rounds_since_plain = 0

    def observe_round(self, length: int, cost: float, tokens: float, expected: float) -> None:
        # One interruption of the machine must not decide.
        cost = min(cost, 2 * self.cost(length))
        new = (1.0, length, length * length, cost, length * cost)
        self._sums = [_MEMORY * old + one for old, one in zip(self._sums, new, strict=True)]
        self._yield = [_MEMORY * self._yield[0] + tokens, _MEMORY * self._yield[1] + expected]
        self.rounds_since_plain += 1

    @property
    def reliability(self) -> float:
        """Tokens that came, for each that was expected: rates vary within a text, and rounds measure them unevenly."""
        return self._yield[0] / self._yield[1]

    def cost(self, length: int) -> float:
        """Plain steps that a round takes: least squares, drawn to the prior as by rounds with no and with 2 drafts."""
        ones, lengths, squares, costs, products = self._sums
        first, each = self._prior
        ones, lengths, squares = ones + 2, lengths + 2, squares + 4
        costs, products = costs + first + (first + 2 * each), products + 2 * (first + 2 * each)
        slope = (ones * products - lengths * costs) / (ones * squares - lengths * lengths)
        slope = max(slope, 0.0)
        return max((costs - slope * lengths) / ones + slope * length, 0.1)


@dataclass
class _Trial:
    """Seconds of the latest steps, and what plain steps would have taken for their tokens."""

    spent: float = 0.0
    worth: float = 0.0
    steps: int = 0

    def add(self, spent: float, worth: float) -> None:
        self.spent = _RECENT * self.spent + spent
        self.worth = _RECENT * self.worth + worth
        self.steps += 1


class Pace:
    """Chooses the draft lengths of every round, from costs and acceptance rates that are measured.

    Where no gain is expected, decoding is plain; now and then a round is tried all the same, within one hundredth of
    the time. Where a call gained little, the next ones are made as without speculation, all but one in 17. Numbers of
    rows from one power of two to the next are measured together.

    Args:
        longest: most drafts of a round.
        draft_cost: what drafting one token costs, in plain steps of the model, before it was measured.
        free_rows: rows whose tokens cost little more than those of one, because weights have to be read anyway.
        rate: acceptance rate before it was measured.
    """

    def __init__(self, longest: int, draft_cost: float, free_rows: int, rate: float = 0.7) -> None:
        self.longest = longest
        self._draft_cost, self._free_rows = draft_cost, free_rows
        self._overall = Acceptance(rate, weight=10)
        self._costs: dict[int, _Costs] = {}
        self._credit = 0.0
        self._preparing: float | None = None  # seconds per token
        self._trial = _Trial()
        self._resting: dict[int, int] = {}  # calls to come, by the bucket of their rows

    def new_row(self) -> Acceptance:
        """An estimate for one more row, which begins with that of all rows."""
        return Acceptance(min(max(self._overall.rate, 0.01), 0.99), weight=4)

    def rests(self, rows: int) -> bool:
        """Whether a call that begins with so many rows is made without drafts, as they gained too little; counts it."""
        left = self._resting.get(rows.bit_length(), 0)
        self._resting[rows.bit_length()] = max(0, left - 1)
        return left > 0

    def finish(self, rows: int) -> None:
        """Ends a call that began with so many rows: after enough steps, judges whether the next ones rest."""
        if self._trial.steps >= _JUDGED:
            pays = self._trial.worth > _WORTH * self._trial.spent
            self._resting[rows.bit_length()] = 0 if pays else _CALLS_TO_REST
            self._trial = _Trial()

    def choose(self, rates: Sequence[float], rooms: Sequence[int], unprepared: int = 0, ahead: int = 1) -> list[int]:
        """Chooses how many tokens each row drafts.

        Args:
            rates: acceptance rate of each row.
            rooms: most tokens that each row can draft.
            unprepared: tokens that have to be computed before anything can be drafted.
            ahead: steps that the gain of these tokens is spread over.

        Returns:
            The lengths; all are 0 for a plain step.
        """
        nothing = [0] * len(rates)
        costs = self._at(len(rates))
        plain = costs.plain
        if plain is None or costs.rounds_since_plain >= _REMEASURE or not any(rooms):
            return nothing

        # One width for all rows, as they share a forward; a row stays below it where its drafts would rarely arrive.
        best, best_gain = 0, 0.0
        reach = [min(room, _reach(rate)) for rate, room in zip(rates, rooms, strict=True)]
        for width in range(1, min(self.longest, max(reach)) + 1):
            tokens = sum(expected_tokens(rate, min(width, most)) for rate, most in zip(rates, reach, strict=True))
            gain = costs.reliability * tokens / len(rates) / costs.cost(width)
            best, best_gain = (width, gain) if gain > best_gain else (best, best_gain)
        lengths = [min(best, most) for most in reach]

        # Seconds gained over the steps to come, without what preparing takes.
        seconds = plain * costs.cost(best)
        preparing = unprepared * self._seconds_per_token(plain, len(rates))
        if plain * ahead * (1 - 1 / best_gain) > preparing:
            return lengths
        lost = preparing + max(0.0, seconds * (1 - best_gain))
        return lengths if self._credit >= lost else nothing

    def observe_plain(self, rows: int, seconds: float) -> None:
        """Takes in the seconds of a plain step."""
        costs = self._at(rows)
        first = costs.plain is None
        costs.observe_plain(seconds)
        if first and costs.plain is not None:
            # The cost of drafts was a guess: a few trials measure it at once.
            self._credit += _TRIALS * costs.plain
        self._trial.add(seconds, seconds)
        # Kept below what a few trials cost, so that they do not come in a burst.
        self._credit = min(self._credit + _SHARE_FOR_TRIALS * seconds, _TRIALS * (costs.plain or seconds))

    def observe_preparation(self, tokens: int, seconds: float) -> None:
        """Takes in the seconds that preparing to draft took."""
        if tokens:
            self._preparing = seconds / tokens
            self._trial.spent += seconds
            self._credit -= max(0.0, min(seconds, self._credit))

    def observe_round(
        self, lengths: Sequence[int], accepted: Sequence[int], rows: Sequence[Acceptance], seconds: float
    ) -> None:
        """Takes a round in.

        Args:
            lengths: drafts of each row.
            accepted: how many of them were accepted.
            rows: the rows' estimates, which are updated.
            seconds: what the round took.
        """
        costs = self._at(len(lengths))
        plain = costs.plain or seconds
        expected = sum(expected_tokens(row.rate, length) for row, length in zip(rows, lengths, strict=True))
        tokens = sum(accepted) + len(accepted)
        costs.observe_round(max(lengths), seconds / plain, tokens / len(lengths), expected / len(lengths))
        # A round that lost time is paid for by the share of trials.
        worth = plain * tokens / len(lengths)
        self._trial.add(seconds, worth)
        lost = seconds - worth
        self._credit = max(self._credit - max(lost, 0.0), -_TRIALS * plain)
        for row, length, count in zip(rows, lengths, accepted, strict=True):
            if length:
                row.observe(length, count)
        drafting = [(length, count) for length, count in zip(lengths, accepted, strict=True) if length]
        for length, count in drafting:
            self._overall.observe(length, count)

    def _at(self, rows: int) -> _Costs:
        bucket = rows.bit_length()
        if bucket not in self._costs:
            # Each column of tokens costs as much as a plain step once the device is busy.
            each = rows / (rows + self._free_rows) + self._draft_cost
            self._costs[bucket] = _Costs(1.05, each)
        return self._costs[bucket]

    def _seconds_per_token(self, plain: float, rows: int) -> float:
        if self._preparing is not None:
            return self._preparing
        return self._draft_cost * plain / max(rows, self._free_rows)


def _reach(rate: float) -> int:
    """Longest draft whose last token is accepted often enough, at least one token."""
    return 1 if rate <= _RARE else int(min(math.log(_RARE) / math.log(min(rate, 0.999)), 1000))
