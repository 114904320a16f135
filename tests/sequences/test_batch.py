"""Packing: geometry against its definition, scored tokens against a naive walk over every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.sequences import Example, Segment, pack
from tests.helpers import dense_mask


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> Segment:
    tokens = draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    weights = draw(
        st.one_of(st.none(), st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(tokens), max_size=len(tokens)))
    )
    children = draw(st.lists(trees(depth - 1), max_size=3)) if depth else []
    return Segment(tokens, weights, tuple(children))


def rooted(tree: Segment) -> Segment:
    """A tree whose first token is not scored."""
    if tree.weights is None:
        return tree
    return Segment(tree.tokens, np.concatenate([[0.0], tree.weights[1:]]), tree.children)


forests = st.lists(trees().map(rooted), min_size=1, max_size=3)


def examples_of(forest: list[Segment]) -> list[Example]:
    return [Example(f"rows:{n}", tree) for n, tree in enumerate(forest)]


@given(forests, st.booleans())
def test_visibility_is_ancestry(forest: list[Segment], share_prefix: bool) -> None:
    batch = pack(examples_of(forest), share_prefix=share_prefix)
    # The oracle: a token sees another when some path holds both, the other not after it.
    expected = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for path in batch.path_index.split(batch.lengths.tolist()):
        for place, token in enumerate(path):
            expected[token, path[: place + 1]] = True
    assert torch.equal(dense_mask(batch.geometry), expected)
    blocks = batch.geometry.blocks
    for block in blocks:
        visible = torch.zeros_like(expected)
        for row in range(len(block.query_index)):
            mask = block.mask(None)[row, 0]
            for q, query in enumerate(block.query_index[row]):
                if block.query_depth[row, q] < 1 << 40:
                    visible[query, block.key_index[row][mask[q]]] = True
                    assert torch.equal(visible[query], expected[query])
    assert torch.equal(torch.cat([b.query_index.reshape(-1) for b in blocks]), batch.geometry.query_index)
    assert torch.equal(torch.cat([b.key_index.reshape(-1) for b in blocks]), batch.geometry.key_index)
    assert torch.equal(batch.geometry.query_index[batch.geometry.slot], torch.arange(batch.num_tokens))
    depths = torch.cat([b.query_depth.reshape(-1) for b in blocks])
    assert torch.equal(depths[batch.geometry.slot], batch.geometry.depth)


@given(forests, st.booleans())
def test_scored_tokens(forest: list[Segment], share_prefix: bool) -> None:
    batch = pack(examples_of(forest), share_prefix=share_prefix)
    expected = []
    sequence = 0
    for number, tree in enumerate(forest):
        for path in tree.paths():
            tokens = np.concatenate([s.tokens for s in path])
            weights = np.concatenate([np.zeros(len(s.tokens)) if s.weights is None else s.weights for s in path])
            for place in range(1, len(tokens)):
                if weights[place]:
                    expected.append((sequence, number, place - 1, tokens[place - 1], tokens[place], weights[place]))
            sequence += 1
    found = [
        (s, batch.example_index[s], d, batch.input_ids[i], t, w)
        for s, d, i, t, w in zip(
            batch.sequence_index, batch.source_depth, batch.source_index, batch.target_ids, batch.weights, strict=True
        )
    ]
    assert [tuple(float(x) for x in row) for row in found] == [tuple(float(x) for x in row) for row in expected]


@given(forests, st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_padded_rows_are_the_paths(forest: list[Segment], side: str, extra: int) -> None:
    batch = pack(examples_of(forest))
    padded = batch.padded(side=side, extra=extra, pad_token_id=99)  # type: ignore[arg-type]
    paths = [np.concatenate([s.tokens for s in path]).tolist() for tree in forest for path in tree.paths()]
    width = max(map(len, paths)) + extra
    assert padded.input_ids.shape == (len(paths), width)
    for row, path in enumerate(paths):
        pad = [99] * (width - len(path))
        assert padded.input_ids[row].tolist() == (path + pad if side == "right" else pad + path)
        assert padded.attention_mask[row].sum() == len(path)
        assert padded.position_ids[row][padded.attention_mask[row] == 1].tolist() == list(range(len(path)))


def test_sums_per_sequence_and_example() -> None:
    tree = Segment([1, 2], children=(Segment([3, 4], [1, 1]), Segment([5], [1])))
    batch = pack([Example("rows:0", tree), Example("rows:1", Segment([6, 7], [0, 1]))])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert batch.sum_per_sequence(values).tolist() == [3.0, 4.0, 8.0]
    assert batch.sum_per_example(values).tolist() == [7.0, 8.0]
    assert batch.last_index.tolist() == [3, 4, 6]
    assert batch.lengths.tolist() == [4, 3, 2]


def test_a_scored_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="first token of a tree has weight above 0"):
        pack([Example("rows:0", Segment([1, 2], [1, 1]))])


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="empty list"):
        pack([])


def test_a_segment_checks_its_shape() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        Segment([])
    with pytest.raises(ValueError, match="2 tokens but 1 weights"):
        Segment([1, 2], [1])


def test_content_hash_sees_tokens_weights_and_shape() -> None:
    def digest(root: Segment) -> str:
        return Example("any", root).content_hash()

    one = Segment([1, 2], children=(Segment([3], [1]),))
    assert digest(one) == digest(Segment([1, 2], children=(Segment([3], [1]),)))
    others = [
        Segment([1, 2], children=(Segment([4], [1]),)),
        Segment([1, 2], children=(Segment([3]),)),
        Segment([1], children=(Segment([2, 3], [0, 1]),)),
        Segment([1, 2, 3], [0, 0, 1]),
    ]
    assert len({digest(one), *map(digest, others)}) == 5


def test_rows_of_one_prompt_are_laid_out_once() -> None:
    best, middle, worst = (Segment([n], [1]) for n in (7, 8, 9))
    pairs = [(best, middle), (best, worst), (middle, worst)]
    rows = [Example(f"rows:{n}", Segment([1, 2, 3], children=pair)) for n, pair in enumerate(pairs)]
    other = Example("rows:3", Segment([1, 2], children=(Segment([3, 7], [0, 1]),)))
    batch = pack([*rows[:2], other, rows[2]])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8, 9, 1, 2, 3, 7]
    assert batch.last_index.tolist() == [3, 4, 3, 5, 9, 4, 5]
    assert batch.example_index.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert batch.source_index.tolist() == [2, 2, 2, 2, 8, 2, 2]
    assert batch.target_ids.tolist() == [7, 8, 7, 9, 7, 8, 9]
    assert batch.distinct is not None
    chosen, which = batch.distinct
    assert sorted(zip(batch.source_index[chosen].tolist(), batch.target_ids[chosen].tolist(), strict=True)) == [
        (2, 7),
        (2, 8),
        (2, 9),
        (8, 7),
    ]
    for values in (batch.source_index, batch.target_ids):
        assert torch.equal(values[chosen][which], values)
    assert pack([other]).distinct is None
    alone = pack(rows, share_prefix=False)
    assert alone.num_tokens == 6 * 4
    assert alone.distinct is None


def test_a_sequence_may_continue_where_another_one_ends() -> None:
    ends, goes_on = Segment([5], [1]), Segment([5], [0], (Segment([6, 7], [1, 1]),))
    batch = pack(
        [Example("rows:0", Segment([4], children=(ends,))), Example("rows:1", Segment([4], children=(goes_on,)))]
    )
    assert batch.input_ids.tolist() == [4, 5, 6, 7]
    assert batch.geometry.segments == [(0, 4, -1)]
    assert (batch.target_ids.tolist(), batch.source_index.tolist()) == ([5, 6, 7], [0, 1, 2])
    assert (batch.lengths.tolist(), batch.last_index.tolist()) == ([2, 4], [1, 3])
