"""Trees after compressed contexts: where they lie, at which positions, and what layers are given there."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.sequences import Example, PriorContext, PriorStates, Segment, example_cost, pack
from rlhf_lightning.sequences.tree_attention import TreeGeometry, tree_attention


def behind(prompt: list[int], answer: list[int], context: PriorContext | None = None) -> Example:
    """Equal contexts are equal by what they hold."""
    after = PriorContext([5, 6, 7, 8], size=2, position=4) if context is None else context
    return Example("rows:0", Segment(prompt, children=[Segment(answer, [1.0] * len(answer))], after=after))


def test_where_trees_lie() -> None:
    batch = pack([behind([10, 11], [12]), behind([13], [14])])
    assert batch.input_ids.tolist() == [0, 0, 10, 11, 12, 13, 14]
    assert batch.position_ids.tolist() == [0, 0, 4, 5, 6, 4, 5]
    assert batch.subtree_end.tolist() == [7, 7, 5, 5, 5, 7, 7]
    assert batch.lengths.tolist() == [5, 4]
    assert (batch.source_index.tolist(), batch.target_ids.tolist()) == ([3, 5], [12, 14])
    assert [start for start, _ in batch.contexts] == [0]
    repeated = pack([behind([10, 11], [12]), behind([13], [14])], share_prefix=False)
    assert repeated.input_ids.tolist() == [0, 0, 10, 11, 12, 0, 0, 13, 14]
    assert [start for start, _ in repeated.contexts] == [0, 5]
    # Another context, another position, or another prompt that is read: each is laid out on its own.
    others = [
        PriorContext([5, 6, 7, 9], 2, 4),
        PriorContext([5, 6, 7, 8], 2, 5),
        PriorContext([5, 6, 7, 8], 2, 4, [10, 11]),
    ]
    for other in others:
        assert len(pack([behind([10, 11], [12]), behind([10, 11], [12], other)]).contexts) == 2
        assert behind([10], [12]).content_hash() != behind([10], [12], other).content_hash()
    assert behind([10], [12]).content_hash() == behind([10], [12]).content_hash()


def test_what_they_cost() -> None:
    assert behind([10, 11], [12]).root.num_tokens == 5
    two = [Segment([12], [1.0]), Segment([13], [1.0])]
    tree = Example("rows:0", Segment([10], children=two, after=PriorContext([5, 6], 2, 2)))
    assert (example_cost(tree, share_prefix=True), example_cost(tree, share_prefix=False)) == (5, 8)


def test_the_first_token_has_none_before_it() -> None:
    tree = Segment([10, 11], [1.0, 1.0], after=PriorContext([5, 6], 1, 2))
    with pytest.raises(ValueError, match="the first token of a tree has weight above 0, but no token before it"):
        pack([Example("rows:0", tree)])


class Layer(torch.nn.Module):
    layer_idx = 1
    is_causal = True


@pytest.mark.parametrize("kernel", ["blocks", "cascade"])
def test_layers_are_given_states(kernel: str) -> None:
    """Two entries, a prompt of two tokens, two completions: by the softmax of each query over what it sees."""
    tree = TreeGeometry([(0, 2, -1), (2, 2, 0), (4, 1, 1), (5, 2, 1)])
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 7, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    query, key, value = drawn
    keys, values = (torch.randn(2, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    unused = (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4))
    tree.prior = PriorStates(torch.tensor([0, 1]), [unused, (keys, values)])
    out, _ = tree_attention(Layer(), query, key, value, None, tree=tree, kernel=kernel)  # type: ignore[arg-type]
    seen = {2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 5: [0, 1, 2, 3, 5], 6: [0, 1, 2, 3, 5, 6]}
    own_keys = torch.cat([keys[None], key[:, :, 2:]], dim=2)
    own_values = torch.cat([values[None], value[:, :, 2:]], dim=2)
    for token, visible in seen.items():
        for head in range(2):
            weights = (own_keys[0, head, visible] @ query[0, head, token] / 2).softmax(0)
            assert torch.allclose(out[0, token, head], weights @ own_values[0, head, visible], atol=1e-12)

    # Outputs of layers at the places of entries reach nothing.
    out[:, 2:].sum().backward()
    assert key.grad is not None
    assert value.grad is not None
    assert float(key.grad[:, :, :2].abs().max()) == 0
    assert float(value.grad[:, :, :2].abs().max()) == 0
    assert float(key.grad[:, :, 2:].abs().min()) > 0
