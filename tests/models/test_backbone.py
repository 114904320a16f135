"""A packed forest equals the model's own unshared forward, sequence by sequence, for every architecture."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.models import hidden_states, load_causal_lm, num_positions, output_head, resolve_layout, token_stats
from rlhf_lightning.sequences import Example, Segment, SequenceBatch, pack, register_attention

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


def twins(arch: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with the registered attention and with the model's own eager one."""
    torch.manual_seed(0)
    mine = AutoModelForCausalLM.from_config(tiny_config(arch), dtype=dtype, attn_implementation=register_attention())
    theirs = AutoModelForCausalLM.from_config(tiny_config(arch), dtype=dtype, attn_implementation="eager")
    theirs.load_state_dict(mine.state_dict())
    return mine.eval(), theirs.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_log_probs_and_gradients(arch: str, layout: str) -> None:
    mine, theirs = twins(arch, DTYPES[arch])
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
def test_every_listed_architecture_packs(arch: str) -> None:
    mine, _ = twins(arch, torch.float32)
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
