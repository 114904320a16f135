from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.inference import Completion, LocalEngine, SamplingParams
from rlhf_lightning.inference.paged_cache import PagePool
from rlhf_lightning.inference.prefix_tree import PAGE, PrefixTree
from rlhf_lightning.inference.weight_version import weight_version

from ..helpers import ARCHITECTURES, EOS_ID, VOCAB_SIZE, char_tokenizer, save_tiny_model, tiny_model

EXACT = ("static", "paged")


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            if other.model_logprobs is not None:
                np.testing.assert_allclose(one.model_logprobs, other.model_logprobs, atol=1e-4)


# The fast run has every architecture with one of the caches, in turn.
IN_TURN = [
    pytest.param(arch, cache, marks=() if number % len(EXACT) == place else pytest.mark.slow)
    for number, arch in enumerate(ARCHITECTURES)
    for place, cache in enumerate(EXACT)
]


@pytest.mark.parametrize(("arch", "cache"), IN_TURN)
def test_samples_are_those_of_the_dynamic_cache(arch: str, cache: Any) -> None:
    model = tiny_model(arch)
    params = SamplingParams(max_new_tokens=21, temperature=1.4, top_p=0.95, seed=4, stop_token_ids=tuple(range(3, 7)))
    given = prompts(3, 19, 1, 40, 7)
    expected = LocalEngine(model, None).generate(given, 3, params)
    assert len({len(sample.token_ids) for group in expected for sample in group}) > 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these may need another cache
        engine = LocalEngine(model, None, cache=cache)
        same(engine.generate(given, 3, params), expected)
        same(LocalEngine(model, None, cache=cache, max_batch_tokens=150).generate(given, 3, params), expected)
        same(engine.generate(given, 3, params), expected)


@pytest.mark.parametrize("cache", [*EXACT, "int8"])
def test_every_setting_of_sampling_works(cache: Any) -> None:
    model, tokenizer = tiny_model("qwen3"), char_tokenizer()
    settings = [
        SamplingParams(max_new_tokens=20, temperature=0),
        SamplingParams(max_new_tokens=20, min_new_tokens=11, repetition_penalty=1.3, seed=1, model_logprobs=True),
        SamplingParams(max_new_tokens=30, stop=("a", "5", "+"), temperature=2.0, seed=2),
        SamplingParams(max_new_tokens=9, top_k=5, min_p=0.1, seed=3),
        SamplingParams(max_new_tokens=1, seed=3),
    ]
    for params in settings:
        expected = LocalEngine(model, tokenizer).generate(["3+4=", "12+5=?\n"], 5, params)
        found = LocalEngine(model, tokenizer, cache=cache).generate(["3+4=", "12+5=?\n"], 5, params)
        if cache == "int8":
            pairs = [
                (a, b) for mine, theirs in zip(found, expected, strict=True) for a, b in zip(mine, theirs, strict=True)
            ]
            assert sum(a.token_ids[:4] == b.token_ids[:4] for a, b in pairs) >= 8
        else:
            same(found, expected)


def test_beginnings_are_found_again_and_give_the_same_samples() -> None:
    model = tiny_model("gemma2")
    params = SamplingParams(max_new_tokens=20, min_new_tokens=20, seed=0)
    shared = prompts(70)[0]
    engine = LocalEngine(model, None, cache="paged")
    for number in range(3):
        given = [shared + tail for tail in prompts(5, 9, seed=10 + number)]
        before = engine.statistics()["reused_tokens"]
        same(engine.generate(given, 2, params), LocalEngine(model, None).generate(given, 2, params))
        # The second prompt of the first call finds the first one's pages.
        assert engine.statistics()["reused_tokens"] - before == (64 if number == 0 else 128)
    # The prompt of a search's next round: what was sampled is found, too.
    longer = [given[0] + LocalEngine(model, None).generate(given, 2, params)[0][0].token_ids]
    before = engine.statistics()["reused_tokens"]
    same(engine.generate(longer, 2, params), LocalEngine(model, None).generate(longer, 2, params))
    assert engine.statistics()["reused_tokens"] - before == 80  # 94 of its 95 tokens have states
    found = engine.statistics()
    assert found["hits"] == 6
    assert found["pages"] == found["pages_cached"] > 0
    assert 0 < found["fragmentation"] < 0.5
    assert found["evictions"] == 0


