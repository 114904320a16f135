"""Examples come back from the store as they went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.example_store import ExampleStore
from rlhf_lightning.sequences.example import Example, Segment


def segments(depth: int) -> st.SearchStrategy[Segment]:
    tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
    children = st.just(()) if depth == 0 else st.lists(segments(depth - 1), max_size=3).map(tuple)
    kinds = [st.none(), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 1.0])]

    @st.composite
    def one(draw: st.DrawFn) -> Segment:
        ids = draw(tokens)
        kind = draw(st.sampled_from(kinds))
        weights = [draw(kind) for _ in ids]
        return Segment(np.array(ids), None if None in weights else np.array(weights), draw(children))

    return one()


def same(one: Segment, other: Segment) -> bool:
    weights = (one.weights is None) == (other.weights is None)
    if one.weights is not None and other.weights is not None:
        weights = one.weights.tolist() == other.weights.tolist() and other.weights.dtype == np.float32
    tokens = one.tokens.tolist() == other.tokens.tolist() and other.tokens.dtype == np.int64
    return (
        tokens and weights and len(one.children) == len(other.children) and all(map(same, one.children, other.children))
    )


@given(st.lists(segments(2), max_size=4))
def test_trees_come_back(roots: list[Segment]) -> None:
    examples = [Example(f"rows:{i}", root, {"label": i}) for i, root in enumerate(roots)]
    store = ExampleStore(examples)
    assert len(store) == len(examples)
    for index, example in enumerate(examples):
        back = store[index]
        assert (back.row_id, back.fields) == (example.row_id, example.fields)
        assert same(example.root, back.root)
        assert back.content_hash() == example.content_hash()
        assert store.num_tokens(index) == example.root.num_tokens
    assert [example.row_id for example in store[1:]] == [example.row_id for example in examples[1:]]


def test_it_is_a_list() -> None:
    store = ExampleStore([Example(f"rows:{i}", Segment(np.array([i]))) for i in range(3)])
    assert store[-1].row_id == "rows:2"
    assert [example.row_id for example in store] == ["rows:0", "rows:1", "rows:2"]
    with pytest.raises(IndexError):
        store[3]


def test_changing_what_comes_out_does_not_change_the_store() -> None:
    store = ExampleStore([Example("rows:1", Segment(np.array([1, 2]), np.array([0.0, 0.5])))])
    root = store[0].root
    root.tokens[:] = 9
    root.weights[:] = 9
    assert (store[0].root.tokens.tolist(), store[0].root.weights.tolist()) == ([1, 2], [0.0, 0.5])


def example(row_id: str = "rows:1", tokens: tuple[int, ...] = (1, 2), weight: float = 1.0, label: int = 0) -> Example:
    child = Segment(np.array([3]), np.array([weight]))
    return Example(row_id, Segment(np.array(tokens), None, (child,)), {"label": label})


def test_the_fingerprint_is_that_of_what_a_loss_sees() -> None:
    def of(*examples: Example) -> str:
        return ExampleStore(examples).fingerprint()

    plain = of(example())
    assert of(example("moved/rows:1")) == plain, "it does not depend on the file's name"
    others = [of(example(tokens=(1, 3))), of(example(weight=0.0)), of(example(weight=0.5)), of(example(label=1))]
    others += [of(example(), example()), of(example(tokens=(1,))), of()]
    assert len({plain, *others}) == 8


def test_a_pair_of_a_thousand_tokens_takes_about_five_bytes_a_token() -> None:
    children = tuple(Segment(np.arange(250), np.ones(250)) for _ in range(2))
    store = ExampleStore([Example(f"rows:{i}", Segment(np.arange(500), None, children)) for i in range(8)])
    size = sum(part.itemsize * len(part) for part in vars(store).values() if hasattr(part, "itemsize"))
    assert 4.4 <= size / 8000 <= 5.0
