"""Costs of a step of each method, a layer, a chunk of the head and a decoding step on a pretended CUDA device."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_lightning.core.micro_batching import MicroBatching
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import OutputHead, fused_logprobs, gpu_logprob_chunks
from rlhf_lightning.sequences import Example, ExampleBatch

from ..gpu.pretended import OnPretended
from ..gpu.steps import save_model
from ..invariance.harness import Batches
from ..invariance.methods import METHODS
from ..rl.fixed_rollouts import FixedGRPO, FixedPPO, fixed_completions
from .trace import Trace, Tracer, traced_cuda

ROWS = 4  # of a micro-batch


class _Repeated:
    """Completions that do not depend on which repetition a row is."""

    num_generations: int

    def generate(self, prompts: Sequence[Example], seeds: Sequence[int]) -> Any:
        return [fixed_completions(prompt.row_id.partition("@")[0], self.num_generations) for prompt in prompts]


class RepeatedGRPO(_Repeated, FixedGRPO):
    """GRPO on given completions."""


class RepeatedPPO(_Repeated, FixedPPO):
    """PPO on given completions."""


_REPEATED: dict[Any, Any] = {FixedGRPO: RepeatedGRPO, FixedPPO: RepeatedPPO}


def repeated(rows: Callable[[int], list[Example]], times: int) -> list[Example]:
    """The rows of a micro-batch, several times: what one costs does not depend on which it is."""
    found = rows(ROWS)
    return [Example(f"{row.row_id}@{n}", row.root, row.fields) for n in range(times) for row in found]


def _plan(self: Any, examples: Sequence[Example]) -> list[list[int]]:
    return [list(range(first, first + ROWS)) for first in range(0, len(examples), ROWS)]


@cache
def folder(layers: int = 2) -> str:
    """A tiny model with some layers, and values that bf16 holds."""
    place = tempfile.mkdtemp(prefix="budgets-")
    save_model(Path(place), initializer_range=0.05, num_hidden_layers=layers)
    AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(place)
    return place


@cache
def num_weights(layers: int = 2) -> int:
    """The number of weights in linear layers of that model."""
    model = AutoModelForCausalLM.from_pretrained(folder(layers))
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


class _Watch(lightning.Callback):
    """Keeps the trace of each step, from its first hook to its last."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.found: list[Trace] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.tracer.take()

    def on_train_batch_end(self, *args: Any) -> None:
        self.found.append(self.tracer.take())


class Cost(NamedTuple):
    """Counts the cost of each micro-batch, and of a step besides them."""

    micro_batch: Trace
    step: Trace


@contextmanager
def _quiet_cuda() -> Iterator[Tracer]:
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with traced_cuda() as tracer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tracer


def _trainer(watch: _Watch, precision: str, **options: Any) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    given: dict[str, Any] = {"precision": precision, "num_sanity_val_steps": 0, **quiet, **options}
    return lightning.Trainer(strategy=OnPretended(), callbacks=[watch], **given)


@cache
def costs(
    name: str, precision: str = "bf16-mixed", layers: int = 2, layout: str = "auto", lora: bool = False, **more: Any
) -> Cost:
    """Measures a method: the steps after the first, of two and of three equal micro-batches.

    Args:
        name: of ``tests.invariance.methods``.
        precision: of the trainer.
        layers: of the model.
        layout: of the module.
        lora: whether adapters of all layers are trained.
        more: options of the module.
    """
    method = METHODS[name]
    options = {key: value for key, value in method.options.items() if key != "optimizer"} | more
    if lora:
        options["lora"] = {"r": 2}
    made: Any = _REPEATED.get(method.module, method.module)
    with _quiet_cuda() as tracer, patch.object(MicroBatching, "plan", _plan):
        watch = _Watch(tracer)
        module = made(folder(layers), **options, layout=layout)
        parts = options.get("num_mini_batches", 1)  # optimizer steps on a share of the rows each
        batches = (ExampleBatch(repeated(method.rows, times * parts)) for times in (2, 2, 3))
        _trainer(watch, precision, max_epochs=1).fit(module, Batches(*batches))
    _, two, three = watch.found
    micro_batch = three - two
    return Cost(micro_batch, two - micro_batch - micro_batch)


class _Epochs(_Watch):
    """Keeps the trace of each validation."""

    def on_validation_start(self, *args: Any) -> None:
        self.tracer.take()

    def on_validation_end(self, *args: Any) -> None:
        self.found.append(self.tracer.take())