@pytest.mark.parametrize("budget", [64, 200, 400])
def test_pages_are_given_up_within_the_budget(budget: int) -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=10, temperature=0)
    engine = LocalEngine(model, None, cache="paged", max_batch_tokens=budget)
    for seed in range(4):
        given = prompts(50, 40, 33, seed=seed)
        same(engine.generate(given, 1, params), LocalEngine(model, None).generate(given, 1, params))
    found = engine.statistics()
    assert found["evictions"] > 0
    assert found["pages_cached"] <= budget // PAGE + 2  # a row that needs more gets more
    assert found["pages"] == found["pages_cached"]  # no row holds a page any more


def scale(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)


def scale_data(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        scale,
        scale_data,
        lambda model: model.disable_adapter_layers(),
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.scaling.update(default=3.0),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
    ],
    ids=["in place", "data", "adapter off", "other adapter", "scaling", "optimizer"],
)
def test_pages_of_other_weights_are_never_read(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    given = prompts(50, 35)
    params = SamplingParams(max_new_tokens=12, seed=0)
    engine = LocalEngine(model, None, cache="paged")
    engine.generate(given, 1, params)
    engine.generate(given, 1, params)
    reused = engine.statistics()["reused_tokens"]
    assert reused == 48 + 32
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(model)
    found = engine.generate(given, 1, params)
    assert engine.statistics()["reused_tokens"] == reused
    same(found, LocalEngine(model, None).generate(given, 1, params))


def test_clearing_forgets_pages() -> None:
    engine = LocalEngine(tiny_model("llama"), None, cache="paged")
    params = SamplingParams(max_new_tokens=2, seed=0)
    engine.generate(prompts(50), 1, params)
    engine.clear_cache()
    engine.generate(prompts(50), 1, params)
    assert engine.statistics()["reused_tokens"] == 0


def test_weight_versions_tell_weights_apart() -> None:
    model = tiny_model("llama")
    first = weight_version(model)
    assert weight_version(model) == first
    model.train()
    assert weight_version(model) == first
    for parameter in model.parameters():
        parameter.data.view(-1)[0].add_(1)
        assert weight_version(model) != first
        parameter.data.view(-1)[0].sub_(1)


def test_steps_of_the_static_cache_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    engine = LocalEngine(model, None, cache="static", max_batch_tokens=128 * 8)
    params = SamplingParams(max_new_tokens=60, temperature=2.0, seed=5)
    engine.generate(prompts(4), 1, params)
    shapes: list[Any] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == 2:  # two heads of queries for each of keys
            shapes.append((tuple(query.shape), tuple(key.shape), tuple(kwargs["attn_mask"].shape)))
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    engine.generate(prompts(4, 9, 30, 17, 21, 8, 11, 40, 3, 5), 2, params)
    rows, columns = ({shape[1][at] for shape in shapes} for at in (0, 2))
    assert len(shapes) > 200
    assert rows <= {1, 2, 4, 8}
    assert columns <= {64, 128}
    assert len(set(shapes)) <= 8


def test_eight_bits_take_a_third_of_the_memory_and_change_little() -> None:
    model = tiny_model("qwen3", num_hidden_layers=3, head_dim=64)
    params = SamplingParams(max_new_tokens=24, temperature=0, min_new_tokens=24)
    given = prompts(40, 30, 20, 35)
    exact, rounded = (LocalEngine(model, None, cache=cache) for cache in ("static", "int8"))
    expected, found = exact.generate(given, 1, params), rounded.generate(given, 1, params)
    whole = 4 * 64 * 3 * 2 * 2 * 64 * 4  # rows, columns, layers, keys and values, heads, size, bytes
    assert rounded.statistics()["cache_bytes"] <= 0.35 * whole * 65 / 64
    tokens = [np.array([group[0].token_ids for group in groups]) for groups in (expected, found)]
    assert np.mean(tokens[0] == tokens[1]) > 0.6


@pytest.mark.parametrize("cache", ["static", "paged", "int8"])
def test_models_without_plain_attention_run_with_the_dynamic_cache(cache: Any) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "n_head": 4, "eos_token_id": EOS_ID}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **options)).eval()
    params = SamplingParams(max_new_tokens=8, seed=0)
    engine = LocalEngine(model, None, cache=cache)
    with pytest.warns(UserWarning, match=f"BloomForCausalLM does not compute the same with cache='{cache}'"):
        found = engine.generate(prompts(4, 9), 2, params)
    same(found, LocalEngine(model, None).generate(prompts(4, 9), 2, params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.generate(prompts(4), 1, params)


def test_an_interrupted_call_leaves_no_pages_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, None, cache="paged")
    params = SamplingParams(max_new_tokens=6, seed=0)
    engine.generate(prompts(40), 1, params)
    forward, calls = model.forward, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(40, 20), 1, params)
    monkeypatch.setattr(model, "forward", forward)
    same(engine.generate(prompts(40), 1, params), LocalEngine(model, None).generate(prompts(40), 1, params))
    assert engine.statistics()["pages"] == engine.statistics()["pages_cached"]


