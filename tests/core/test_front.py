"""Policies with a frozen compressor compute transformers' own forward after its compressed contexts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf_lightning import DPOModule, GRPOModule, KTOModule, PPOModule, RewardModule, SFTModule, SimPOModule
from rlhf_lightning.callbacks import GenerationAccuracy
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules import ContextDataModule, PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.generation.compress import CompressOptions, compress_rows
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import CompressedContext, ContextCompressor, hidden_states
from rlhf_lightning.sequences import Example, ExampleBatch, Segment, pack

from ..helpers import save_tiny_model
from ..invariance.harness import Batches, trainer
from ..modules.naive import assert_gradient, logits_after, model_after, naive_model, step

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, dict[str, Any]] = {
    "accumulate": {},
    "replace": {"recurrence": "replace", "placement": "end"},
    "query": {"reads_query": True, "condense_every": 2, "segment_length": 4},
}


def make_folder(place: Path, arch: str = "llama", **options: Any) -> str:
    return str(save_tiny_model(place / arch, arch, initializer_range=0.1, **options))


def make_compressor(place: Path, folder: str, **options: Any) -> str:
    """A compressor with an encoder that changes what it reads, as a trained one does."""
    made = ContextCompressor.from_pretrained(folder, **({"ratio": 2, "segment_length": 6, "encoder_rank": 2} | options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.weights.outer.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return str(made.save_pretrained(place))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def compressor(folder: str) -> str:
    return make_compressor(Path(folder).parent / "compressor", folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that computes in fp64 throughout, and a compressor of it."""
    place = tmp_path_factory.mktemp("models")
    folder = make_folder(place, "gpt2")
    return folder, make_compressor(place / "compressor", folder)


def rows(count: int, completions: int = 1) -> list[Example]:
    """Prompts after contexts of one to four segments, some contexts and some prompts equal."""
    rng, found = np.random.default_rng(5), []
    shared = rng.integers(3, 60, 13).tolist()
    for n in range(count):
        context = shared if n % 3 == 1 else rng.integers(3, 60, int(rng.integers(1, 24))).tolist()
        prompt = [7, 8, 9] if n % 2 else rng.integers(3, 60, int(rng.integers(1, 6))).tolist()
        answers = [rng.integers(3, 60, int(rng.integers(1, 8))) for _ in range(completions)]
        children = [Segment(answer, np.ones(len(answer))) for answer in answers]
        found.append(Example(f"rows:{n}", Segment(prompt, children=children), {"context": context}))
    return found


