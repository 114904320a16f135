"""A packed forest equals the model's own unshared forward, sequence by sequence, for every architecture."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.models import hidden_states, load_causal_lm, num_positions, output_head, resolve_layout, token_stats
from rlhf_lightning.models.backbone import check_output_head, decoder_of, fix_rotary_frequencies
from rlhf_lightning.models.rotary import steady_rotary
from rlhf_lightning.modules import RewardModule, SFTModule
from rlhf_lightning.sequences import AttentionKernel, Example, Segment, SequenceBatch, pack, register_attention

from ..helpers import ARCHITECTURES, VOCAB_SIZE, save_tiny_model, tiny_config

# Mixture-of-experts products do not exist in fp64 on the CPU.
DTYPES = {arch: torch.float32 if arch == "qwen3_moe" else torch.float64 for arch in ARCHITECTURES}
# The models' own norms and rotations compute in fp32 whatever the dtype, and eager attention has its softmax in fp32.
TOLERANCE = 2e-6


def forest() -> SequenceBatch:
    """Shared prompts, a search tree three levels deep, a single token, a lone sequence longer than any window."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()

    def leaf(count: int) -> Segment:
        return Segment(tokens(count), [1.0] * count)

    inner = Segment(tokens(6), [1.0] * 6, (leaf(3), leaf(1), Segment(tokens(2), [1, 0], (leaf(7), leaf(4)))))
    deep = Segment(tokens(5), children=(leaf(9), inner))
    pair = Segment(tokens(11), children=(leaf(2), leaf(13)))
    lone = Segment(tokens(17), [0.0] + [1.0] * 16)
    return pack([Example("a", deep), Example("b", pair), Example("c", lone), Example("d", Segment(tokens(1)))])


def naive_logprobs(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """One sequence at a time through the model's own attention and its own logits."""
    found = []
    for number, path in enumerate(batch.path_index.split(batch.lengths.tolist())):
        logits = model(input_ids=batch.input_ids[path][None], use_cache=False).logits[0]
        mine = batch.sequence_index == number
        rows = logits[batch.source_depth[mine]].log_softmax(dim=-1)
        found.append(rows.gather(1, batch.target_ids[mine][:, None])[:, 0])
    return torch.cat(found)


def twins(arch: str, dtype: torch.dtype, kernel: AttentionKernel = "auto") -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with the registered attention and with the model's own eager one."""
    torch.manual_seed(0)
    name = register_attention(kernel)
    mine = AutoModelForCausalLM.from_config(tiny_config(arch), dtype=dtype, attn_implementation=name)
    theirs = AutoModelForCausalLM.from_config(tiny_config(arch), dtype=dtype, attn_implementation="eager")
    theirs.load_state_dict(mine.state_dict())
    return mine.eval(), theirs.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("layout", "kernel"), [("packed", "auto"), ("padded", "auto"), ("packed", "cascade")])
def test_log_probs_and_gradients(arch: str, layout: str, kernel: AttentionKernel) -> None:
    mine, theirs = twins(arch, DTYPES[arch], kernel)
    batch = forest()
    coefficients = torch.randn(len(batch.target_ids), dtype=DTYPES[arch], generator=torch.Generator().manual_seed(1))
    found = token_stats(mine, batch, layout).logprobs  # type: ignore[arg-type]
    expected = naive_logprobs(theirs, batch)
    assert relative(found, expected) < TOLERANCE
    (found * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert p.grad is not None
            assert float((p.grad - q.grad).norm()) <= 20 * TOLERANCE * max(float(q.grad.norm()), 1e-3), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["auto", "cascade"])
def test_every_listed_architecture_packs(arch: str, kernel: AttentionKernel) -> None:
    mine, _ = twins(arch, torch.float32, kernel)
    assert resolve_layout(mine, "auto") == "packed"
    assert resolve_layout(mine, "padded") == "padded"