def test_an_engine_is_loaded_from_a_folder(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "qwen3")
    engine = LocalEngine.from_pretrained(folder, cache="paged", dtype="float32", device="cpu", max_batch_tokens=500)
    params = SamplingParams(max_new_tokens=6, seed=0)
    same(
        engine.generate(["3+4="], 2, params),
        LocalEngine(tiny_model("qwen3"), char_tokenizer()).generate(["3+4="], 2, params),
    )
    found = engine.statistics()
    assert (found["cache"], found["attention"]) == ("paged", "rlhf_tree")
    assert (found["prompts"], found["prompt_tokens"]) == (1, 4)
    assert found["new_tokens"] == sum(len(s.token_ids) for s in engine.generate(["3+4="], 2, params)[0])
    with pytest.raises(ValueError, match="dtype='int4' is not allowed: use auto, float32"):
        LocalEngine.from_pretrained(folder, dtype="int4", device="cpu")
    with pytest.raises(ValueError, match="device is 'gpu'; it must be the name of one, such as cpu, cuda or cuda:1"):
        LocalEngine.from_pretrained(folder, device="gpu")
    with pytest.raises(ValueError, match=r"device is 'cuda:99', and torch finds \d+ GPUs: write cpu, or leave it out"):
        LocalEngine.from_pretrained(folder, device="cuda:99")


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="cache='big' is not allowed: use one of dynamic, static, paged, int8"):
        LocalEngine(tiny_model("llama"), None, cache="big")  # type: ignore[arg-type]


def test_the_tree_gives_up_what_was_not_used_for_longest() -> None:
    tree = PrefixTree()
    one, other = list(range(48)), [*range(16), *range(100, 132)]
    assert tree.insert(one, [1, 2, 3]) == [1, 2, 3]
    assert tree.insert(other, [9, 4, 5]) == [4, 5]  # the first page is known
    tree.match(one)
    held = {5}
    assert [tree.give_up(lambda page: page not in held) for _ in range(3)] == [3, 2, None]
    held = set()
    assert [tree.give_up(lambda page: page not in held) for _ in range(4)] == [5, 4, 1, None]
    assert len(tree) == 0
    assert tree.match(one) == []


def test_pages_are_shared_and_freed() -> None:
    pool = PagePool(4)
    states = [(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))]
    pages = pool.allocate(3, like=states)
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.pages_held == 1
    more = pool.allocate(3)
    assert len({*more, pages[0], 0}) == 5  # the page that is never read is not given out
    assert len({*pool.allocate(2), *more, pages[0]}) == 6  # rows that need more than the budget get it
    pool.release(pages[:1])
    assert pool.pages_held == 5
