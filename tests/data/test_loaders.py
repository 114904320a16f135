"""Loaders: every row once an epoch, in an order that depends on seed and epoch alone, from wherever they continue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.loaders import by_prompt, epoch_order
from rlhf_lightning.datamodules import BatchLoader, ExampleLoader, StreamLoader, open_source
from rlhf_lightning.sequences.example import Example, Segment

Make = Callable[..., BatchLoader]


def example(row_id: str) -> Example:
    return Example(row_id, Segment(np.array([1])))


def in_memory(rows: int, batch_size: int, *, shuffle: bool = True, **settings: Any) -> ExampleLoader:
    examples = [example(f"rows:{i}") for i in range(rows)]
    return ExampleLoader(examples, batch_size, shuffle=shuffle, fingerprint=str(rows), **settings)


def streamed(rows: int, batch_size: int, *, shuffle: bool = True, **settings: Any) -> StreamLoader:
    source = open_source([{"text": str(i)} for i in range(rows)])
    buffer = settings.pop("shuffle_buffer", 3) if shuffle else 0
    return StreamLoader(source, lambda row_id, _: [example(row_id)], batch_size, shuffle_buffer=buffer, **settings)


def names(batch: Any) -> list[str]:
    return [item.row_id.rpartition(":")[2] for item in batch]


def flat(batches: list[list[str]]) -> list[str]:
    return [name for batch in batches for name in batch]


def consume(loader: BatchLoader, batches: int | None = None) -> list[list[str]]:
    """Takes a number of batches, marking each; all of an epoch if not told."""
    seen: list[list[str]] = []
    for batch in loader:
        seen.append(names(batch))
        batch.mark_consumed()
        if len(seen) == batches:
            break
    return seen


KINDS = pytest.mark.parametrize("make", [in_memory, streamed])


@KINDS
def test_rows_in_order_over_ranks_with_an_uneven_end(make: Make) -> None:
    first = make(5, 3, shuffle=False, world_size=2, rank=0)
    second = make(5, 3, shuffle=False, world_size=2, rank=1)
    start = 0 if make is in_memory else 1
    rows = [str(start + i) for i in range(5)]
    assert consume(first) == [[rows[0], rows[2]], [rows[3]]]
    assert consume(second) == [[rows[1]], [rows[4]]]
    assert len(first) == len(second) == 2


@KINDS
def test_a_rank_without_a_row_gets_an_empty_batch(make: Make) -> None:
    shares = [consume(make(4, 3, shuffle=False, world_size=3, rank=rank)) for rank in range(3)]
    assert [[len(batch) for batch in share] for share in shares] == [[1, 1], [1, 0], [1, 0]]


@KINDS
def test_the_last_smaller_batch_can_be_dropped(make: Make) -> None:
    loader = make(7, 3, drop_last=True)
    assert len(loader) == 2
    assert [len(batch) for batch in consume(loader)] == [3, 3]
    assert loader.epoch == 1
    assert [len(batch) for batch in consume(make(6, 3, drop_last=True))] == [3, 3]


@KINDS
def test_a_limit_ends_the_epoch(make: Make) -> None:
    whole, cut = make(7, 2), make(7, 2, limit=2)
    epochs = [consume(whole), consume(whole)]
    assert [consume(cut), consume(cut)] == [epoch[:2] for epoch in epochs]
    assert cut.state_dict()["epoch"] == 2
    assert len(cut) == 4, "Lightning takes its limit off the length itself"


def test_the_order_is_the_seeded_permutation_of_numpy() -> None:
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2]))).permutation(9)
    assert epoch_order(9, seed=7, epoch=2).tolist() == expected.tolist()
    loader = in_memory(9, 4, seed=7)
    assert [flat(consume(loader)) for _ in range(3)][2] == [str(i) for i in expected]


def test_the_shuffle_buffer_draws_as_a_plain_loop_does() -> None:
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, 0])))
    buffer, rest, expected = [1, 2, 3], list(range(4, 11)), []
    for row in rest:
        place = draw.integers(3)
        expected.append(buffer[place])
        buffer[place] = row
    expected += [buffer[place] for place in draw.permutation(3)]
    assert flat(consume(streamed(10, 4, seed=5))) == [str(row) for row in expected]


@KINDS
def test_seeds_and_epochs_have_orders_of_their_own(make: Make) -> None:
    loader = make(20, 4, seed=0, **({} if make is in_memory else {"shuffle_buffer": 10}))
    orders = [flat(consume(loader)) for _ in range(3)]
    orders.append(flat(consume(make(20, 4, seed=1))))
    assert len({tuple(order) for order in orders}) == 4


@KINDS
@given(data=st.data())
def test_no_row_is_lost_or_repeated(make: Make, data: st.DataObject) -> None:
    """Over an epoch that is interrupted anywhere and resumed on any number of ranks, every row is seen exactly once."""
    rows = data.draw(st.integers(1, 17), label="rows")
    batch_size = data.draw(st.integers(1, 7), label="batch size")
    seed = data.draw(st.integers(0, 3), label="seed")
    epoch = data.draw(st.integers(0, 2), label="epochs before")
    batches = -(-rows // batch_size)
    settings = {"seed": seed, "shuffle": data.draw(st.booleans(), label="shuffle")}

    one = make(rows, batch_size, **settings)
    for _ in range(epoch):
        consume(one)
    expected, following = consume(one), consume(one)
    assert [len(batch) for batch in expected] == [min(batch_size, rows - k * batch_size) for k in range(batches)]

    seen: list[list[str]] = [[] for _ in range(batches)]
    state: dict[str, Any] | None = None
    done = 0
    while done < batches:
        world = data.draw(st.integers(1, 4), label="ranks")
        take = data.draw(st.integers(1, batches - done), label="batches before the interruption")
        states = []
        for rank in range(world):
            loader = make(rows, batch_size, rank=rank, world_size=world, **settings)
            if state is None:
                for _ in range(epoch):
                    consume(loader)
            else:
                loader.load_state_dict(state)
            for offset, share in enumerate(consume(loader, take)):
                # Slot s of a global batch belongs to rank s % world.
                for place, name in enumerate(share):
                    assert expected[done + offset][rank + place * world] == name
                seen[done + offset] += share
            states.append(loader.state_dict())
        assert all(other == states[0] for other in states), "ranks agree on the position"
        state, done = states[0], done + take
    assert [sorted(batch) for batch in seen] == [sorted(batch) for batch in expected]
    assert len(set(flat(seen))) == rows == sum(len(batch) for batch in seen)
    assert state is not None
    assert (state["epoch"], state["rows"]) == (epoch + 1, 0)

    loader = make(rows, batch_size, **settings)
    loader.load_state_dict(state)
    assert consume(loader) == following


# The state of a loader counts consumed rows.


@KINDS
def test_marked_batches_count_and_fetched_ones_do_not(make: Make) -> None:
    loader = make(6, 2)
    iterator = iter(loader)
    first = next(iterator)
    assert loader.state_dict()["rows"] == 0
    first.mark_consumed()
    assert loader.state_dict()["rows"] == 2
    second, third = next(iterator), next(iterator)
    assert (loader.epoch, loader.state_dict()["rows"]) == (0, 2), "two batches fetched ahead"
    second.mark_consumed()
    assert loader.state_dict()["rows"] == 4
    third.mark_consumed()
    assert (loader.epoch, loader.state_dict()["rows"]) == (1, 0)
    third.mark_consumed()
    assert (loader.epoch, loader.state_dict()["rows"]) == (1, 0), "once"
    assert list(iterator) == []


@KINDS
def test_without_marks_a_batch_counts_when_the_next_is_asked_for(make: Make) -> None:
    loader = make(6, 2)
    iterator = iter(loader)
    positions = []
    for _ in range(3):
        next(iterator)
        positions.append((loader.epoch, loader.state_dict()["rows"]))
    assert positions == [(0, 0), (0, 2), (1, 0)], "the last one of an epoch has no next"


@KINDS
def test_making_an_iterator_moves_nothing(make: Make) -> None:
    loader = make(6, 2)
    order = consume(make(6, 2))
    consume(loader, 1)
    state = loader.state_dict()
    fresh = make(6, 2)
    thrown_away = iter(fresh)
    kept = iter(fresh)
    fresh.load_state_dict(state)
    assert [names(batch) for batch in kept] == order[1:], "a position loaded after the iterator was made"
    del thrown_away


@KINDS
def test_an_iteration_left_in_the_middle_is_followed_by_the_next_epoch(make: Make) -> None:
    straight = make(6, 2)
    consume(straight)
    second = consume(straight)
    for marks in (True, False):
        loader = make(6, 2)
        batch = next(iter(loader))
        if marks:
            batch.mark_consumed()
        assert [names(batch) for batch in loader] == second


@KINDS
def test_late_marks_of_an_earlier_iteration_move_nothing(make: Make) -> None:
    loader = make(6, 2)
    stale = next(iter(loader))
    next(iter(loader))
    stale.mark_consumed()
    assert (loader.epoch, loader.state_dict()["rows"]) == (1, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (in_memory(7, 2), "the number of rows was 6 in the checkpoint and is 7 now"),
        (in_memory(6, 3), "global_batch_size was 2 in the checkpoint and is 3 now"),
        (in_memory(6, 2, seed=1), "seed was 0 in the checkpoint and is 1 now"),
        (in_memory(6, 2, shuffle=False), "shuffle was True in the checkpoint and is False now"),
        (streamed(6, 2), "the rows' fingerprint was '6' in the checkpoint and is"),
    ],
)
def test_a_position_in_other_data_is_refused(changed: BatchLoader, message: str) -> None:
    state = in_memory(6, 2).state_dict()
    with pytest.raises(ValueError, match=message):
        changed.load_state_dict(state)


def test_a_stream_of_changed_rows_is_refused() -> None:
    state = streamed(6, 2).state_dict()
    other = StreamLoader(open_source([{"text": str(i + 1)} for i in range(6)]), lambda *_: [], 2, shuffle_buffer=3)
    with pytest.raises(ValueError, match="the rows' fingerprint was"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle_buffer was 3 in the checkpoint and is 4 now"):
        streamed(6, 2, shuffle_buffer=4).load_state_dict(state)


# Streams.


def test_a_stream_tokenises_its_own_rows_alone_and_none_twice() -> None:
    made: list[str] = []

    def make(row_id: str, _: Any) -> list[Example]:
        made.append(row_id)
        return [example(row_id)]

    source = open_source([{"text": str(i)} for i in range(12)])
    loader = StreamLoader(source, make, 4, shuffle_buffer=5, rank=1, world_size=2)
    seen = consume(loader, 2)
    assert [name.rpartition(":")[2] for name in made] == flat(seen)
    assert len(made) == 4
    state = loader.state_dict()
    made.clear()
    resumed = StreamLoader(source, make, 4, shuffle_buffer=5, rank=1, world_size=2)
    resumed.load_state_dict(state)
    rest = consume(resumed)
    assert [name.rpartition(":")[2] for name in made] == flat(rest)
    assert len(made) == 2, "rows that were passed over are read, not tokenised"


def test_a_row_without_an_example_leaves_its_place_empty() -> None:
    source = open_source([{"text": str(i)} for i in range(6)])

    def make(row_id: str, row: Any) -> list[Example]:
        return [] if row["text"] in ("0", "3") else [example(row_id)]

    shares = [consume(StreamLoader(source, make, 3, rank=rank, world_size=2)) for rank in range(2)]
    assert shares == [[["3"], ["6"]], [["2"], ["5"]]]


def test_a_stream_of_unknown_length_has_none() -> None:
    loader = streamed(5, 2)
    loader.source._num_rows = None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="the number of rows of its source is unknown"):
        len(loader)
    assert [len(batch) for batch in loader] == [2, 2, 1]


@KINDS
def test_a_batch_can_be_changed_as_a_whole_before_it_is_shared(make: Make) -> None:
    """Each example is named after its neighbour in the global batch, wherever that one goes."""

    def neighbours(batch: list[Example]) -> list[Example]:
        return [example(f"rows:{batch[i - 1].row_id.rpartition(':')[2]}") for i in range(len(batch))]

    alone = consume(make(5, 3, couple=neighbours))
    shares = [consume(make(5, 3, couple=neighbours, rank=rank, world_size=2)) for rank in range(2)]
    plain = consume(make(5, 3))
    assert alone == [[batch[-1], *batch[:-1]] for batch in plain]
    assert shares == [[batch[rank::2] for batch in alone] for rank in range(2)]


def of_prompts(prompts: list[int], batch_size: int, **settings: Any) -> ExampleLoader:
    examples = [Example(f"rows:{row}", Segment(np.array([1 + prompt]))) for row, prompt in enumerate(prompts)]
    return ExampleLoader(examples, batch_size, group_by_prompt=True, **settings)


@given(prompts=st.lists(st.integers(0, 4), min_size=1, max_size=12), seed=st.integers(0, 3), epoch=st.integers(0, 2))
def test_rows_of_a_prompt_follow_the_first_of_them(prompts: list[int], seed: int, epoch: int) -> None:
    order = epoch_order(len(prompts), seed, epoch).tolist()
    expected: list[int] = []
    for row in order:
        if row not in expected:
            expected += [other for other in order if prompts[other] == prompts[row]]
    assert by_prompt(np.array(order), np.array(prompts)).tolist() == expected


@given(
    prompts=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 3),
    start=st.integers(0, 3),
)
def test_batches_of_grouped_rows(prompts: list[int], batch_size: int, world_size: int, start: int) -> None:
    """Global batches are the same on any number of ranks, before and after a resume; ranks get runs of them."""
    alone = consume(of_prompts(prompts, batch_size))
    assert sorted(flat(alone), key=int) == [str(row) for row in range(len(prompts))]
    start = min(start, len(alone) - 1)
    shares = []
    for rank in range(world_size):
        before = of_prompts(prompts, batch_size, rank=rank, world_size=world_size)
        shares.append(consume(before, start) if start else [])
        resumed = of_prompts(prompts, batch_size, rank=rank, world_size=world_size)
        resumed.load_state_dict(before.state_dict())
        shares[-1] += consume(resumed)
    assert [flat([share[n] for share in shares]) for n in range(len(alone))] == alone
    for n, batch in enumerate(alone):
        sizes = [len(share[n]) for share in shares]
        assert sum(sizes) == len(batch)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank=2 of world_size=2, expected 0 <= rank < world_size"),
        ({"batch_size": 1, "limit": 0}, "limit=0, expected at least 1, or None for all"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleLoader([], **settings)
