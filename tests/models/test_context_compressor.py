"""ContextCompressor: segment by segment equals one pass under the dense mask, packed or not, on every architecture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.models import load_causal_lm
from rlhf_lightning.models.backbone import decoder_of, fix_rotary_frequencies, token_stats
from rlhf_lightning.models.compressed_context import context_states
from rlhf_lightning.models.compressor_options import CompressorOptions
from rlhf_lightning.models.compressor_weights import linear_layers
from rlhf_lightning.models.context_compressor import ContextCompressor
from rlhf_lightning.models.loading import _enable_checkpointing
from rlhf_lightning.models.own_attention import set_attention, using_attention
from rlhf_lightning.sequences import Example, Segment, pack, register_attention

from ..helpers import ARCHITECTURES, MAX_POSITIONS, VOCAB_SIZE, char_tokenizer, save_tiny_model, tiny_model

# Mixture-of-experts products do not exist in fp64 on the CPU.
DTYPES = {arch: torch.float32 if arch == "qwen3_moe" else torch.float64 for arch in ARCHITECTURES}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CONTEXT, PROMPT, ANSWER = [*range(5, 27)], [30, 31, 32], [33, 34, 35, 36]


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax over what a dense mask shows; a window holds the last keys among these."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = attention_mask
    if sliding_window is not None:
        rank = visible.cumsum(-1)
        visible = visible & (rank > rank[..., -1:] - sliding_window)
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_oracle", dense_attention)
AttentionMaskInterface.register("dense_oracle", sdpa_mask)


def model_and_compressor(arch: str, **options: Any) -> tuple[PreTrainedModel, ContextCompressor]:
    """A tiny model, and a compressor for it whose encoder differs from it."""
    dtype = DTYPES[arch]
    model = tiny_model(arch, dtype=dtype)
    set_attention(model, register_attention())
    fix_rotary_frequencies(model)
    compressor = ContextCompressor(model, CompressorOptions(**{"ratio": 2, "segment_length": 8, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in compressor.weights.outer.values():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype) * 0.1)
    return model, compressor.eval()


def encoder_of(model: PreTrainedModel, compressor: ContextCompressor) -> PreTrainedModel:
    """A copy of the model with the encoder's changes added to its weights."""
    encoder = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in linear_layers(encoder):
            layer._forward_hooks.clear()
            if name in compressor.weights.inner:
                change = 2.0 * compressor.weights.outer[name] @ compressor.weights.inner[name]
                layer.weight.add_(change.T if isinstance(layer, Conv1D) else change)
    return encoder


