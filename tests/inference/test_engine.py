from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.inference import Completion, LocalEngine, SamplingParams
from rlhf_lightning.inference.sampling import uniforms

from ..helpers import ARCHITECTURES, EOS_ID, MAX_POSITIONS, VOCAB_SIZE, char_tokenizer, tiny_model

GREEDY = SamplingParams(max_new_tokens=16, temperature=0)
LENGTHS = (3, 11, 1, 7, 7, 20)


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def transformers_greedy(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """The tokens after one prompt, alone and unpadded, by transformers' own loop."""
    input_ids = torch.tensor([prompt])
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)[
            0, len(prompt) :
        ].tolist()


def no_cache_sample(
    model: nn.Module, prompt: list[int], seed: int, params: SamplingParams
) -> tuple[list[int], list[float]]:
    """One sample by its definition: full forwards, filtered probabilities, the inverse of their cumulative sum."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < params.max_new_tokens and tokens[-1:] != [EOS_ID]:
        with torch.no_grad():
            scores_V = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double()
        scores_V = scores_V / params.temperature
        if params.top_k:
            scores_V[scores_V < scores_V.topk(params.top_k).values[-1]] = -math.inf
        if params.top_p < 1:
            ordered, index = scores_V.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            scores_V[index[before >= params.top_p]] = -math.inf
        cumulative_V = scores_V.softmax(-1).cumsum(-1)
        token = int((cumulative_V > float(uniforms([seed], [len(tokens)])[0])).nonzero()[0])
        tokens.append(token)
        logprobs.append(scores_V.log_softmax(-1)[token].item())
    return tokens, logprobs


def flat(completions: list[list[Completion]]) -> list[list[int]]:
    return [sample.token_ids for group in completions for sample in group]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(arch: str) -> None:
    model = tiny_model(arch)
    prompts = random_prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these may need the slow path
        whole = LocalEngine(model, None).generate(prompts, sampling=GREEDY)
        narrow = LocalEngine(model, None, max_batch_tokens=80).generate(prompts, num_samples=3, sampling=GREEDY)
    expected = [transformers_greedy(model, prompt) for prompt in prompts]
    assert flat(whole) == expected
    assert flat(narrow) == [tokens for tokens in expected for _ in range(3)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_samples_and_logprobs_are_those_of_full_forwards(arch: str) -> None:
    model = tiny_model(arch)
    prompts = random_prompts((2, 9, 5))
    params = SamplingParams(max_new_tokens=8, temperature=1.2, top_k=30, top_p=0.9)
    seeds = [[10, 11], [12, 13], [14, 15]]
    completions = LocalEngine(model, None, max_batch_tokens=60).generate(prompts, 2, params, seeds=seeds)
    for prompt, group, row in zip(prompts, completions, seeds, strict=True):
        for sample, seed in zip(group, row, strict=True):
            tokens, logprobs = no_cache_sample(model, prompt, seed, params)
            assert sample.token_ids == tokens
            np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize(("arch", "budget"), [("qwen3", 1), ("gemma2", 70), ("gpt2", 100), ("llama", 333)])
def test_a_sample_depends_neither_on_its_neighbours_nor_on_the_budget(arch: str, budget: int) -> None:
    model = tiny_model(arch)
    prompts = random_prompts((9, 2, 14, 2))
    params = SamplingParams(max_new_tokens=20, temperature=1.5, stop_token_ids=tuple(range(3, 9)))
    seeds = [[100 * row + column for column in range(3)] for row in range(len(prompts))]
    alone = [
        LocalEngine(model, None).generate([prompt], 1, params, seeds=[[seed]])[0][0].token_ids
        for prompt, row in zip(prompts, seeds, strict=True)
        for seed in row
    ]
    together = LocalEngine(model, None, max_batch_tokens=budget).generate(prompts, 3, params, seeds=seeds)
    assert flat(together) == alone
    backwards = LocalEngine(model, None).generate(prompts[::-1], 3, params, seeds=seeds[::-1])
    assert flat(backwards[::-1]) == alone
    assert len({len(tokens) for tokens in alone}) > 2  # rows did leave at different times


def test_large_heads_are_packed_and_searched_by_blocks() -> None:
    model = tiny_model("qwen3", vocab_size=5000, tie_word_embeddings=True)
    prompts = random_prompts((9, 2))
    assert flat(LocalEngine(model, None).generate(prompts, 1, GREEDY)) == [
        transformers_greedy(model, prompt) for prompt in prompts
    ]
    params = SamplingParams(max_new_tokens=6, temperature=1.2)
    samples = LocalEngine(model, None).generate(prompts[:1], 4, params, seeds=[[1, 2, 3, 4]])[0]
    for seed, sample in enumerate(samples, start=1):
        tokens, logprobs = no_cache_sample(model, prompts[0], seed, params)
        assert sample.token_ids == tokens
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


def test_derived_seeds_are_stable_and_differ_between_samples_and_calls() -> None:
    engine = LocalEngine(tiny_model("llama"), None)
    prompt = random_prompts((4,))[0]
    params = SamplingParams(max_new_tokens=12, seed=3)
    first = flat(engine.generate([prompt, prompt], 3, params))
    assert first == flat(engine.generate([prompt, prompt], 3, params))
    assert len({tuple(tokens) for tokens in first}) == 6
    unseeded = SamplingParams(max_new_tokens=12)
    torch.manual_seed(0)
    one, other = flat(engine.generate([prompt], 2, unseeded)), flat(engine.generate([prompt], 2, unseeded))
    torch.manual_seed(0)
    assert one != other
    assert flat(engine.generate([prompt], 2, unseeded)) == one


def test_equal_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    engine = LocalEngine(model, None)
    prompts = random_prompts((10, 6))
    engine.generate(prompts, sampling=GREEDY)  # the trial of the layout is over after this
    seen: list[tuple[int, ...]] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    engine.generate([prompts[0], prompts[1], prompts[0]], 5, SamplingParams(max_new_tokens=4, min_new_tokens=4))
    assert seen == [(2, 10), (15, 1), (15, 1), (15, 1)]


def test_finished_rows_leave_and_waiting_prompts_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    prompts = random_prompts((4,) * 12)
    params = SamplingParams(max_new_tokens=28, temperature=2.0, seed=5)
    LocalEngine(model, None).generate(prompts[:1], 1, params)
    rows: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    completions = LocalEngine(model, None, max_batch_tokens=128).generate(prompts, 1, params)
    lengths = [len(tokens) for tokens in flat(completions)]
    assert max(rows) == 4  # 128 tokens hold four rows of 32
    assert (
        sum(rows) == sum(lengths) - 12
    )  # the first token of each comes from its prompt; no step computes anything else
    assert (
        len(rows) < sum(sorted(lengths)[2::4]) + 12
    )  # fewer steps than three batches that wait for their longest rows


def test_stop_strings_end_text_before_and_tokens_after_them(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, tokenizer)
    free = engine.generate(["12+3="], 1, GREEDY)[0][0]
    assert len(free.token_ids) == 16
    stop = free.text[5:8]
    at = free.text.find(stop)
    stopped = engine.generate(
        ["12+3="], 1, SamplingParams(max_new_tokens=16, temperature=0, stop=("never seen", stop))
    )[0][0]
    assert stopped.text == free.text[:at]
    assert stopped.token_ids == free.token_ids[: at + len(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == len(stopped.token_ids)
    late = SamplingParams(max_new_tokens=16, temperature=0, stop=(stop,), min_new_tokens=at + len(stop) + 1)
    assert len(engine.generate(["12+3="], 1, late)[0][0].token_ids) > at + len(stop)


def test_end_of_sequence_and_stop_tokens_are_kept_and_end_the_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, tokenizer)
    prompt = random_prompts((5,))[0]
    samples = engine.generate([prompt], 40, SamplingParams(max_new_tokens=30, temperature=2.0, seed=1))[0]
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    assert len(ended) > 5
    for sample in samples:
        stops = sample.token_ids[-1] == EOS_ID
        assert sample.finish_reason == ("stop" if stops else "length")
        assert stops or len(sample.token_ids) == 30
        assert EOS_ID not in sample.token_ids[:-1]
        assert len(sample.logprobs) == len(sample.token_ids)
        assert sample.text == tokenizer.decode([token for token in sample.token_ids if token > 2])
    token = samples[0].token_ids[3]
    params = SamplingParams(max_new_tokens=30, temperature=2.0, seed=1, stop_token_ids=(token,))
    cut = engine.generate([prompt], 40, params)[0][0].token_ids
    assert cut == samples[0].token_ids[: samples[0].token_ids.index(token) + 1]


def test_min_new_tokens_and_repetition_penalty_are_those_of_transformers() -> None:
    model = tiny_model("qwen2")
    prompts = random_prompts()
    expected = [transformers_greedy(model, prompt) for prompt in prompts]
    assert any(len(tokens) < 16 for tokens in expected)
    params = SamplingParams(max_new_tokens=16, temperature=0, min_new_tokens=14)
    expected = [transformers_greedy(model, prompt, min_new_tokens=14) for prompt in prompts]
    assert flat(LocalEngine(model, None).generate(prompts, sampling=params)) == expected
    params = SamplingParams(max_new_tokens=16, temperature=0, repetition_penalty=1.4)
    expected = [transformers_greedy(model, prompt, repetition_penalty=1.4) for prompt in prompts]
    assert flat(LocalEngine(model, None).generate(prompts, sampling=params)) == expected


def test_min_new_tokens_gives_the_end_no_mass_until_then() -> None:
    model = tiny_model("llama")
    prompt = random_prompts((5,))[0]
    params = SamplingParams(max_new_tokens=12, min_new_tokens=12, temperature=2.0, seed=0, model_logprobs=True)
    for sample in LocalEngine(model, None).generate([prompt], 20, params)[0]:
        assert len(sample.token_ids) == 12
        scores_TV = model(input_ids=torch.tensor([prompt + sample.token_ids])).logits[0, 4:-1].detach()
        targets_T1 = torch.tensor(sample.token_ids)[:, None]
        tempered_TV = scores_TV / 2
        tempered_TV[:-1, EOS_ID] = -math.inf
        tempered_TV[-1, EOS_ID] = -math.inf
        expected_T = tempered_TV.log_softmax(-1).gather(-1, targets_T1)[:, 0]
        np.testing.assert_allclose(sample.logprobs, expected_T, atol=1e-4)
        assert sample.model_logprobs is not None
        expected_T = scores_TV.log_softmax(-1).gather(-1, targets_T1)[:, 0]
        np.testing.assert_allclose(sample.model_logprobs, expected_T, atol=1e-4)


def test_positions_bound_prompts_and_completions() -> None:
    engine = LocalEngine(tiny_model("gpt2", eos_token_id=None), None)
    with pytest.warns(UserWarning, match="names an end-of-sequence token"):
        long = engine.generate([[5] * (MAX_POSITIONS - 4), [5]], 1, SamplingParams(max_new_tokens=20, seed=0))
    assert [len(group[0].token_ids) for group in long] == [4, 20]
    assert [group[0].finish_reason for group in long] == ["length", "length"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.generate([[5]], 1, SamplingParams(max_new_tokens=1))
    with pytest.raises(ValueError, match=rf"prompt of {MAX_POSITIONS} tokens .* {MAX_POSITIONS} positions"):
        engine.generate([[5] * MAX_POSITIONS])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.generate([[5]], 0), "num_samples=0 is not allowed"),
        (lambda engine: engine.generate([[5], []]), "prompt 1 has no tokens"),
        (lambda engine: engine.generate(["abc"]), "prompt 0 is the string 'abc'"),
        (lambda engine: engine.generate([[5], [5, -1]]), "prompt 1 has the token -1: the model's tokens are 0 to"),
        (
            lambda engine: engine.generate([[VOCAB_SIZE]]),
            f"prompt 0 has the token {VOCAB_SIZE}: .* to {VOCAB_SIZE - 1}",
        ),
        (lambda engine: engine.generate([[5]], 1, SamplingParams(stop=("x",))), r"stop=\('x',\) needs text"),
        (lambda engine: engine.generate([[5]], 2, seeds=[[1]]), r"seeds has 1 rows of lengths \[1\]"),
        (lambda engine: engine.generate([[5], [6]], 1, seeds=[[1]]), "seeds has 1 rows"),
        (lambda engine: LocalEngine(engine.model, None, max_batch_tokens=0), "max_batch_tokens=0 is not allowed"),
    ],
)
def test_wrong_requests_are_refused(call: Callable[[LocalEngine], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(LocalEngine(tiny_model("llama"), None))


def test_no_prompts_give_no_completions() -> None:
    assert LocalEngine(tiny_model("llama"), None).generate([]) == []


def test_string_prompts_are_tokenised_and_an_empty_one_becomes_the_end_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = LocalEngine(tiny_model("llama"), tokenizer)
    ids = [tokenizer("3+4=")["input_ids"], [EOS_ID]]
    assert flat(engine.generate(["3+4=", ""], 1, GREEDY)) == flat(engine.generate(ids, 1, GREEDY))


def test_tokens_that_a_tokenizer_adds_in_front_stay_and_tokens_at_the_end_go() -> None:
    tokenizer = char_tokenizer()
    plain = tokenizer("3+4=")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", EOS_ID)]
    )
    assert tokenizer("3+4=")["input_ids"] == [2, *plain, EOS_ID]
    engine = LocalEngine(tiny_model("llama"), tokenizer)
    expected = engine.generate([[2, *plain]], 1, GREEDY)
    assert engine.generate(["3+4="], 1, GREEDY) == expected


def test_modes_gradients_and_settings_are_put_back() -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: (parameter, parameter.clone(), parameter.stride()) for name, parameter in model.named_parameters()}
    LocalEngine(model, None).generate([[5, 6]], 2, SamplingParams(max_new_tokens=4))
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        kept, value, stride = weights[name]
        assert parameter is kept
        assert torch.equal(parameter, value)
        assert parameter.stride() == stride
        assert parameter.requires_grad
        assert parameter.grad is None
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_modes_are_put_back_after_an_error() -> None:
    model = tiny_model("llama")
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layout is not to blame
        with pytest.raises(ValueError, match="hold NaN"):
            LocalEngine(model, None).generate([[5, 6]])
    assert all(module.training for module in model.modules())


def test_dropout_in_a_part_that_was_left_training_is_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = transformers_greedy(model, [5, 6, 7])
    model.transformer.h[0].train()
    assert LocalEngine(model, None).generate([[5, 6, 7]], 1, GREEDY)[0][0].token_ids == expected
    assert model.transformer.h[0].training
    assert not model.training


def test_dropout_is_off_while_generating() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = transformers_greedy(model, [5, 6, 7])
    model.train()
    assert LocalEngine(model, None).generate([[5, 6, 7]], 1, GREEDY)[0][0].token_ids == expected


def test_generation_works_under_inference_mode_and_follows_new_weights() -> None:
    model = tiny_model("qwen3")
    engine = LocalEngine(model, None)
    prompts = random_prompts((4, 9))
    with torch.inference_mode():
        assert flat(engine.generate(prompts, 1, GREEDY)) == [transformers_greedy(model, prompt) for prompt in prompts]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    assert flat(engine.generate(prompts, 1, GREEDY)) == [transformers_greedy(model, prompt) for prompt in prompts]


def test_half_precision_logprobs_are_those_of_the_half_precision_model() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    prompt = random_prompts((6,))[0]
    for sample in LocalEngine(model, None).generate([prompt], 4, SamplingParams(max_new_tokens=10, seed=2))[0]:
        logits_TV = model(input_ids=torch.tensor([prompt + sample.token_ids])).logits[0, 5:-1].float().detach()
        expected = logits_TV.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert np.abs(np.array(sample.logprobs) - expected.numpy()).max() < 0.15
        assert np.abs(np.array(sample.logprobs) - expected.numpy()).mean() < 0.05


def test_adapters_take_part() -> None:
    torch.manual_seed(0)
    bare = tiny_model("llama")
    prompts = random_prompts((4, 9))
    before = flat(LocalEngine(bare, None).generate(prompts, 1, GREEDY))
    model = get_peft_model(bare, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    after = flat(LocalEngine(model, None).generate(prompts, 1, GREEDY))
    assert after == [transformers_greedy(model, prompt) for prompt in prompts]
    assert after != before
    with model.disable_adapter():
        assert flat(LocalEngine(model, None).generate(prompts, 1, GREEDY)) == before


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("attention", ["eager", "rlhf_tree"])
def test_the_models_own_attention_function_is_used(arch: str, attention: str) -> None:
    sequences = pytest.importorskip("rlhf_lightning.sequences.tree_attention")
    if attention == "rlhf_tree":
        sequences.register_attention()
    expected = LocalEngine(tiny_model(arch), None).generate(random_prompts(), 1, GREEDY)
    model: PreTrainedModel = tiny_model(arch)
    model.set_attn_implementation(attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flat(LocalEngine(model, None).generate(random_prompts(), 1, GREEDY)) == flat(expected)


@pytest.mark.parametrize("break_it", ["mask", "cache"])
def test_models_that_cannot_share_a_batch_get_the_same_samples_slowly(
    break_it: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts((9, 2, 14, 2, 6))
    params = SamplingParams(
        max_new_tokens=12, temperature=1.3, top_p=0.95, seed=4, repetition_penalty=1.1, min_new_tokens=3
    )
    expected = LocalEngine(tiny_model("qwen3"), None).generate(prompts, 3, params)
    model = tiny_model("qwen3")
    forward = model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if break_it == "cache" and type(cache).__name__ == "SlotCache":
            raise TypeError("not my cache")
        mask = kwargs.get("attention_mask")
        if break_it == "mask" and mask is not None and not bool(mask.all()):
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    broken.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", broken)
    model.generation_config.repetition_penalty = 3.0  # the model's own settings must not leak in
    engine = LocalEngine(model, None, max_batch_tokens=60)
    with pytest.warns(UserWarning, match="generating slowly"):
        slow = engine.generate(prompts, 3, params)
    assert flat(slow) == flat(expected)
    for mine, theirs in zip(slow, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            assert one.finish_reason == other.finish_reason
    assert model.generation_config.repetition_penalty == 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        engine.generate(prompts, 1, params)


FAMILY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB_SIZE,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("arch", "options", "slow"),
    [
        ("bloom", {"n_head": 4}, False),  # position biases made from the mask
        (  # windows and sinks
            "gpt_oss",
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 32,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "sliding_window": 4,
            },
            False,
        ),
        ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, True),  # recurrent
    ],
)
def test_unusual_models_generate_what_transformers_generates(arch: str, options: dict[str, Any], slow: bool) -> None:
    config = AutoConfig.for_model(arch, initializer_range=0.2, **FAMILY, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    prompts = random_prompts((3, 11, 3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert flat(LocalEngine(model, None).generate(prompts, 1, GREEDY)) == [
            transformers_greedy(model, prompt) for prompt in prompts
        ]
    assert any("generating slowly" in str(warning.message) for warning in said) == slow
