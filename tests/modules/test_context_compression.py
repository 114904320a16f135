"""ContextCompressionModule against a naive computation: transformers' own forward after compressed contexts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from rlhf_lightning import ContextCompressionModule, SFTModule
from rlhf_lightning.datamodules import ContextDataModule, SFTDataModule
from rlhf_lightning.losses.context_compression import full_context_kl
from rlhf_lightning.models import CompressorOptions, ContextCompressor
from rlhf_lightning.sequences import Example, ExampleBatch, Segment

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..invariance.methods import contexts
from .naive import logits_after, naive_model

SMALL: dict[str, Any] = {"ratio": 2, "segment_length": 6, "encoder_rank": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def naive_losses(compressor: ContextCompressor, model: Any, rows: list[Example]) -> tuple[float, float, float]:
    """Means of the answers' loss, of the divergence, and of the contexts' loss, by loops over rows and tokens."""
    nll = kl = weight = rebuilt = count = 0.0
    for row in rows:
        context = row.root.tokens.tolist()
        [compressed] = compressor.compress([context])
        for prompt in row.root.children:
            answer = prompt.children[0]
            tokens = [*prompt.tokens.tolist(), *answer.tokens.tolist()]
            short = logits_after(model, compressed, tokens, len(context))
            whole = logits_after(model, None, [*context, *tokens], 0)
            assert answer.weights is not None
            for n, w in enumerate(answer.weights.tolist()):
                place = len(prompt.tokens) + n
                nll -= w * float(short[place - 1, tokens[place]])
                p, q = short[place - 1], whole[len(context) + place - 1]
                kl += w * float((q.exp() * (q - p)).sum())
                weight += w
        begins = compressor.weights.slots[-1]
        again = logits_after(model, compressed, context, len(context), begins)
        for n, token in enumerate(context):
            rebuilt -= float(again[n, token])
            count += 1
    return nll / weight, kl / weight, rebuilt / count


@pytest.mark.parametrize("recurrence", ["accumulate", "replace"])
def test_losses_and_gradients_are_naive_ones(folder: str, recurrence: Any) -> None:
    rows = contexts(5)
    options = SMALL | {"recurrence": recurrence, "kl_coef": 0.7, "continuation_coef": 0.4, "autoencoding_coef": 0.2}
    module = ContextCompressionModule(folder, max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=1.0), **options)
    run, seen = trainer(max_steps=1, num_sanity_val_steps=0), {}

    class Move(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # Changes of the encoder begin at zero, where their other half has no gradient.
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for outer in pl_module.weights.outer.values():
                    outer.add_(torch.randn(outer.shape, generator=generator, dtype=torch.float64) * 0.1)
            seen.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    run.callbacks.append(Move())
    run.fit(module, Batches(ExampleBatch(rows)))
    gradient = {name: seen[name] - p.detach() for name, p in module.named_parameters()}
    assert all(float(g.norm()) == 0 for name, g in gradient.items() if name.startswith("model."))
    # In the last layer, keys and values are all that later tokens see of a context.
    unseen = ("h-1-attn-c_proj", "h-1-mlp-c_fc", "h-1-mlp-c_proj")
    for name, value in gradient.items():
        if name.startswith("weights."):
            assert (float(value.norm()) > 0) == (not name.endswith(unseen)), name

    # The same weights on another model of the folder.
    model = naive_model(folder)
    compressor = ContextCompressor(
        model, CompressorOptions(ratio=2, segment_length=6, recurrence=recurrence, encoder_rank=2)
    )
    start = {name.removeprefix("weights."): value for name, value in seen.items() if name.startswith("weights.")}
    compressor.weights.to(torch.float64).load_state_dict(start)

    def total() -> float:
        with torch.no_grad():
            nll, kl, rebuilt = naive_losses(compressor, model, rows)
        return 0.4 * nll + 0.7 * kl + 0.2 * rebuilt

    with torch.no_grad():
        nll, kl, rebuilt = naive_losses(compressor, model, rows)
    logged = run.callback_metrics
    assert logged["train/nll"] == pytest.approx(nll, rel=1e-6)
    assert logged["train/full_context_kl"] == pytest.approx(kl, rel=1e-6)
    assert logged["train/autoencoding_nll"] == pytest.approx(rebuilt, rel=1e-6)
    assert logged["train/loss"] == pytest.approx(0.4 * nll + 0.7 * kl + 0.2 * rebuilt, rel=1e-6)
    tokens = sum(len(row.root.tokens) for row in rows)
    slots = sum(compressor.options.size(len(row.root.tokens)) for row in rows)
    assert logged["train/compression_ratio"] == pytest.approx(tokens / slots)

    # The slope along the gradient, by a central difference.
    length = sum(float(g.square().sum()) for g in gradient.values())
    values, step = [], 1e-5 / length**0.5
    for sign in (1, -1):
        moved = {name: value + sign * step * gradient[f"weights.{name}"] for name, value in start.items()}
        compressor.weights.load_state_dict(moved)
        values.append(total())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=1e-6)


def test_a_trained_decoder_diverges_from_the_initial_one(folder: str) -> None:
    rows = contexts(4)
    module = ContextCompressionModule(
        folder, train_decoder=True, kl_coef=1.0, **SMALL, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    run = trainer(max_steps=2, num_sanity_val_steps=0)
    run.fit(module, Batches(ExampleBatch(rows), ExampleBatch(rows)))
    [reference] = module.references
    initial = naive_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(reference.model.parameters(), initial.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(module.model.parameters(), initial.parameters(), strict=True))


def test_the_divergence() -> None:
    logits, full = (
        torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64),
        torch.tensor([[2.0, 0.0, 0.5]], dtype=torch.float64),
    )
    p, q = logits[0].exp() / logits[0].exp().sum(), full[0].exp() / full[0].exp().sum()
    by_hand = sum(float(b * (b / a).log()) for a, b in zip(p, q, strict=True))
    assert float(full_context_kl(logits, full_logits_NV=full)) == pytest.approx(by_hand, rel=1e-12)
    assert float(full_context_kl(full, full_logits_NV=full)) == pytest.approx(0.0, abs=1e-15)
    # Its gradient is p - q, and the whole context's scores have none.
    logits.requires_grad_()
    full.requires_grad_()
    full_context_kl(logits, full_logits_NV=full).sum().backward()
    assert torch.allclose(logits.grad, (p - q)[None], atol=1e-12)
    assert full.grad is None
    with pytest.raises(ValueError, match=r"full_logits_NV \(1, 2\)"):
        full_context_kl(logits, full_logits_NV=full[:, :2])


ROWS = [{"context": f"a{n}b{n + 1}c{n % 5}d{n}", "prompt": "?a", "completion": f"#{n}"} for n in range(6)]


def test_export_and_further_training(folder: str, tmp_path: Path) -> None:
    data = ContextDataModule(train=ROWS, val=ROWS, global_batch_size=3)
    module = ContextCompressionModule(folder, **SMALL, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer("32-true", max_epochs=2).fit(module, data)
    module.check_export(str(tmp_path / "compressor"))
    module.save_pretrained(str(tmp_path / "compressor"))
    module.check_export(str(tmp_path / "compressor"))
    loaded = ContextCompressor.from_pretrained(tmp_path / "compressor")
    context = list(range(5, 25))
    expected, found = (c.compress([context])[0].states for c in (module.compressor, loaded))
    assert all(
        torch.equal(a, b)
        for mine, theirs in zip(expected, found, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )

    # A folder's compressor is trained further: before the first step, its loss is that of the run that wrote it.
    again = ContextCompressionModule(str(tmp_path / "compressor"), **SMALL)
    before = trainer("32-true").validate(module, ContextDataModule(val=ROWS, global_batch_size=3), verbose=False)[0]
    after = trainer("32-true").validate(again, ContextDataModule(val=ROWS, global_batch_size=3), verbose=False)[0]
    assert after == before
    other = ContextCompressionModule(str(tmp_path / "compressor"), **(SMALL | {"segment_length": 8}))
    with pytest.raises(ValueError, match=r"segment_length is 8, and the compressor in .* was trained with 6: set"):
        other.configure_model()

    # With a trained decoder, the folder holds it.
    whole = ContextCompressionModule(folder, **SMALL, train_decoder=True, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer("32-true", max_epochs=1).fit(whole, data)
    with pytest.raises(ValueError, match="holds a compressor, and this run writes a model with a head"):
        whole.check_export(str(tmp_path / "compressor"))
    whole.save_pretrained(str(tmp_path / "whole"))
    loaded = ContextCompressor.from_pretrained(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_the_whole_context_is_for_sft(folder: str) -> None:
    data = ContextDataModule(train=ROWS, tokenizer=folder, global_batch_size=6, shuffle=False)
    data.setup("fit")
    [batch] = list(data.train_dataloader())
    example = batch.examples[1]
    text = data.tokenizer.decode(example.root.tokens)
    assert (text, example.fields["context"]) == ("a1b2c1d1", "a1b2c1d1")
    [prompt] = example.root.children
    assert data.tokenizer.decode(prompt.tokens) == "?a"
    joined = [{"prompt": row["context"] + row["prompt"], "completion": row["completion"]} for row in ROWS]
    losses = []
    for rows in (data, SFTDataModule(train=joined, tokenizer=folder, global_batch_size=6, shuffle=False)):
        run = trainer(max_steps=1)
        run.fit(SFTModule(folder), rows)
        losses.append(float(run.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 3, "segment_length": 8}, "ratio 3 does not divide segment_length 8: use segment_length 9"),
        ({"kl_coef": -1.0}, r"kl_coef is -1\.0; it must be at least 0"),
        ({"continuation_coef": 0.0}, "are all 0, so nothing is learnt: set continuation_coef to 1.0"),
        ({"lora": {"r": 2}}, "lora and quantization are options of a policy: set encoder_rank"),
        ({"layout": "padded"}, "layout is 'padded', and contexts are compressed in packed forests: use 'auto'"),
    ],
)
def test_bad_options(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextCompressionModule(folder, **options)


def test_bad_rows(folder: str) -> None:
    module = ContextCompressionModule(folder, autoencoding_coef=1.0, **SMALL)
    module.configure_model()
    plain = Example("rows:3", Segment([5, 6], children=(Segment([7], [1]),)))
    with pytest.raises(ValueError, match="row rows:3 has no context to compress: give it the column context"):
        module.validate_batch(ExampleBatch([plain]))
    long = Example("rows:4", Segment([5] * 70, children=(Segment([7], [0], (Segment([8], [1]),)),)), {"context": ""})
    with pytest.raises(
        ValueError, match="row rows:4 has a context of 70 tokens, and to reconstruct it the model needs 140"
    ):
        module.validate_batch(ExampleBatch([long]))
    reading = ContextCompressionModule(folder, reads_query=True, **SMALL)
    reading.configure_model()
    prompts = [Segment([7] * 9, [0] * 9, (Segment([8], [1]),)) for _ in range(2)]
    with pytest.raises(ValueError, match="row rows:5 has 2 prompts after its context, and reads_query reads one"):
        reading.validate_batch(ExampleBatch([Example("rows:5", Segment([5], children=prompts), {"context": ""})]))
    with pytest.raises(ValueError, match="row rows:6 needs 158 positions with its prompt in every segment, and the"):
        reading.validate_batch(
            ExampleBatch([Example("rows:6", Segment([5] * 58, children=prompts[:1]), {"context": ""})])
        )
    with pytest.raises(ValueError, match="does not take the rows of SFTDataModule: use ContextDataModule"):
        module.validate_batch(ExampleBatch([plain], contract="SFTDataModule"))
    with pytest.raises(ValueError, match=r"no column 'context' \(found: prompt, completion\)"):
        ContextDataModule(tokenizer=folder).make_examples("rows:0", {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="'context' is list"):
        ContextDataModule(tokenizer=folder).make_examples("rows:0", {"context": [1], "prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="on_too_long"):
        ContextDataModule(tokenizer=folder, on_too_long="truncate_start")