def naive_pass(compressor: ContextCompressor, model: PreTrainedModel) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """The whole context in one forward of the encoder under the dense mask: the states of visible summaries."""
    options, slots_weight = compressor.options, compressor.weights.slots
    ids: list[int] = []
    slots: list[int] = []
    number: list[int] = []  # of each token's segment
    replaced: dict[int, int] = {}  # of summaries: the segment whose own replace them
    for n, start in enumerate(range(0, len(CONTEXT), options.segment_length)):
        part = CONTEXT[start : start + options.segment_length]
        ids += PROMPT if options.reads_query else []
        slots += [-2] * (len(ids) - len(slots))
        slot = 0
        for place, token in enumerate(part, start=1):
            ids.append(token)
            slots.append(-1)
            due = place % options.ratio == 0 or place == len(part)
            if options.placement == "interleaved" and due:
                ids.append(0)
                slots.append(slot)
                slot += 1
        while slot < -(-len(part) // options.ratio):
            ids.append(0)
            slots.append(slot)
            slot += 1
        current = number[-1] + 1 if number else 0
        number += [current] * (len(ids) - len(number))
        if options.condense_every and len(part) == options.segment_length and (n + 1) % options.condense_every == 0:
            group = [j for j, other in enumerate(slots) if 0 <= other < options.num_slots and j not in replaced]
            replaced |= dict.fromkeys(group, current + 1)
            for extra in range(len(group) // options.ratio):
                ids.append(0)
                slots.append(options.num_slots + extra)
                number.append(current + 1)

    positions, position = [], -1
    for slot in slots:
        position += slot < 0
        positions.append(position)
    size, earliest = len(ids), 1 if options.recurrence == "replace" else len(ids)
    visible = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(i + 1):
            apart, end = number[i] - number[j], replaced.get(j, size)
            visible[i, j] = apart == 0 or (slots[j] >= 0 and apart <= earliest and number[i] <= end)
    last = number[-1]
    kept = [j for j in range(size) if slots[j] >= 0 and last + 1 - number[j] <= earliest and j not in replaced]

    embeds = model.get_input_embeddings()(torch.tensor(ids))
    embeds = torch.stack([embeds[n] if slot < 0 else slots_weight[slot] for n, slot in enumerate(slots)])
    if options.pooling != "none":
        embeds = torch.stack(
            [state + pooled_by_hand(compressor, embeds, slots, number, n) for n, state in enumerate(embeds)]
        )
    cache = DynamicCache()
    with using_attention(model, "dense_oracle"):
        decoder_of(model)(
            inputs_embeds=embeds[None],
            position_ids=torch.tensor([positions]),
            attention_mask=visible[None, None],
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys[0][:, kept], layer.values[0][:, kept]) for layer in cache.layers], kept  # type: ignore[attr-defined]


def pooled_by_hand(
    compressor: ContextCompressor, embeds: Tensor, slots: list[int], number: list[int], place: int
) -> Tensor:
    """The mean of the tokens that the slot at a place stands for; 0 at a token."""
    slot, ratio = slots[place], compressor.options.ratio
    if slot < 0:
        return torch.zeros_like(embeds[0])
    tokens = [n for n, other in enumerate(slots) if other == -1 and number[n] == number[place]]
    chosen = embeds[tokens[slot * ratio : (slot + 1) * ratio]]
    if not len(chosen):  # stands for summaries
        return torch.zeros_like(embeds[0])
    if compressor.options.pooling == "mean":
        return chosen.mean(0)
    query = compressor.weights.queries[slot]
    return (chosen @ query / len(query) ** 0.5).softmax(0) @ chosen


def naive_answer(model: PreTrainedModel, states: list[tuple[Tensor, Tensor]], position: int) -> Tensor:
    """Log-probs of the answer: prompt and answer in one forward of the decoder after states of a context."""
    tokens = [*PROMPT, *ANSWER]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys[None], values[None], layer)
    before = states[0][0].shape[1] if states else 0
    visible = torch.ones(len(tokens), before + len(tokens), dtype=torch.bool).tril(before)
    with using_attention(model, "dense_oracle"):
        logits = model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.arange(position, position + len(tokens))[None],
            attention_mask=visible[None, None],
            past_key_values=cache,
        ).logits[0]
    rows = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


def asked(compressor: ContextCompressor) -> Example:
    prompt = Segment(PROMPT, children=(Segment(ANSWER, [1.0] * len(ANSWER)),))
    return Example("rows:0", compressor.options.tree(CONTEXT, [prompt], PROMPT))