@cache
def validation(name: str) -> Cost:
    """Measures a validation: what each batch costs, and what the set costs besides them."""
    with _quiet_cuda() as tracer:
        method, watch = METHODS[name], _Epochs(tracer)
        batches = [ExampleBatch(row) for row in (repeated(method.rows, 1),) * 4]
        trainer = _trainer(watch, "bf16-mixed")
        module = method.module(folder(), **method.options)
        for count in (2, 3, 4):
            trainer.validate(module, Batches(*batches[:count]), verbose=False)
    _, three, four = watch.found
    return Cost(four - three, three - (four - three) - (four - three) - (four - three))


def layer(name: str, precision: str = "bf16-true") -> Trace:
    """Counts the cost of a layer in a micro-batch of a method, forwards and backward."""
    return costs(name, precision, 2).micro_batch - costs(name, precision, 1).micro_batch


@cache
def own_layer(precision: str = "bf16-true", *, backward: bool = True) -> Trace:
    """Counts the cost of a layer in the model's own padded forward, and in the backward of another pass of a step."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    found = []
    for layers in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(folder(layers), dtype=dtype, attn_implementation="sdpa").train()
        mask = (torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]).long()
        with traced_cuda() as tracer:
            decoder = model.to("cuda").get_decoder()
            given = {"input_ids": mask.to("cuda"), "attention_mask": mask.to("cuda")}
            mixed = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)
            for _ in range(2):
                tracer.take()
                with mixed, torch.set_grad_enabled(backward):
                    output = decoder(**given, use_cache=False).last_hidden_state
                if backward:
                    output.float().sum().backward()
            found.append(tracer.take())
    return found[1] - found[0]


@cache
def head_chunk(**asked: bool) -> Trace:
    """Counts the cost of a chunk of rows in the head, forward and backward."""
    rows, vocabulary, size = 8, 64, 16
    found = []
    for chunks in (2, 3):
        with traced_cuda() as tracer, patch.object(gpu_logprob_chunks, "CHUNK_BYTES", rows * vocabulary * 4):
            draw = torch.Generator().manual_seed(0)
            shapes = ((chunks * rows, size), (vocabulary, size))
            hidden, weight = (torch.randn(shape, generator=draw).bfloat16().to("cuda") for shape in shapes)
            hidden.requires_grad_()
            weight.requires_grad_()
            targets = torch.arange(chunks * rows).to("cuda")
            tracer.take()
            stats = fused_logprobs(hidden, OutputHead(weight), targets, **asked)
            parts = (stats.logprobs, stats.entropy) if asked.get("entropy") else (stats.logprobs,)
            torch.stack(parts).sum().backward()
            found.append(tracer.take())
    return found[1] - found[0]


def _decoded(model: Any, cache: Any, prompts: list[list[int]], params: SamplingParams, *, mixed: bool = False) -> Trace:
    """Counts the cost of a call whose samples end at their limit alone; the call before it began with probes."""
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with warnings.catch_warnings(), traced_cuda() as tracer:
        warnings.simplefilter("ignore")  # no token ends these samples
        engine = LocalEngine(model.to("cuda"), None, cache=cache)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed, cache_enabled=False):
            for seed in range(2):
                tracer.take()
                # Pages of the call before are not found again.
                engine.generate([[seed + 3, *prompt] for prompt in prompts], 4 // len(prompts), params)
        return tracer.take()


@cache
def decoding_step(layers: int = 2, precision: str = "bf16-true", top_p: float = 1.0) -> Trace:
    """Counts the cost of one more token of four rows, drawn too; no row begins or ends."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    found = []
    for length in (12, 16):
        model = AutoModelForCausalLM.from_pretrained(folder(layers), dtype=dtype)
        params = SamplingParams(max_new_tokens=length, seed=0, top_p=top_p)
        found.append(_decoded(model, "dynamic", [[5, 6]], params, mixed=precision == "bf16-mixed"))
    return (found[1] - found[0]) / 4


def decoding_layer(precision: str = "bf16-true") -> Trace:
    """Counts the cost of a layer in a decoding step."""
    return decoding_step(2, precision) - decoding_step(1, precision)


class Decoding(NamedTuple):
    """Counts the cost of a token of four rows of two lengths with a cache, and shapes that later steps do not share."""

    token: Trace
    new_shapes: set[str]


@cache
def decoding_with(kind: str) -> Decoding:
    """Measures 16 tokens after the first 17: as many as a page has, and twice as many as are drawn blindly."""
    found = []
    for length in (17, 33):
        model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16)
        params = SamplingParams(max_new_tokens=length, seed=0)
        found.append(_decoded(model, kind, [[5, 6], [7, 8, 9, 10]], params))
    shorter, longer = found
    return Decoding((longer - shorter) / 16, set(longer.shapes) - set(shorter.shapes))
