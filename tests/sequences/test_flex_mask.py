"""The block mask of FlexAttention in closed form, against torch's own from the mask of every pair."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rlhf_lightning.sequences import TreeGeometry
from rlhf_lightning.sequences.flex_attention import flex_mask, visible_pairs
from tests.helpers import dense_mask

LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")


def draw(seed: int, longest: int, number: int = 2, depth: int = 4) -> TreeGeometry:
    """A forest with segments of 1 to ``longest`` tokens."""
    rng = np.random.default_rng(seed)
    segments: list[tuple[int, int, int]] = []

    def grow(parent: int, levels: int) -> None:
        place = len(segments)
        start = sum(length for _, length, _ in segments)
        segments.append((start, int(rng.integers(1, longest + 1)), parent))
        for _ in range(int(rng.integers(0, 4)) if levels > 1 else 0):
            grow(place, levels - 1)

    for _ in range(number):
        grow(-1, depth)
    return TreeGeometry(segments)


FORESTS = {
    "one-token": lambda: TreeGeometry([(0, 1, -1)]),
    "one-block": lambda: TreeGeometry([(0, 128, -1)]),
    "one-sequence": lambda: TreeGeometry([(0, 1000, -1)]),
    "blocks-of-their-own": lambda: TreeGeometry([(0, 256, -1), (256, 128, 0), (384, 384, 0)]),
    "pair": lambda: TreeGeometry([(0, 200, -1), (200, 150, 0), (350, 170, 0), (520, 90, -1)]),
    "group": lambda: TreeGeometry([(0, 300, -1), *((300 + 60 * n, 60, 0) for n in range(12))]),
    **{f"short-{seed}": lambda seed=seed: draw(seed, 30, number=8) for seed in range(4)},
    **{f"long-{seed}": lambda seed=seed: draw(seed, 200) for seed in range(4)},
}


@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
@pytest.mark.parametrize("name", FORESTS)
def test_blocks_are_those_of_the_mask(name: str, window: int | None) -> None:
    tree = FORESTS[name]()
    size = len(tree.subtree_end)
    visible = dense_mask(tree, window)
    expected = create_block_mask(lambda b, h, q, k: visible[q, k], None, None, size, size, device="cpu")
    found = flex_mask(tree, window)
    for each in (*LISTS, *(f"full_{name}" for name in LISTS)):
        assert torch.equal(getattr(found, each), getattr(expected, each)), each
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)
    index = torch.arange(size)
    assert torch.equal(found.mask_mod(index[0], index[0], index[:, None], index[None]), visible)


@pytest.mark.parametrize("window", [None, 50])
def test_pairs_are_counted(window: int | None) -> None:
    tree = draw(7, 90, number=5)
    size = len(tree.subtree_end)
    padded = torch.zeros(2 * [-(-size // 128) * 128], dtype=torch.long)
    padded[:size, :size] = dense_mask(tree, window)
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).sum(dim=(1, 3))
    assert visible_pairs(tree, window).tolist() == blocks.tolist()


def test_no_mask_of_all_pairs_is_made() -> None:
    """200,000 tokens, whose mask of all pairs has 40 GB."""
    tree = TreeGeometry([(0, 2000, -1), *((2000 + 400 * n, 400, 0) for n in range(495))])
    begin = time.process_time()
    counts = visible_pairs(tree, None)
    assert time.process_time() - begin < 5
    assert int(counts.sum()) == int((tree.depth + 1).sum())
