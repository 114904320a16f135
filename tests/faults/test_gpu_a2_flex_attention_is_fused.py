"""FlexAttention runs as the fused kernel for every kind of layer, or says in one line that it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn

from rlhf_lightning import PPOModule, RewardModule
from rlhf_lightning.models import hidden_states, load_causal_lm
from rlhf_lightning.models.layout import resolve_layout
from rlhf_lightning.rewards import ConstitutionReward, RewardModelReward
from rlhf_lightning.sequences import (
    ExampleBatch,
    TreeGeometry,
    flex_attention,
    pack,
    register_attention,
    tree_attention,
)
from rlhf_lightning.sequences.example import Example, Segment
from rlhf_lightning.utils import compilation

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..rl.fixed_rollouts import prompts, remainder
from ..sequences.test_tree_attention import geometry

TREE = geometry()
TORCH_LIMIT = 8  # of compilations of one function, after which torch runs it unfused
# Compilations for one size of model, some of its layers with a window: layers with it and without; batches of up to
# 128 tokens, which is one block, and of more; with gradient, without, and in inference mode.
PER_SIZE = 2 * 2 * 3


class Compiler:
    """A stand-in for the GPU's compiler: it takes the graph as it is, and counts."""

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


@pytest.fixture
def trainable(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets layers with a soft cap take FlexAttention on the CPU, with its plain backward pass; what ran uncompiled."""
    unfused: list[str] = []
    module = import_module("rlhf_lightning.sequences.tree_attention")
    plain, attention = module._kernel_for, flex_attention.flex_attention

    def kernel_for(kernel: str, *args: Any) -> str:
        softcap = args[-2]
        return "flex" if kernel == "auto" and softcap is not None else plain(kernel, *args)

    def seen(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            unfused.append("flex_attention")
        return attention(*args, **kwargs)

    monkeypatch.setattr(module, "_kernel_for", kernel_for)
    monkeypatch.setattr(flex_attention, "flex_attention", seen)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *states: None)
    return unfused


def attend(
    softcap: float | None,
    window: int | None = None,
    heads: int = 2,
    dtype: Any = torch.float32,
    tree: TreeGeometry = TREE,
    mode: Callable[[], Any] = torch.no_grad,
) -> Tensor:
    """One layer of a kind."""
    size = len(tree.subtree_end)
    options: dict[str, Any] = {"scaling": 0.3, "tree": tree, "sliding_window": window, "softcap": softcap}
    with mode():
        q, k, v = (torch.ones(1, heads, size, 8, dtype=dtype, requires_grad=torch.is_grad_enabled()) for _ in range(3))
        out, _ = tree_attention(nn.Module(), q, k, v, None, kernel="flex", **options)
    return out


def test_a_kind_of_layer_beyond_the_last_compilation_is_an_error_in_one_line(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_COMPILATIONS", 1)
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
    monkeypatch.setattr(compilation, "_COMPILATIONS", 1)
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


def forest(tokens: int) -> TreeGeometry:
    """A prompt with two completions, and a lone sequence."""
    part = tokens // 4
    tree = Segment([5] * part, children=(Segment([6] * part), Segment([7] * part)))
    return pack([Example("rows:0", tree), Example("rows:1", Segment([8] * (tokens - 3 * part)))]).geometry


def test_layers_with_a_soft_cap_train(compiler: Compiler, trainable: list[str]) -> None:
    """Gradients are those of softmax over what is visible, spelled out."""
    found, states = layer_with_gradients("flex")
    expected, exact = layer_with_gradients("blocks")
    assert (compiler.graphs, trainable) == (1, [])
    torch.testing.assert_close(found, expected)
    for state, other in zip(states, exact, strict=True):
        torch.testing.assert_close(state, other)


def layer_with_gradients(kernel: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer's output, and the gradients of a sum of it."""
    draw = torch.Generator().manual_seed(0)
    size = len(TREE.subtree_end)
    states = [torch.randn(1, 2, size, 8, generator=draw).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {"scaling": 0.3, "tree": TREE, "softcap": 2.0, "kernel": kernel}
    out, _ = tree_attention(nn.Module(), *states, None, **options)
    slope = torch.randn(out.shape, generator=draw)
    return out.detach(), torch.autograd.grad((out * slope).sum(), states)


@pytest.mark.slow
def test_lengths_and_windows_are_few_kinds(compiler: Compiler, trainable: list[str]) -> None:
    """However many batches there are: what compiles them all has been compiled by two of them."""
    seen: list[int] = []
    for tokens in (100, 300, 128, 129, 40, 256, 257, 500, 72, 611):
        for window in (None, 4):
            for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                out = attend(2.0, window, tree=forest(tokens), mode=mode)
                assert out.shape[1] == tokens
        seen.append(compiler.graphs)
    assert seen[1] == PER_SIZE
    assert seen[1:] == [PER_SIZE] * (len(seen) - 1)
    assert trainable == []


def several_models(place: Path) -> tuple[PPOModule, int]:
    """A policy with soft caps and windows, its own critic, a reward model and a reference of its size, and a judge."""
    policy = str(save_tiny_model(place / "policy", "gemma2", max_position_embeddings=512, initializer_range=0.05))
    larger = {"head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.05}
    judge = str(save_tiny_model(place / "judge", "gemma2", **larger))
    RewardModule(policy).save_pretrained(str(place / "scorer"))
    principles = [{"name": "short", "statement": "it is short"}]
    module = PPOModule(
        policy,
        rewards=[RewardModelReward(str(place / "scorer")), ConstitutionReward(principles, judge=judge)],
        value={"model": str(place / "scorer")},
        kl_coef=0.1,
        num_generations=2,
        max_completion_length=4,
        num_updates=2,
    )
    return module, 2


def train(module: PPOModule) -> None:
    """Trains on iterations of different sizes, and validates."""
    batches = Batches(*(ExampleBatch(prompts(count)) for count in (2, 20, 5, 30)))
    run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, batches, batches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_policy_critic_reward_model_and_judge_compile_a_bounded_number_of_times(
    compiler: Compiler, trainable: list[str], tmp_path: Path
) -> None:
    module, sizes = several_models(tmp_path)
    train(module)
    assert trainable == []  # nothing has run unfused
    assert TORCH_LIMIT < compiler.graphs <= sizes * PER_SIZE < compilation._COMPILATIONS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_beyond_the_last_compilation_is_an_error_in_one_line(
    compiler: Compiler, trainable: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The probe and what samples need compile; the gradient would be compiled next."""
    monkeypatch.setattr(compilation, "_COMPILATIONS", 2)
    torch._dynamo.config.recompile_limit = 2
    module = PPOModule(str(save_tiny_model(tmp_path, "gemma2")), rewards=[remainder], max_completion_length=4)
    with pytest.raises(RuntimeError, match="FlexAttention has been compiled 2 times in this process") as caught:
        train(module)
    assert "\n" not in str(caught.value)
    assert trainable == []
    assert compiler.graphs == 2
