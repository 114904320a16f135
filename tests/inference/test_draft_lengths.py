from __future__ import annotations

import random

import pytest

from rlhf_lightning.inference.draft_lengths import Acceptance, Pace, expected_tokens
from rlhf_lightning.inference.drafts import NgramTable


def measured(pace: Pace, rows: int, plain: float, first: float, each: float, rate: float, rounds: int = 40) -> Pace:
    """Lets a pace see plain steps and rounds of known costs, with drafts that are accepted at a rate."""
    draw = random.Random(0)
    for _ in range(4):
        pace.observe_plain(rows, plain)
    for _ in range(rounds):
        length = draw.randint(1, pace.longest)
        accepted = [next((k for k in range(length) if draw.random() > rate), length) for _ in range(rows)]
        estimates = [pace.new_row() for _ in range(rows)]
        pace.observe_round([length] * rows, accepted, estimates, plain * (first + each * length))
    pace.observe_plain(rows, plain)
    return pace


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_are_those_of_simulated_rounds(rate: float) -> None:
    draw = random.Random(1)
    rounds = [1 + next((k for k in range(4) if draw.random() >= rate), 4) for _ in range(20000)]
    assert expected_tokens(rate, 4) == pytest.approx(sum(rounds) / len(rounds), abs=0.05)


def test_acceptance_is_the_share_of_tried_drafts_and_forgets() -> None:
    acceptance = Acceptance(0.5, weight=4)
    draw = random.Random(2)
    for rate in (0.9, 0.2):
        total = 0.0
        for number in range(400):
            accepted = next((k for k in range(5) if draw.random() > rate), 5)
            acceptance.observe(5, accepted)
            total += acceptance.rate * (number >= 200) / 200
        assert total == pytest.approx(rate, abs=0.08)


def test_a_round_without_a_rejection_tells_nothing_of_rejections() -> None:
    acceptance = Acceptance(0.5, weight=2)
    acceptance.observe(3, 3)
    assert acceptance.rate == (1 + 3) / (2 + 3)
    acceptance.observe(3, 0)
    assert acceptance.rate == pytest.approx((1 + 0.9 * 3) / (2 + 0.9 * 3 + 1))


@pytest.mark.parametrize(("first", "each", "rate"), [(1.1, 0.1, 0.9), (1.1, 0.3, 0.8), (1.2, 0.05, 0.5)])
def test_the_length_is_the_one_with_most_tokens_per_second(first: float, each: float, rate: float) -> None:
    pace = measured(Pace(8, 0.2, free_rows=8), rows=1, plain=0.01, first=first, each=each, rate=rate)
    chosen = pace.choose([rate], [8])[0]
    speeds = {k: expected_tokens(rate, k) / (first + each * k) for k in range(1, 9)}
    assert speeds[chosen] > 0.97 * max(speeds.values())


def test_lengths_keep_to_rooms_and_to_what_may_arrive() -> None:
    pace = measured(Pace(8, 0.1, free_rows=8), rows=4, plain=0.01, first=1.0, each=0.02, rate=0.9)
    lengths = pace.choose([0.95, 0.95, 0.95, 0.3], [8, 2, 0, 8])
    assert lengths[0] > 4
    assert lengths[1:] == [2, 0, 2]  # the fourth of such drafts arrives in less than one of twenty rounds
    assert pace.choose([0.95] * 4, [0] * 4) == [0] * 4


def test_without_a_gain_steps_are_plain_and_trials_take_a_hundredth_of_the_time() -> None:
    pace = Pace(8, 0.2, free_rows=8)
    plain, spent, lost, trials = 0.01, 0.0, 0.0, 0
    for _ in range(5000):
        lengths = pace.choose([pace.new_row().rate] * 8, [8] * 8)
        if not any(lengths):
            pace.observe_plain(8, plain)
            spent += plain
            continue
        # Each column costs as much as a plain step, and nothing is accepted.
        seconds = plain * (1.2 + max(lengths))
        pace.observe_round(lengths, [0] * 8, [pace.new_row() for _ in range(8)], seconds)
        trials += 1
        spent, lost = spent + seconds, lost + seconds - plain
    assert 2 < trials < 60
    assert lost < 0.02 * spent


def test_trials_find_out_when_drafts_become_good() -> None:
    pace = Pace(8, 0.1, free_rows=8)
    speculated = []
    for number in range(6000):
        lengths = pace.choose([pace.new_row().rate], [8])
        speculated.append(any(lengths))
        if not any(lengths):
            pace.observe_plain(1, 0.01)
            continue
        accepted = [0] if number < 1500 else list(lengths)
        pace.observe_round(lengths, accepted, [pace.new_row()], 0.01 * (1.1 + 0.1 * lengths[0]))
    assert sum(speculated[500:1500]) < 50
    assert sum(speculated[5000:]) > 900


@pytest.mark.parametrize(("seconds", "rests"), [(0.029, 16), (0.025, 0)])
def test_calls_rest_where_drafts_gain_too_little(seconds: float, rests: int) -> None:
    """Rounds that give three tokens for 2.9 plain steps, or for 2.5: a tenth is what plain steps lose as well."""
    pace = Pace(4, 0.1, free_rows=8)
    for call in range(3):  # 12 steps each: judged when there are 32
        assert not pace.rests(2)
        for _ in range(2):
            pace.observe_plain(2, 0.01)
        for _ in range(10):
            pace.observe_round([2, 2], [2, 2], [pace.new_row() for _ in range(2)], seconds)
        pace.finish(2)
        assert call == 2 or not pace._resting.get(2, 0)
    assert not pace.rests(1)
    assert not pace.rests(8)
    assert [pace.rests(3) for _ in range(rests + 1)] == [True] * rests + [False]


def test_preparing_is_done_for_a_gain_that_pays_for_it() -> None:
    pace = measured(Pace(8, 0.1, free_rows=8), rows=1, plain=0.01, first=1.0, each=0.05, rate=0.9)
    pace.observe_preparation(tokens=100, seconds=0.05)
    assert pace.choose([0.9], [8], unprepared=1000, ahead=200) != [0]
    assert pace.choose([0.9], [8], unprepared=1000, ahead=20) == [0]


def naive_continuation(tokens: list[int], most: int) -> list[int]:
    for length in (4, 3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if length < len(tokens) and tokens[start : start + length] == tokens[-length:]:
                grown = list(tokens)
                while len(grown) < len(tokens) + most:
                    grown.append(grown[start + length + len(grown) - len(tokens)])
                return grown[len(tokens) :]
    return []


def test_lookups_find_the_latest_place_of_the_longest_n_gram() -> None:
    draw = random.Random(3)
    for alphabet in (2, 3, 6):
        table, tokens = NgramTable(), []
        for _ in range(60):
            new = [draw.randrange(alphabet) for _ in range(draw.randint(1, 3))]
            table.extend(new)
            tokens += new
            assert table.continuation(7) == naive_continuation(tokens, 7)