UNREACHED = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("arch", UNREACHED)
def test_others_fall_back_and_agree(arch: str, tmp_path: object, caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model(arch, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=1, **UNREACHED[arch])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    theirs.save_pretrained(str(tmp_path))
    mine = load_causal_lm(str(tmp_path), dtype=torch.float32, attn_implementation=register_attention())
    with caplog.at_level(logging.WARNING):
        layout = resolve_layout(mine, "auto")
    assert layout == "padded"
    assert "runs in the padded layout" in caplog.text
    with pytest.raises(ValueError, match="cannot run packed"):
        resolve_layout(mine, "packed")
    batch = forest()
    with torch.no_grad():
        assert relative(token_stats(mine.eval(), batch, layout).logprobs, naive_logprobs(theirs, batch)) < 5e-3


def test_without_a_tree_the_attention_is_plain() -> None:
    for arch in ("qwen3", "gemma2", "mistral"):
        mine, theirs = twins(arch, torch.float32)
        ids = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(2))
        mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
        with torch.no_grad():
            found = mine(input_ids=ids, attention_mask=mask).logits[mask == 1]
            expected = theirs(input_ids=ids, attention_mask=mask).logits[mask == 1]
            assert relative(found, expected) < 10 * TOLERANCE


def test_the_head_of_every_architecture_gives_the_models_logits() -> None:
    for arch in ARCHITECTURES:
        _, model = twins(arch, torch.float32)
        ids = torch.randint(0, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            assert relative(output_head(model).logits(hidden), model(input_ids=ids).logits[0]) < TOLERANCE, arch


def test_positions_of_a_model(tmp_path: object) -> None:
    model = load_causal_lm(str(save_tiny_model(str(tmp_path), "gpt2")), dtype=torch.float32)
    assert num_positions(model) == 128


def test_hidden_states_know_their_layout() -> None:
    mine, _ = twins("llama", torch.float32)
    batch = forest()
    with torch.no_grad():
        assert hidden_states(mine, batch, "packed").states.shape == (batch.num_tokens, 32)
        assert hidden_states(mine, batch, "padded").states.shape[0] == batch.num_sequences


def test_rows_that_share_a_completion_get_its_log_probs_and_gradients_each() -> None:
    answers = [Segment([n, n + 1, 5], [1, 0.5, 1]) for n in (7, 9, 11)]
    rows = [
        Example(f"rows:{n}", Segment([1, 2, 3], children=(answers[a], answers[b])))
        for n, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)])
    ]
    found: dict[bool, tuple[Tensor, Tensor]] = {}
    for share in (True, False):
        mine, _ = twins("llama", torch.float64)
        batch = pack(rows, share_prefix=share)
        stats = token_stats(mine, batch, "packed", entropy=True)
        factors = torch.linspace(-1, 2, len(stats.logprobs), dtype=torch.float64)
        ((stats.logprobs + stats.entropy) * factors).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in mine.parameters() if p.grad is not None])
        found[share] = stats.logprobs.detach(), gradient
    assert pack(rows).num_tokens == 12
    for one, other in zip(found[True], found[False], strict=True):
        assert relative(one, other) < 1e-6  # the model's own norms are fp32


# Operations between hidden states and logits.

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, **MAMBA},
    "vaultgemma": {"final_logit_softcapping": 5.0, "head_dim": 8},
    "nanochat": {"final_logit_softcapping": 5.0},
    "xlstm": {"output_logit_soft_cap": 5.0, "num_heads": 4},
}


def scaled(arch: str, **options: Any) -> PreTrainedModel:
    """A small random model of an architecture that multiplies or bends its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **{**SMALL, **SCALED[arch], **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("arch", SCALED)
def test_heads_with_factors_and_caps(arch: str) -> None:
    model = scaled(arch)
    ids = torch.randint(3, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(3))
    kept: list[Tensor] = []
    handle = decoder_of(model).register_forward_hook(lambda module, given, output: kept.append(output[0]))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
        handle.remove()
        head = output_head(model)
        assert head.scale != 1.0 or head.softcap is not None
        assert relative(head.logits(kept[0][0]), expected) < 10 * TOLERANCE
    check_output_head(model)


@pytest.mark.parametrize("change", [lambda logits: 0.5 * logits, lambda logits: 30 * (logits / 30).tanh()])
def test_a_head_that_is_not_known_is_refused(change: Any) -> None:
    model, _ = twins("llama", torch.float32)
    check_output_head(model)
    model.lm_head.register_forward_hook(lambda module, given, output: change(output))
    with pytest.raises(ValueError, match=r"^the logits of LlamaForCausalLM are not its output projection with the .*$"):
        check_output_head(model)
    assert "forward" not in decoder_of(model).__dict__
    fix_rotary_frequencies(model, head=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_half_precision_pass(dtype: torch.dtype) -> None:
    for arch in ("gemma2", "gpt2", "qwen3_moe"):
        check_output_head(twins(arch, dtype)[0])


def test_modules_check_the_heads_that_they_use(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    SFTModule(folder).configure_model()
    monkeypatch.setattr("rlhf_lightning.models.fused_head._logit_scale", lambda config: 2.0)
    with pytest.raises(ValueError, match=r"with the scale 2 and the soft cap None"):
        SFTModule(folder).configure_model()
    RewardModule(folder).configure_model()


# LongRoPE: one of two sets of frequencies.

ORIGINAL = 14
LONG_FACTOR = [1.5, 2.0, 3.0, 4.0]


def longrope(short: list[float], long: list[float], attention: str | None = None) -> PreTrainedModel:
    """A tiny Phi-3 with these factors; equal weights whatever they are."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    rope |= {"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 1.0}
    torch.manual_seed(0)
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
    name = attention or register_attention()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name).eval()