def tiny_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that no compressor knows."""
    twin = copy.deepcopy(model)
    for _, layer in linear_layers(twin):
        layer._forward_hooks.clear()
    return twin.eval()


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("recurrence", "placement"), [("accumulate", "interleaved"), ("replace", "end"), ("accumulate", "end")]
)
def test_segment_by_segment_is_one_pass_under_the_dense_mask(arch: str, recurrence: str, placement: str) -> None:
    rank = 0 if arch == "qwen3_moe" else 2
    model, compressor = model_and_compressor(arch, recurrence=recurrence, placement=placement, encoder_rank=rank)
    tolerance = TOLERANCE[DTYPES[arch]]
    with torch.no_grad():
        expected, kept = naive_pass(compressor, encoder_of(model, compressor))
        [found] = compressor.compress([CONTEXT])
        assert (found.size, found.position, found.num_tokens) == (len(kept), len(CONTEXT), len(CONTEXT))
        assert found.size == compressor.options.size(len(CONTEXT))
        for mine, theirs in zip(found.states, expected, strict=True):
            assert all(far(a, b) < tolerance for a, b in zip(mine, theirs, strict=True))

        # The packed forest that training runs: the encoder on the context, the decoder on what follows.
        answer = naive_answer(model, expected, len(CONTEXT))
        assert far(compressor.token_stats(pack([asked(compressor)])).logprobs, answer) < tolerance
        others = [Example("rows:1", Segment([3, 4, 5], [0, 1, 1])), asked(compressor)]
        together = compressor.token_stats(pack(others, share_prefix=False)).logprobs
        assert far(together[2:], answer) < tolerance


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("placement", ["interleaved", "end"])
def test_pooled_slots(arch: str, pooling: str, placement: str) -> None:
    model, compressor = model_and_compressor(arch, pooling=pooling, placement=placement, encoder_rank=2)
    queries = compressor.weights.queries
    assert (queries is not None) == (pooling == "attention")
    if queries is not None:
        with torch.no_grad():
            queries.copy_(torch.randn(queries.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    with torch.no_grad():
        expected, _ = naive_pass(compressor, encoder_of(model, compressor))
        [found] = compressor.compress([CONTEXT])
        for mine, theirs in zip(found.states, expected, strict=True):
            assert all(far(a, b) < 1e-10 for a, b in zip(mine, theirs, strict=True))
    stats = compressor.token_stats(pack([asked(compressor)])).logprobs
    assert far(stats.detach(), naive_answer(model, expected, len(CONTEXT)).detach()) < 1e-10
    stats.sum().backward()
    if queries is not None:
        assert queries.grad is not None
        assert (queries.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"condense_every": 1, "placement": "end"},
        {"condense_every": 2, "encoder_rank": 2, "pooling": "attention"},
        {"reads_query": True, "recurrence": "replace"},
        {"reads_query": True, "condense_every": 2, "segment_length": 4, "encoder_rank": 2, "pooling": "mean"},
    ],
)
def test_condensed_summaries_and_prompts_that_are_read(arch: str, options: dict[str, Any]) -> None:
    model, compressor = model_and_compressor(arch, **options)
    with torch.no_grad():
        expected, kept = naive_pass(compressor, encoder_of(model, compressor))
        [found] = compressor.compress([CONTEXT], [PROMPT])
        read = len(PROMPT) * -(-len(CONTEXT) // compressor.options.segment_length) if compressor.reads_query else 0
        assert (found.size, found.position) == (len(kept), len(CONTEXT) + read)
        assert found.size == compressor.options.size(len(CONTEXT))
        for mine, theirs in zip(found.states, expected, strict=True):
            assert all(far(a, b) < 1e-10 for a, b in zip(mine, theirs, strict=True))
        answer = naive_answer(model, expected, found.position)
    logprobs = compressor.token_stats(pack([asked(compressor)])).logprobs
    assert far(logprobs.detach(), answer) < 1e-10
    logprobs.sum().backward()
    slots = compressor.weights.slots.grad
    assert slots is not None
    if arch != "gemma3_text":  # whose windows end before some of the slots
        assert (slots[:-1].norm(dim=1) > 0).all()
    if compressor.reads_query:
        [other] = compressor.compress([CONTEXT], [[3, 4]])
        # The first layer has read nothing yet.
        assert far(other.states[-1][1], found.states[-1][1]) > 1e-6
        with pytest.raises(ValueError, match="reads the prompt that follows each context: give queries, none empty"):
            compressor.compress([CONTEXT])


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_without_slots_it_is_the_plain_model(arch: str) -> None:
    _, compressor = model_and_compressor(arch, encoder_rank=2)
    plain = tiny_model(arch, dtype=DTYPES[arch])
    set_attention(plain, register_attention())
    fix_rotary_frequencies(plain)
    prompt = Segment(PROMPT, children=(Segment(ANSWER, [1.0] * len(ANSWER)),))
    batch = pack([Example("rows:0", prompt), Example("rows:1", Segment(CONTEXT, children=(prompt,)))])
    with torch.no_grad():
        expected = token_stats(plain, batch, "packed").logprobs
        assert torch.equal(compressor.token_stats(batch).logprobs, expected)
        # A whole context in the cache is the whole context in the prompt.
        whole = context_states(plain, CONTEXT)
        assert far(naive_answer(plain, whole.states, whole.position), expected[len(ANSWER) :]) < 1e-10
        assert far(naive_answer(plain, [], 0), expected[: len(ANSWER)]) < 1e-10


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_reach_the_summaries_and_nothing_frozen(rank: int) -> None:
    model, compressor = model_and_compressor("llama", encoder_rank=rank)
    model.requires_grad_(False)
    compressor.token_stats(pack([asked(compressor)])).logprobs.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    slots = compressor.weights.slots.grad
    assert slots is not None
    assert (slots[:-1].norm(dim=1) > 0).all()  # all of a segment's summaries, in both whole segments
    assert slots[-1].norm() == 0  # begins reconstructions, which are off here
    # In the last layer, keys and values are all that later tokens see of a context.
    reached = {name for name, w in compressor.weights.inner.items() if w.grad is not None and w.grad.norm() > 0}
    names = {name for name in compressor.weights.inner if "layers-1" not in name or name.endswith(("k_proj", "v_proj"))}
    assert reached == names
    assert len(names) == (9 if rank else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_pass(checkpointing: bool) -> None:
    model, compressor = model_and_compressor("qwen3", recurrence="replace", encoder_rank=2)
    encoder = encoder_of(model, compressor)
    slots = compressor.weights.slots
    states, _ = naive_pass(compressor, encoder)
    expected = torch.autograd.grad(naive_answer(model, states, len(CONTEXT)).sum(), slots)[0]
    if checkpointing:
        model.train()
        _enable_checkpointing(model)
    total = compressor.token_stats(pack([asked(compressor)])).logprobs.sum()
    # Between the passes, the model is the plain one.
    with torch.no_grad():
        plain = naive_answer(model, [], 0)
        assert far(plain, naive_answer(tiny_twin(model), [], 0)) < 1e-10
    found = torch.autograd.grad(total, slots)[0]
    assert far(found, expected) < 1e-10


# Folders.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def trained(folder: str, **options: Any) -> ContextCompressor:
    compressor = ContextCompressor.from_pretrained(folder, ratio=2, segment_length=8, encoder_rank=2, **options)
    with torch.no_grad():
        for weight in compressor.weights.parameters():
            weight.add_(0.1)
    return compressor


def same(one: ContextCompressor, other: ContextCompressor) -> bool:
    pairs = zip(one.compress([CONTEXT])[0].states, other.compress([CONTEXT])[0].states, strict=True)
    return all(torch.equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def test_no_size_is_read_from_the_device(folder: str) -> None:
    """Which a GPU would have to finish its work for, in every segment."""

    class Operators(TorchDispatchMode):
        seen: frozenset[Any] = frozenset()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen |= {func.overloadpacket}
            return func(*args, **(kwargs or {}))

    compressor = trained(folder)
    with Operators() as operators:
        compressor.compress([CONTEXT])
    assert torch.ops.aten.mm in operators.seen or torch.ops.aten.addmm in operators.seen
    assert torch.ops.aten.nonzero not in operators.seen


def test_saved_and_loaded(folder: str, tmp_path: Path) -> None:
    compressor = trained(folder)
    place = compressor.save_pretrained(tmp_path / "compressor")
    assert not (place / "model.safetensors").exists()  # the model is as it was: the folder refers to it
    again = ContextCompressor.from_pretrained(place)
    assert again.options == CompressorOptions(ratio=2, segment_length=8, encoder_rank=2)
    assert same(again, compressor)
    # Onto a model that is loaded already, and over itself.
    loaded = load_causal_lm(folder, dtype=torch.float32, trainable=False)
    assert same(ContextCompressor.from_pretrained(place, model=loaded), compressor)
    assert compressor.save_pretrained(place) == place

    # A trained model is written with its compressor.
    with torch.no_grad():
        compressor.model.get_input_embeddings().weight.add_(0.5)
    whole = compressor.save_pretrained(tmp_path / "whole")
    assert (whole / "model.safetensors").exists()
    assert same(ContextCompressor.from_pretrained(whole), compressor)


def test_a_policys_adapter_is_off_in_contexts(folder: str, tmp_path: Path) -> None:
    place = trained(folder).save_pretrained(tmp_path / "compressor")
    policy = load_causal_lm(folder, dtype=torch.float32, lora={"r": 2, "init_lora_weights": False})
    assert same(ContextCompressor.from_pretrained(place, model=policy), ContextCompressor.from_pretrained(place))


def test_bad_input(folder: str, tmp_path: Path) -> None:
    place = trained(folder).save_pretrained(tmp_path / "compressor")
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match=r"is of another model \(its weights differ\): use the model that it was"):
        ContextCompressor.from_pretrained(place, model=other)
    with pytest.raises(ValueError, match=r"is of another model \(layers is 3, there 2\)"):
        ContextCompressor.from_pretrained(place, model=tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"ratio is 4, and the compressor in .* was trained with 2: set ratio to that"):
        ContextCompressor.from_pretrained(place, ratio=4)
    with pytest.raises(ValueError, match="ratio 3 does not divide segment_length 8: use segment_length 9"):
        ContextCompressor.from_pretrained(folder, ratio=3, segment_length=8)
    with pytest.raises(TypeError, match="did you mean"):
        ContextCompressor.from_pretrained(folder, ratios=3)
    with pytest.raises(ValueError, match="encoder_rank is -1; it must be a whole number of at least 0"):
        ContextCompressor.from_pretrained(folder, encoder_rank=-1)
    compressor = ContextCompressor.from_pretrained(folder, ratio=4, segment_length=8)
    with pytest.raises(ValueError, match="context 1 has no tokens: leave it out, or give it one"):
        compressor.compress([[3], []])
    with pytest.raises(ValueError, match=f"context 0 has the token {VOCAB_SIZE}: the model's tokens are 0 to"):
        compressor.compress([[VOCAB_SIZE]])
    with pytest.raises(ValueError, match="context 0 of 128 tokens leaves no room in the model's 128 positions"):
        compressor.compress([[3] * MAX_POSITIONS])
    # A context that is shorter than a segment, or than the ratio, is compressed to ceil(n / ratio) entries.
    assert [c.size for c in compressor.compress([[3], [3] * 4, [3] * 5, [3] * 9])] == [1, 1, 2, 3]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="was not written by this package"):
        compressor.save_pretrained(tmp_path / "mine")
    compressor.tokenizer = None
    with pytest.raises(ValueError, match="the compressor has no tokenizer"):
        compressor.save_pretrained(tmp_path / "new")
    compressor.save_pretrained(tmp_path / "new", tokenizer=char_tokenizer())
    (tmp_path / "new" / "compressor.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no compressor\.safetensors: save the compressor again"):
        ContextCompressor.from_pretrained(tmp_path / "new")


def test_a_batch_with_slots_needs_the_compressor() -> None:
    model, compressor = model_and_compressor("llama")
    batch = pack([asked(compressor)])
    with pytest.raises(ValueError, match="the batch has slots, whose embeddings a ContextCompressor has"):
        token_stats(model, batch, "packed")


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM has an attention of its own, which cannot be given"):
        ContextCompressor(model)
