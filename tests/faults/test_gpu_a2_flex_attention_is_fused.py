"""FlexAttention runs as the fused kernel for every kind of layer, or says in one line that it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn

from rlhf_lightning.models import hidden_states, load_causal_lm
from rlhf_lightning.models.layout import resolve_layout
from rlhf_lightning.sequences import flex_attention, pack, register_attention, tree_attention
from rlhf_lightning.sequences.example import Example, Segment

from ..helpers import save_tiny_model
from ..sequences.test_tree_attention import geometry

TREE = geometry()
TORCH_LIMIT = 8  # of compilations of one function, after which torch runs it unfused


class Compiler:
    """What compiles in the place of a GPU's: it takes the graph as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """Lets the kernel be compiled on the CPU as on a GPU, with nothing compiled before."""
    found = Compiler()
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    make = flex_attention._kernel.__wrapped__
    kernels: dict[bool, Any] = {}
    monkeypatch.setattr(flex_attention, "_kernel", lambda _: kernels.get(True) or kernels.setdefault(True, make(True)))
    yield found
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def attend(softcap: float | None, window: int | None = None, heads: int = 2, dtype: Any = torch.float32) -> Tensor:
    """One layer of a kind."""
    size = len(TREE.subtree_end)
    q, k, v = (torch.ones(1, heads, size, 8, dtype=dtype) for _ in range(3))
    options: dict[str, Any] = {"scaling": 0.3, "tree": TREE, "sliding_window": window, "softcap": softcap}
    with torch.no_grad():
        out, _ = tree_attention(nn.Module(), q, k, v, None, kernel="flex", **options)
    return out


def test_a_kind_of_layer_beyond_the_last_compilation_is_an_error_in_one_line(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention, "_COMPILATIONS", 1)
    torch._dynamo.config.recompile_limit = 1
    attend(softcap=None)
    assert compiler.graphs == 1
    with pytest.raises(RuntimeError) as caught:
        attend(softcap=1.5)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("FlexAttention has been compiled 1 times in this process")
    assert "attention: blocks" in message
    attend(softcap=None)  # what was compiled continues


def test_a_probe_beyond_the_last_compilation_says_so(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that comes after it runs padded, with one line in the log; where packed is asked for, not at all."""
    monkeypatch.setattr(flex_attention, "_COMPILATIONS", 1)
    torch._dynamo.config.recompile_limit = 1
    attend(softcap=1.5)
    name = register_attention("flex")
    model = load_causal_lm(str(save_tiny_model(tmp_path, "llama")), dtype=torch.float32, attn_implementation=name)
    with pytest.raises(
        ValueError, match=r"cannot run packed: the packed probe failed .*FlexAttention has been"
    ) as error:
        resolve_layout(model, "packed")
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning"):
        assert resolve_layout(model, "auto") == "padded"
    [line] = [record.getMessage() for record in caplog.records if "FlexAttention" in record.getMessage()]
    assert "\n" not in line


@pytest.mark.slow
def test_more_kinds_of_layers_than_torch_compiles_by_default_are_all_compiled(compiler: Compiler) -> None:
    kinds: list[dict[str, Any]] = [
        {"softcap": softcap, "window": window, "dtype": dtype}
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for softcap in (None, 1.5)
        for window in (None, 4)
    ]
    torch._dynamo.config.recompile_limit = TORCH_LIMIT
    for kind in kinds:
        before = compiler.graphs
        attend(**kind)
        assert compiler.graphs == before + 1, kind
    assert compiler.graphs > TORCH_LIMIT


def test_models_of_the_same_sizes_share_their_compilations(compiler: Compiler, tmp_path: Any) -> None:
    """A policy, its critic, a reward model and a judge: together they compile what one of them does, and no more."""
    folder = str(save_tiny_model(tmp_path, "gemma2"))
    batch = pack([Example("rows:0", Segment([5] * 6, children=(Segment([6] * 3), Segment([7] * 8))))])

    def load() -> Any:
        return load_causal_lm(folder, dtype=torch.float32, attn_implementation=register_attention("flex"))

    policy = load()
    with torch.no_grad():
        hidden_states(policy, batch, "packed")
    kinds = compiler.graphs
    assert kinds == 2  # of layers: with a window and without
    torch._dynamo.config.recompile_limit = kinds  # no more is compiled than that
    for model in (load(), load(), load(), policy):
        with torch.no_grad():
            hidden_states(model, batch, "packed")
    assert compiler.graphs == kinds
