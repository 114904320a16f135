"""Contexts with slots: their division into segments, and what each token of a packed forest sees of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_lightning.sequences import (
    AttentionKernel,
    Example,
    Segment,
    SequenceBatch,
    SummaryLayout,
    pack,
    plan_micro_batches,
    tree_attention,
)

LAYOUTS = [
    SummaryLayout(ratio=2, segment_length=4),
    SummaryLayout(ratio=3, segment_length=6, placement="end"),
    SummaryLayout(ratio=2, segment_length=4, recurrence="replace"),
    SummaryLayout(ratio=4, segment_length=4, recurrence="replace", placement="end"),
    SummaryLayout(ratio=2, segment_length=4, condense_every=1),
    SummaryLayout(ratio=2, segment_length=4, condense_every=2, reads_query=True),
]


def forest(layout: SummaryLayout, share_prefix: bool = True) -> SequenceBatch:
    """Contexts of one, two and three segments; one is shared, one has two prompts, and one row has none."""

    def asked(first: int) -> Segment:
        return Segment([first, 41], children=(Segment([42, 43, 44], [1, 1, 1]), Segment([45], [1])))

    long = list(range(3, 14))
    rows = [
        layout.tree(long, [asked(30)], [30, 41]),
        layout.tree(long, [asked(31), asked(32)], [31, 41]),
        layout.tree([5, 6, 7], [asked(30)], [30, 41]),
        Segment([8, 9], children=(Segment([7], [1]),)),
        layout.tree(list(range(20, 28)), [asked(33)], [33, 41]),
    ]
    return pack([Example(f"rows:{n}", root) for n, root in enumerate(rows)], share_prefix=share_prefix)


def naive_visibility(batch: SequenceBatch) -> Tensor:
    """Walks every path of every example, segment by segment, and notes what a token of it sees."""
    visible = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    flat_paths = iter(batch.path_index.split(batch.lengths.tolist()))
    for example in batch.examples:
        for path in example.root.paths():
            flat, seen = next(flat_paths).tolist(), []
            for segment in path:
                own = [flat.pop(0) for _ in segment.tokens]
                for n, token in enumerate(own):
                    visible[token, [*seen, *own[: n + 1]]] = True
                slots = [] if segment.slots is None else [t for t, s in zip(own, segment.slots, strict=True) if s >= 0]
                kept = seen[: len(seen) - segment.hides]
                seen = {"all": seen + own, "slots": kept + slots, "only slots": slots}[segment.shows]
    return visible


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 4, "segment_length": 6}, "ratio 4 does not divide segment_length 6: use segment_length 8"),
        ({"ratio": 0}, "ratio is 0; it must be a whole number of at least 1"),
        ({"segment_length": 2.0}, "segment_length is 2.0; it must be a whole number"),
        ({"recurrence": "acumulate"}, "did you mean 'accumulate'?"),
        ({"placement": "start"}, "placement is 'start'; it must be one of interleaved, end"),
        ({"condense_every": 1.5}, "condense_every is 1.5; it must be a whole number"),
        ({"condense_every": 2, "recurrence": "replace"}, "condense_every is 2 with recurrence 'replace', which keeps"),
        ({"ratio": 4, "segment_length": 4, "condense_every": 2}, "does not divide the 2 summaries of 2 segments: use "),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        SummaryLayout(**options)


def test_every_ratio_tokens_have_a_slot() -> None:
    for length in range(1, 40):
        for ratio, placement in ((1, "end"), (2, "interleaved"), (4, "end"), (8, "interleaved")):
            layout = SummaryLayout(ratio=ratio, segment_length=16, placement=placement)  # type: ignore[arg-type]
            segments = layout.segments(range(100, 100 + length))
            found = [token for tokens, slots, _ in segments for token in tokens[slots < 0]]
            assert found == [*range(100, 100 + length)]
            count = sum(int((slots >= 0).sum()) for _, slots, _ in segments)
            assert count == layout.size(length) == -(-length // ratio)
            last = SummaryLayout(ratio=ratio, segment_length=16, recurrence="replace").size(length)
            assert last == int((segments[-1].slots >= 0).sum())
            assert all(len(tokens) == 16 + 16 // ratio for tokens, _, _ in segments[:-1])
            for _, slots, _ in segments:
                assert slots[slots >= 0].tolist() == [*range((slots >= 0).sum())]
                if placement == "end":
                    assert (slots[: (slots < 0).sum()] < 0).all()
                elif len(slots) > ratio:
                    assert slots[ratio] == 0


def test_summaries_are_compressed_again() -> None:
    """Contexts of 0 to 40 tokens in segments of 4: of two whole ones, two entries of four stay."""
    layout = SummaryLayout(ratio=2, segment_length=4, condense_every=2)
    for length in range(1, 41):
        seen: list[tuple[int, int]] = []  # (segment, slot)
        whole = 0
        for number in range(-(-length // 4)):
            size = min(4, length - 4 * number)
            seen += [(number, slot) for slot in range(-(-size // 2))]
            whole += size == 4
            if size == 4 and whole % 2 == 0:
                assert [segment for segment, _ in seen[-4:]] == [number - 1, number - 1, number, number]
                seen[-4:] = [(-number, 2), (-number, 3)]
        assert layout.size(length) == len(seen)
        segments = layout.segments(range(100, 100 + length))
        assert sum(int((slots >= 0).sum()) - hides for _, slots, hides in segments) == len(seen)
    tokens, slots, hides = layout.segments(range(100, 108))[-1]
    assert (tokens.tolist(), slots.tolist(), hides) == ([0, 0], [2, 3], 4)


def test_segments_begin_with_the_prompt() -> None:
    layout = SummaryLayout(ratio=2, segment_length=4, reads_query=True)
    first, last = layout.segments([5, 6, 7, 8, 9], [30, 31])
    assert first.tokens.tolist() == [30, 31, 5, 6, 0, 7, 8, 0]
    assert first.slots.tolist() == [-2, -2, -1, -1, 0, -1, -1, 1]
    assert (last.tokens.tolist(), last.slots.tolist()) == ([30, 31, 9, 0], [-2, -2, -1, 0])
    # A slot stands for the context's tokens alone.
    assert [places.tolist() for places in layout.stands_for(first.slots)] == [[2, 3, 5, 6], [4, 4, 7, 7]]
    # Rows of one context with other prompts are computed apart.
    prompt = Segment([30], children=(Segment([7], [1]),))
    rows = [Example(f"rows:{n}", layout.tree([5, 6, 7], [prompt], [30 + n // 2])) for n in range(4)]
    assert pack(rows).num_tokens == 2 * (1 + 3 + 2 + 2)


def test_positions_are_those_of_the_whole_context() -> None:
    batch = forest(LAYOUTS[0])
    assert batch.slots is not None
    assert batch.encoded is not None
    for path in batch.path_index.split(batch.lengths.tolist()):
        positions, slots = batch.position_ids[path].tolist(), batch.slots[path].tolist()
        tokens = [position for position, slot in zip(positions, slots, strict=True) if slot < 0]
        assert tokens == [*range(len(tokens))]
        # A slot has the position of the token before it.
        assert all(positions[n] == positions[n - 1] for n, slot in enumerate(slots) if slot >= 0)
    of_prompts = torch.isin(batch.input_ids, torch.tensor([30, 31, 32, 33, 41, 42, 43, 44, 45]))
    assert not batch.encoded[of_prompts].any()
    assert batch.encoded[batch.slots >= 0].all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kernel", ["blocks", "cascade", "flex", "auto"])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_sees_summaries_alone(
    layout: SummaryLayout, share_prefix: bool, kernel: AttentionKernel, window: int | None
) -> None:
    """Against softmax on the dense mask, with gradients; a window holds the last keys that a token sees."""
    batch = forest(layout, share_prefix)
    visible = naive_visibility(batch)
    if window is not None:
        rank = visible.cumsum(1)
        visible &= rank > rank[:, -1:] - window
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, batch.num_tokens, 8, dtype=torch.float64, generator=generator)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    options: Any = {"scaling": 0.3, "tree": batch.geometry, "sliding_window": window, "kernel": kernel}
    found, _ = tree_attention(nn.Module(), q, k, v, None, **options)
    assert torch.allclose(found, expected, atol=1e-12)
    slope = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((t * slope).sum(), (q, k, v)) for t in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in pairs)


def test_contexts_are_laid_out_once_and_kept_apart() -> None:
    layout, tokens = LAYOUTS[0], [*range(3, 11)]
    prompt = Segment([30], children=(Segment([31], [1]),))
    rows = [Example(f"rows:{n}", layout.tree(tokens, [prompt])) for n in range(3)]
    assert pack(rows).num_tokens == 12 + 2
    # The same tokens without slots, or with others that replace the earlier ones, are other contexts.
    other = Example("rows:3", SummaryLayout(ratio=2, segment_length=4, recurrence="replace").tree(tokens, [prompt]))
    ended = Example("rows:4", SummaryLayout(ratio=2, segment_length=4, placement="end").tree(tokens, [prompt]))
    assert pack([rows[0], other, ended]).num_tokens == 3 * 14
    assert len({example.content_hash() for example in (rows[0], other, ended)}) == 3
    assert plan_micro_batches([*rows, other], budget=20) == [[0, 1, 2], [3]]


def test_without_slots_nothing_changes() -> None:
    tree = Segment([5, 6], children=(Segment([7], [1]), Segment([8, 9], [1, 1])))
    batch = pack([Example("rows:0", tree)])
    assert batch.slots is None
    assert batch.encoded is None
    assert batch.geometry.shown == {}
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3]


def test_bad_segments() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 slots: give -1 for each token that is no slot"):
        Segment([5, 6], slots=[0])
    with pytest.raises(ValueError, match="shows is 'none': use one of 'all', 'slots', 'only slots'"):
        Segment([5], shows="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a segment needs a flat, non-empty list of tokens"):
        Segment(np.empty(0))