class Naive:
    """Log-probs by transformers' own forward, one sequence at a time, after a compressor's own summaries."""

    def __init__(self, compressor: str, dtype: torch.dtype = torch.float64) -> None:
        self.compressor = ContextCompressor.from_pretrained(compressor, dtype=dtype)

    def context(self, row: Example) -> CompressedContext:
        [found] = self.compressor.compress([row.fields["context"]], [row.root.tokens.tolist()])
        return found

    def logps(self, model: Any, row: Example, number: int = 0) -> Tensor:
        """Log-probs of a completion's tokens."""
        prompt, answer = row.root.tokens.tolist(), row.root.children[number].tokens.tolist()
        context, tokens = self.context(row), [*prompt, *answer]
        log_p = logits_after(model, context, tokens, context.position)
        return torch.stack([log_p[n - 1, tokens[n]] for n in range(len(prompt), len(tokens))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_sft_loss_and_gradient_are_naive_ones(tmp_path: Path, arch: str, kind: str) -> None:
    folder = make_folder(tmp_path, arch)
    compressor = make_compressor(tmp_path / "compressor", folder, **KINDS[kind])
    # The policy has moved, and summaries are still those of the model before.
    policy, examples, naive = naive_model(folder, moved=0.05), rows(6), Naive(compressor)
    module = SFTModule(folder, compressor=compressor, micro_batch_tokens=60, dropout=0.0)
    found = step(module, examples, start=policy)
    logps = torch.cat([naive.logps(policy, row) for row in examples])
    loss = -logps.mean()
    loss.backward()
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    with torch.no_grad():
        scored = module.score_examples(module.validate_batch(ExampleBatch(examples)))
        expected = torch.stack([naive.logps(module.model, row).sum() for row in examples])
    # Of the policy after its step.
    # Norms of Llama round to fp32.
    tolerance = 1e-10 if arch == "gpt2" else 1e-6
    assert float((scored["logps"] - expected).abs().max()) < tolerance
    assert_gradient(found.gradient, policy, tol=tolerance)


def test_dpo_is_naive_and_begins_at_log_2(exact: tuple[str, str]) -> None:
    folder, compressor = exact
    examples, naive, policy = rows(5, 2), Naive(compressor), naive_model(folder, moved=0.05)
    assert step(DPOModule(folder, compressor=compressor), examples).metrics["train/loss"] == pytest.approx(math.log(2))
    found = step(DPOModule(folder, compressor=compressor, beta=0.3), examples, start=policy)
    reference = naive_model(folder)
    margins = []
    for row in examples:
        chosen, rejected = (
            naive.logps(policy, row, n).sum() - naive.logps(reference, row, n).sum().detach() for n in (0, 1)
        )
        margins.append(0.3 * (chosen - rejected))
    loss = torch.nn.functional.softplus(-torch.stack(margins)).mean()
    loss.backward()
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_gradient(found.gradient, policy, tol=1e-10)


def test_simpo_is_naive(exact: tuple[str, str]) -> None:
    folder, compressor = exact
    examples, naive, policy = rows(4, 2), Naive(compressor), naive_model(folder, moved=0.05)
    found = step(SimPOModule(folder, compressor=compressor, beta=2.0, gamma=0.5), examples, start=policy)
    margins = [2.0 * (naive.logps(policy, row).mean() - naive.logps(policy, row, 1).mean()) - 0.5 for row in examples]
    loss = torch.nn.functional.softplus(-torch.stack(margins)).mean()
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)


def test_kto_is_naive(exact: tuple[str, str]) -> None:
    """Partners follow the contexts of their rows."""
    folder, compressor = exact
    examples = [Example(e.row_id, e.root, {**e.fields, "label": n % 3 != 0}) for n, e in enumerate(rows(5, 2))]
    naive, policy, reference = Naive(compressor), naive_model(folder), naive_model(folder)
    # A policy that likes partners, so that the estimate of the divergence is above 0.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.02)
    for _ in range(3):
        sum(-naive.logps(policy, row, 1).sum() for row in examples).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        known = [[naive.logps(reference, row, n).sum() for n in (0, 1)] for row in examples]
        moved = [naive.logps(policy, row, 1).sum() - ref[1] for row, ref in zip(examples, known, strict=True)]
    kl = float(torch.stack(moved).mean())
    assert kl > 0.1
    losses = []
    for row, ref in zip(examples, known, strict=True):
        reward = 0.2 * (naive.logps(policy, row).sum() - ref[0] - kl)
        losses.append(1 - torch.sigmoid(reward if row.fields["label"] else -reward))
    loss = torch.stack(losses).mean()
    loss.backward()
    found = step(KTOModule(folder, compressor=compressor, beta=0.2, micro_batch_tokens=50), examples, start=policy)
    assert found.metrics["train/kl"] == pytest.approx(kl, rel=1e-6)
    assert found.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_gradient(found.gradient, policy, tol=1e-10)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_borrows_partners(folder: str, compressor: str, loss_type: Any) -> None:
    """Rows of one prompt have no partners: from the second batch on they borrow one."""
    made = [
        [Example(f"rows:{n}", Segment([7 + n // 2], children=[Segment([9 + n], [1.0])]), {"context": [5] * (3 + n)})
         for n in (2 * batch, 2 * batch + 1)] for batch in range(3)
    ]  # fmt: skip
    labelled = [[Example(e.row_id, e.root, {**e.fields, "label": n == 0}) for n, e in enumerate(part)] for part in made]
    module = KTOModule(folder, compressor=compressor, loss_type=loss_type)
    run = trainer("32-true", max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, Batches(*map(ExampleBatch, labelled)))
    assert run.global_step == 3
    if loss_type == "kto":
        assert float(run.callback_metrics["train/kl_samples"]) == 2


def letters(completions: Sequence[str]) -> list[float]:
    """Different characters of each."""
    return [float(len(set(text))) for text in completions]


PROMPTS = [{"context": f"a{n}b{n + 1}c{n % 5}d{n}" * (1 + n % 2), "prompt": "?a"} for n in range(6)]
DRAWN: dict[str, Any] = {"rewards": [letters], "num_generations": 3, "max_completion_length": 6}


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("method", [GRPOModule, PPOModule])
def test_rollouts_are_what_is_trained(folder: str, compressor: str, method: Any, lora: Any) -> None:
    """Samples have the log-probs that training computes, and policy and reference agree before the first step."""
    options: dict[str, Any] = {"beta": 0.1} if method is GRPOModule else {"kl_coef": 0.1}
    module = method(folder, compressor=compressor, lora=lora, **options, **DRAWN)
    values: dict[str, Tensor] = {}
    prepare = module.prepare

    def watched(rollouts: Any) -> Any:
        trees, metrics = prepare(rollouts)
        values["sampled"] = torch.tensor([p for sample in rollouts.samples for p in sample.logprobs])
        values["trained"] = module.per_token(
            trees, ["logprobs"], lambda batch: {"logprobs": module.token_stats(batch).logprobs}
        )["logprobs"]
        return trees, metrics

    module.prepare = watched
    run = trainer("32-true", max_steps=1, num_sanity_val_steps=0)
    run.fit(module, PromptDataModule(train=PROMPTS, global_batch_size=6))
    assert float((values["sampled"] - values["trained"]).abs().max()) < 1e-5
    metrics = run.callback_metrics
    assert float(metrics["train/kl"]) == pytest.approx(0, abs=1e-9)
    if method is PPOModule:
        # Of 4 passes, the first one is on policy: the others have moved.
        assert float(metrics["train/policy/ratio"]) == pytest.approx(1, abs=1e-3)
    # The same prompt after other contexts is answered otherwise.
    [[first], [second]] = (
        module.generate([row], [0])[:1] for row in module.validate_batch(ExampleBatch(examples_of(module)[:2]))
    )
    assert first[0].logprobs != second[0].logprobs


@pytest.mark.parametrize("arch", ["gemma2", "mistral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["accumulate", "query"])
def test_windows_count_entries_as_the_engine_does(arch: str, kind: str, tmp_path: Path) -> None:
    """Soft caps, windows that entries leave, and routers whose load entries are no part of."""
    folder = make_folder(tmp_path, arch)
    compressor = make_compressor(tmp_path / "compressor", folder, **KINDS[kind])
    options: dict[str, Any] = {"router_aux_loss_coef": 0.5} if "moe" in arch else {}
    module = GRPOModule(folder, compressor=compressor, beta=0.1, **options, **DRAWN)
    run = trainer("32-true", max_steps=1, num_sanity_val_steps=0)
    run.fit(module, PromptDataModule(train=PROMPTS, global_batch_size=6))
    prompts = module.validate_batch(ExampleBatch(examples_of(module)))
    groups = module.generate(prompts, list(range(6)))
    scored = [
        Example(row.row_id, replace(row.root, children=[Segment(s.token_ids, [1.0] * len(s.token_ids))]), row.fields)
        for row, group in zip(prompts, groups, strict=True)
        for s in group
    ]
    with torch.no_grad():
        found = module.token_stats(pack(scored, share_prefix=False)).logprobs
    sampled = torch.tensor([p for group in groups for s in group for p in s.logprobs])
    assert float((found - sampled).abs().max()) < 1e-4


def test_entries_are_no_load_of_routers(tmp_path: Path) -> None:
    """The load-balancing loss is transformers' own, of the tokens after contexts alone."""
    folder = make_folder(tmp_path, "qwen3_moe")
    compressor = make_compressor(tmp_path / "compressor", folder)
    run, examples = trainer("32-true", max_steps=1, num_sanity_val_steps=0), rows(4)
    run.fit(SFTModule(folder, compressor=compressor, router_aux_loss_coef=0.5), Batches(ExampleBatch(examples)))
    # Experts compute in fp32.
    model, naive = AutoModelForCausalLM.from_pretrained(folder).eval(), Naive(compressor, torch.float32)
    logits: list[list[Tensor]] = [[], []]
    for row in examples:
        tokens, context = [*row.root.tokens.tolist(), *row.root.children[0].tokens.tolist()], naive.context(row)
        with torch.no_grad():
            output = model_after(model.model, context, tokens, context.position, output_router_logits=True)
        for layer, part in zip(logits, output.router_logits, strict=True):
            layer.append(part.float())
    gates = tuple(torch.cat(layer) for layer in logits)
    expected = load_balancing_loss_func(gates, model.config.num_experts, model.config.num_experts_per_tok)
    assert float(run.callback_metrics["train/aux_loss"]) == pytest.approx(float(expected), rel=1e-5)


def examples_of(module: PostTrainingModule) -> list[Example]:
    data = PromptDataModule(train=PROMPTS, tokenizer=module.tokenizer, global_batch_size=6, shuffle=False)
    data.setup("fit")
    return list(next(iter(data.train_dataloader())).examples)


def test_the_policy_alone_is_trained(folder: str, compressor: str) -> None:
    module = SFTModule(folder, compressor=compressor)
    run = trainer("32-true", max_steps=1, num_sanity_val_steps=0)
    run.fit(module, Batches(ExampleBatch(rows(4))))
    assert module.front is not None
    held = module.front.compressor
    assert {name.partition(".")[0] for name in module.state_dict()} == {"model"}
    assert not any(p.requires_grad or p.grad is not None for p in held.parameters())
    before = ContextCompressor.from_pretrained(compressor)
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), before.parameters(), strict=True))
    moved = zip(module.model.parameters(), held.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in moved)


def test_columns_and_contexts_give_the_same_rows(folder: str, compressor: str) -> None:
    """A column of demonstrations, the same of contexts, and pairs."""
    table = [{**row, "completion": f"#{n}", "label": True} for n, row in enumerate(PROMPTS)]
    pairs = [{**row, "chosen": f"#{n}", "rejected": "!"} for n, row in enumerate(PROMPTS)]
    found = []
    for data in (SFTDataModule, ContextDataModule):
        module = SFTModule(folder, compressor=compressor)
        run = trainer(max_steps=1, num_sanity_val_steps=0)
        run.fit(module, data(train=table, global_batch_size=6))
        found.append(float(run.callback_metrics["train/loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    run = trainer(max_steps=1, num_sanity_val_steps=0)
    run.fit(DPOModule(folder, compressor=compressor), PreferenceDataModule(train=pairs, global_batch_size=6))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(math.log(2))
    run = trainer(max_steps=1, num_sanity_val_steps=0)
    run.fit(
        DPOModule(folder, compressor=compressor, reference="precomputed"),
        PreferenceDataModule(train=pairs, global_batch_size=6),
    )
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(math.log(2))


class Stop(lightning.Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            raise KeyError


@pytest.mark.parametrize("method", [SFTModule, GRPOModule])
def test_a_resumed_run_is_the_same(folder: str, compressor: str, method: Any, tmp_path: Path) -> None:
    table = [{**row, "completion": f"#{n}"} for n, row in enumerate(PROMPTS)]
    options: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "compressor": compressor}
    options |= DRAWN | {"beta": 0.1} if method is GRPOModule else {"dropout": 0.1}

    def run(*callbacks: Any, ckpt: str | None = None, **given: Any) -> PostTrainingModule:
        lightning.seed_everything(1)
        module: PostTrainingModule = method(folder, **(options | given))
        data = (PromptDataModule if method is GRPOModule else SFTDataModule)(train=table, global_batch_size=2)
        run = trainer("32-true", max_steps=4, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        run.fit(module, data, ckpt_path=ckpt)
        return module

    whole = run()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(KeyError):
        run(saving, Stop())
    checkpoint = str(tmp_path / "step=2.ckpt")
    again = run(ckpt=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))

    other = make_compressor(tmp_path / "other", folder, seed=5)
    with pytest.raises(ValueError, match="is not the one of the checkpoint: restore it, or start"):
        run(ckpt=checkpoint, compressor=other)
    if method is SFTModule:
        with pytest.raises(ValueError, match="the checkpoint is of a policy with a compressor: set compressor to its"):
            run(ckpt=checkpoint, compressor=None)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_export_goes_with_the_compressor(folder: str, compressor: str, lora: Any, tmp_path: Path) -> None:
    module = SFTModule(folder, compressor=compressor, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer("32-true", max_steps=3, num_sanity_val_steps=0).fit(module, Batches(*[ExampleBatch(rows(6))] * 3))
    module.save_pretrained(str(tmp_path / "model"))
    engine = LocalEngine.from_pretrained(tmp_path / "model", compressor=compressor, device="cpu")
    examples = rows(6)
    prompts = [row.root.tokens.tolist() for row in examples]
    sampling = SamplingParams(max_new_tokens=5, seed=0)
    samples = engine.generate(prompts, 2, sampling, contexts=[row.fields["context"] for row in examples])
    given = [
        Example(
            row.row_id, Segment(row.root.tokens, children=[Segment(s.token_ids, [1.0] * len(s.token_ids))]), row.fields
        )
        for row, group in zip(examples, samples, strict=True)
        for s in group
    ]
    with torch.no_grad():
        batch = pack(module.validate_batch(ExampleBatch(given)), share_prefix=False)
        expected = module.token_stats(batch).logprobs
    found = torch.tensor([p for group in samples for s in group for p in s.logprobs])
    assert float((found - expected).abs().max()) < 1e-5

    # So does the command that compresses.
    file, written = tmp_path / "rows.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    greedy = SamplingParams(max_new_tokens=4, temperature=0.0)
    options = CompressOptions(model=str(tmp_path / "model"), compressor=compressor, input=str(file), sampling=greedy)
    compress_rows(options, written.append)
    answers = engine.generate(["?a"] * 6, 1, greedy, contexts=[row["context"] for row in PROMPTS])
    assert [row["completion"] for row in written] == [group[0].text for group in answers]

    # It can be trained further with the same compressor, and with no other model's.
    again = SFTModule(str(tmp_path / "model"), compressor=compressor)
    again.configure_model()
    strange = make_folder(tmp_path, "llama", seed=7)
    other = make_compressor(tmp_path / "other", strange)
    with pytest.raises(ValueError, match=r"the compressor in .* is of another model \(its weights differ\) than"):
        SFTModule(str(tmp_path / "model"), compressor=other).configure_model()
    with pytest.raises(ValueError, match=r"the compressor in .* is of another model \(its weights differ\)"):
        LocalEngine.from_pretrained(tmp_path / "model", compressor=other, device="cpu")
    with pytest.raises(ValueError, match=r"the compressor in .* is of another model \(its weights differ\)"):
        LocalEngine.from_pretrained(folder, compressor=other, device="cpu")


def differing(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Different characters of each."""
    return [float(len(set(text))) for text in completions]


def test_accuracy_while_training_is_after_contexts(folder: str, compressor: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    verifier = f"{__name__}.differing"
    accuracy = GenerationAccuracy(str(file), verifier, max_new_tokens=6)
    module = SFTModule(folder, compressor=compressor, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    run = trainer("32-true", max_steps=2, num_sanity_val_steps=0, callbacks=[accuracy])
    run.fit(module, Batches(ExampleBatch(rows(4)), ExampleBatch(rows(4))), Batches(ExampleBatch(rows(2))))
    module.save_pretrained(str(tmp_path / "model"))
    engine = LocalEngine.from_pretrained(tmp_path / "model", compressor=compressor, device="cpu")
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0)
    groups = engine.generate(["?a"] * 6, 1, greedy, contexts=[row["context"] for row in PROMPTS])
    expected = sum(differing([], [group[0].text for group in groups])) / 6
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(expected)
    searching = GenerationAccuracy(str(file), verifier, strategy="majority_vote")
    with pytest.raises(ValueError, match="GenerationAccuracy has a strategy, and the module a compressor, whose"):
        searching.measure(run, module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "padded"}, "layout is 'padded', and a policy with a compressor runs packed: use 'auto'"),
        ({"compile": True}, "compile is true, and layers after compressed contexts differ: set compile to false"),
        ({"quantization": "nf4", "lora": {"r": 2}}, "quantization is 'nf4', and a compressor knows whole weights"),
        ({"compressor": "sink_window"}, "compressor is 'sink_window', where no trained compressor is: give the folder"),
    ],
)
def test_bad_options(folder: str, compressor: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTModule(folder, **({"compressor": compressor} | options))


def test_other_errors(folder: str, compressor: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="where no trained compressor is: give the folder that Context"):
        SFTModule(folder, compressor=folder)
    with pytest.raises(ValueError, match="and RewardModule does not learn from compressed contexts: leave it"):
        RewardModule(folder, compressor=compressor)
    with pytest.raises(ValueError, match="compressor is given with searches in tree"):
        GRPOModule(folder, compressor=compressor, tree={"rollouts": "mcts"}, **DRAWN)
    with pytest.raises(ValueError, match=r"value\.model is .* with compressor, whose summaries another model cannot"):
        PPOModule(folder, compressor=compressor, value={"model": folder}, rewards=[letters])
    other = make_folder(tmp_path, "llama", seed=7)
    with pytest.raises(
        ValueError, match=r"the compressor in .* is of another model \(its weights differ\) than .*: train"
    ):
        SFTModule(other, compressor=compressor).configure_model()

    module = SFTModule(folder, compressor=compressor)
    module.configure_model()
    plain = Example("rows:3", Segment([5, 6], children=(Segment([7], [1]),)))
    with pytest.raises(ValueError, match="row rows:3 has no context, and the policy reads compressed ones: give it a"):
        module.validate_batch(ExampleBatch([plain]))
    long = Example("rows:4", plain.root, {"context": [5] * 126})
    with pytest.raises(ValueError, match="row rows:4 has 129 tokens, the model has 128 positions: cut its context"):
        module.validate_batch(ExampleBatch([long]))
    wrong = Example("rows:5", plain.root, {"context": [5, 99]})
    with pytest.raises(ValueError, match="row rows:5 has token 99, the model's vocabulary has"):
        module.validate_batch(ExampleBatch([wrong]))
    batch = pack(module.validate_batch(ExampleBatch(rows(2))))
    with pytest.raises(ValueError, match="the batch follows compressed contexts: run token_stats of a module with"):
        hidden_states(module.model, batch, "packed")