@pytest.mark.parametrize("longest", [128, ORIGINAL + 1])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_sequence_gets_the_same_frequencies(longest: int, layout: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The oracle has no other frequencies than those for long sequences."""
    batch, ones = forest(), [1.0] * 4
    assert batch.lengths.min() <= ORIGINAL < batch.lengths.max()
    mine, theirs = longrope(ones, LONG_FACTOR), longrope(LONG_FACTOR, LONG_FACTOR, "eager")
    with torch.no_grad():
        expected = naive_logprobs(theirs, batch)
        # In transformers it depends on the longest sequence of a batch.
        assert relative(naive_logprobs(longrope(ones, LONG_FACTOR, "eager"), batch), expected) > 1e-3
        with caplog.at_level(logging.WARNING):
            fix_rotary_frequencies(mine, longest=longest)
        assert f"up to {ORIGINAL} tokens" in caplog.text
        assert resolve_layout(mine, layout) == layout
        assert relative(token_stats(mine, batch, layout).logprobs, expected) < 10 * TOLERANCE
        assert relative(naive_logprobs(mine, batch), expected) < 10 * TOLERANCE
    assert num_positions(mine) == 128


@pytest.mark.parametrize("longest", [None, ORIGINAL])
def test_short_sequences_get_the_frequencies_for_them(longest: int | None) -> None:
    mine = longrope([1.0] * 4, LONG_FACTOR)
    theirs = longrope([1.0] * 4, LONG_FACTOR, "eager")
    fix_rotary_frequencies(mine, longest=longest)
    batch = pack([Example("a", Segment([5, 9, 3], children=(Segment([4, 8], [1, 1]), Segment([7, 6, 1], [1, 1, 1]))))])
    with torch.no_grad():
        expected = naive_logprobs(theirs, batch)
        assert relative(token_stats(mine, batch, "packed").logprobs, expected) < 10 * TOLERANCE
    # Longer ones, which would need the others, are refused by whoever asks for the number of positions.
    assert num_positions(mine) == ORIGINAL


def test_frequencies_are_settled_once_and_others_left_alone() -> None:
    mine = longrope([1.0] * 4, LONG_FACTOR)
    steady_rotary(mine, 20)
    settled = mine.model.rotary_emb.inv_freq.clone()
    steady_rotary(mine, 5)
    assert torch.equal(mine.model.rotary_emb.inv_freq, settled)
    factors = torch.tensor(LONG_FACTOR)
    assert torch.allclose(settled, 1 / (factors * 10000.0 ** (torch.arange(4) / 4)), rtol=1e-6)
    llama, _ = twins("llama", torch.float32)
    before = llama.model.rotary_emb.inv_freq.clone()
    fix_rotary_frequencies(llama, longest=10**6)
    assert torch.equal(llama.model.rotary_emb.inv_freq, before)
    assert num_positions(llama) == 128


@pytest.mark.parametrize(("max_length", "long"), [(ORIGINAL, False), (ORIGINAL + 1, True), (None, True)])
def test_the_datamodule_says_how_long_sequences_are(tmp_path: Any, max_length: int | None, long: bool) -> None:
    longrope([1.0] * 4, LONG_FACTOR).save_pretrained(tmp_path)
    module: Any = SFTModule(str(tmp_path))
    module._trainer = SimpleNamespace(precision="32-true", datamodule=SimpleNamespace(max_length=max_length))
    module.configure_model()
    factors = torch.tensor(LONG_FACTOR if long else [1.0] * 4)
    expected = 1 / (factors * 10000.0 ** (torch.arange(4) / 4))
    assert torch.allclose(module.model.model.rotary_emb.inv_freq, expected, rtol=1e-6)
