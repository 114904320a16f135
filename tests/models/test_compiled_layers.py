"""Compiled layers compute what the layers compute, are compiled a few times, and leave everything else as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_lightning import ContextCompressionModule, SFTModule
from rlhf_lightning.core.trainer_checks import check_compiled
from rlhf_lightning.distributed.strategy import FSDP2Strategy
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import hidden_states, load_causal_lm
from rlhf_lightning.models.backbone import decoder_blocks
from rlhf_lightning.models.compiled_layers import _compiled, compile_layers, is_compiled, uncompiled
from rlhf_lightning.models.half_weights import rounded
from rlhf_lightning.models.layout import resolve_layout
from rlhf_lightning.models.own_attention import set_attention
from rlhf_lightning.models.saving import save_pretrained
from rlhf_lightning.sequences import Example, Segment, SequenceBatch, pack, register_attention
from rlhf_lightning.utils import compilation

from ..helpers import char_tokenizer, save_tiny_model, tiny_model
from ..invariance.harness import TOLERANCE, assert_same, step, validate
from ..invariance.methods import METHODS

# Graphs of a layer: with blocks those of norms, of attention's projections before and after it, and of the rest.
PARTS = {"blocks": 5, "cascade": 1}


class Compiler:
    """A stand-in for inductor: it takes the graph as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing has been compiled before, and nothing is kept."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    _compiled.cache_clear()
    yield
    _compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def compiler(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    return found


def forest(seed: int) -> SequenceBatch:
    """Two to four prompts with two or three completions each, of other lengths for each seed."""
    numbers = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return numbers.integers(3, 60, numbers.integers(2, 9))

    return pack(
        [
            Example(
                f"row:{n}", Segment(tokens(), children=tuple(Segment(tokens()) for _ in range(numbers.integers(2, 4))))
            )
            for n in range(2 + seed % 3)
        ]
    )


def passes(model: nn.Module, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a batch, and the gradients of a function of them."""
    model.zero_grad()
    states = hidden_states(model, batch, "packed").states
    states.double().sin().sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tol: float
) -> None:
    assert found[1].keys() == expected[1].keys()
    for one, other in ((found[0], expected[0]), *((found[1][n], g) for n, g in expected[1].items())):
        assert float((one - other).norm()) <= tol * float(other.norm()) + 1e-12


def ready(model: nn.Module, kernel: str = "blocks") -> nn.Module:
    """A model with compiled layers that have run once."""
    set_attention(model, register_attention(kernel))
    compile_layers(model)
    with torch.no_grad():
        hidden_states(model, forest(100), "packed")
    return model


@pytest.mark.parametrize("kernel", ["cascade", pytest.param("blocks", marks=pytest.mark.slow)])
def test_ten_shapes_are_compiled_as_often_as_one(kernel: str, compiler: Compiler) -> None:
    model = ready(tiny_model("llama").requires_grad_(True).train(), kernel)
    for seed in range(10):
        with uncompiled(model):
            before = compiler.graphs
            expected = passes(model, forest(seed))
            assert compiler.graphs == before
        assert_close(passes(model, forest(seed)), expected, 1e-5)
        with torch.no_grad():
            found = hidden_states(model, forest(seed), "packed").states
        assert_close((found, {}), (expected[0], {}), 1e-5)
        assert compiler.graphs > 0
        if seed == 3:
            known = compiler.graphs
    assert compiler.graphs == known <= 2 * PARTS[kernel] * 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "qwen3", "phi3"])
def test_kinds_of_models(arch: str, compiler: Compiler) -> None:
    """Windows, soft caps, absolute positions, norms of heads."""
    model = ready(tiny_model(arch, dtype=torch.float64).requires_grad_(True).train())
    with uncompiled(model):
        expected = passes(model, forest(0))
    assert_close(passes(model, forest(0)), expected, 1e-10)
    assert compiler.graphs > 0


@pytest.mark.parametrize("kernel", PARTS)
def test_the_first_pass_is_compiled_as_all_others_are(kernel: str, compiler: Compiler) -> None:
    """A run that is resumed computes what the run that went on did, dropout included."""
    model = tiny_model("llama").requires_grad_(True).train()
    set_attention(model, register_attention(kernel))
    for layer in decoder_blocks(model):
        layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    compile_layers(model)
    torch.manual_seed(0)
    first = passes(model, forest(0))
    graphs = compiler.graphs
    assert graphs > 0
    torch.manual_seed(0)
    assert_close(passes(model, forest(0)), first, 0.0)
    assert compiler.graphs == graphs


def test_weights_that_are_rounded_once_a_step_are_read(compiler: Compiler) -> None:
    """Under autocast, by all steps without another compilation."""
    model = ready(tiny_model("llama").requires_grad_(True).train(), "cascade")
    known = 0
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with uncompiled(model), rounded(model):
                expected = passes(model, forest(seed))
            with rounded(model):
                found = passes(model, forest(seed))
        assert_close(found, expected, 1e-6)
        known = known or compiler.graphs
    assert compiler.graphs <= known + 1
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.slow
def test_adapters(compiler: Compiler) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = ready(get_peft_model(tiny_model("llama", dtype=torch.float64), config).base_model.model, "blocks")
    with uncompiled(model):
        expected = passes(model, forest(0))
    found = passes(model, forest(0))
    assert_close(found, expected, 1e-10)
    assert set(found[1]) == {n for n, p in model.named_parameters() if "lora_" in n}
    assert compiler.graphs > 0


def test_names_copies_and_generation_are_those_of_the_plain_model(compiler: Compiler, tmp_path: Path) -> None:
    plain, model = tiny_model("llama"), ready(tiny_model("llama"))
    set_attention(plain, register_attention("blocks"))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    other = copy.deepcopy(model)
    assert all(vars(layer)["forward"].layer is layer for layer in decoder_blocks(other))

    # A step of generation has a cache: layers run as they are, on the weights that training changes.
    with torch.no_grad():
        for one in (plain, model):
            one.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    before = compiler.graphs
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(max_new_tokens=6, seed=0)
    samples = [
        [[s.token_ids for s in group] for group in LocalEngine(one, None).generate(prompts, 2, params)]
        for one in (plain, model)
    ]
    assert samples[0] == samples[1]
    assert compiler.graphs == before

    save_pretrained(model, char_tokenizer(), str(tmp_path / "export"))
    loaded = load_causal_lm(str(tmp_path / "export"), dtype=torch.float32)
    assert not is_compiled(loaded)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in loaded.state_dict().items())


RUNS = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "grpo": ("grpo", {}),
    "adapters": ("dpo", {"lora": {"r": 2, "lora_dropout": 0.0}}),
    "recomputed": ("dpo", {"gradient_checkpointing": True}),
    "cascade": ("dpo", {"attention": "cascade"}),
    "members": ("reward-adapters", {}),
    "critic": ("ppo", {}),
    "coupled": ("dpo-coupled", {}),
}


def check_step(name: str, folder: str, precision: str) -> None:
    method, options = METHODS[RUNS[name][0]], {"micro_batch_tokens": 41, **RUNS[name][1]}
    expected = step(method, folder, method.rows(5), precision, **options)
    assert_same(
        step(method, folder, method.rows(5), precision, compile=True, **options), expected, TOLERANCE[precision]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.mark.parametrize("name", [n if n == "dpo" else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_a_step_is_that_of_plain_layers(name: str, folder: str, compiler: Compiler) -> None:
    check_step(name, folder, "64-true")
    assert compiler.graphs > 1  # one of them tries the compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_step_by_inductor_is_that_of_plain_layers(name: str, folder: str, fresh: None) -> None:
    """With torch's own compiler, which also fuses."""
    torch._dynamo.utils.counters.clear()
    check_step(name, folder, "32-true")
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 40


@pytest.mark.slow
def test_validation_by_inductor(folder: str, fresh: None) -> None:
    method = METHODS["dpo"]
    expected = validate(method, folder, method.rows(6), 2)
    found = validate(method, folder, method.rows(6), 2, compile=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_not_compiled_is_refused_in_one_line(folder: str) -> None:
    for options in ({"layout": "padded"}, {"quantization": "nf4", "lora": {"r": 2}}):
        with pytest.raises(ValueError, match=r"^compile is true with .*: set compile to false$"):
            SFTModule(folder, compile=True, **options)
    with pytest.raises(ValueError, match=r"^compile is true, and a compressor's .*: set compile to false$"):
        ContextCompressionModule(folder, compile=True)
    with pytest.raises(ValueError, match=r"^compile is true with strategy 'fsdp2', .*, or use strategy: ddp$"):
        check_compiled(FSDP2Strategy())
    with pytest.raises(
        ValueError, match=r"^compile is true, and Qwen3MoeForCausalLM is a mixture .*: set compile to false$"
    ):
        compile_layers(tiny_model("qwen3_moe"))


def test_a_model_that_runs_padded_is_refused(compiler: Compiler) -> None:
    model = tiny_model("llama")  # with transformers' attention it cannot run packed
    compile_layers(model)
    with pytest.raises(
        ValueError, match=r"^compile is true, and LlamaForCausalLM runs in the padded layout \(its attention"
    ):
        resolve_layout(model, "auto")


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("backend='inductor' raised:\nNo working C++ compiler found in g++\n\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        ValueError, match=r"cannot compile for cpu here \(No working C\+\+ .* g\+\+\): .*, or set compile to"
    ):
        compilation.check_compiler(torch.device("cpu"))
