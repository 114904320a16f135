"""Naive oracles for tests of modules: transformers' own forward, one unshared sequence at a time, and autograd."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.sequences import Example, ExampleBatch

from ..invariance.harness import Batches, trainer


def naive_model(folder: str, *, moved: float = 0.0) -> Any:
    """The model of a folder in fp64, its weights moved a little if asked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def sequences(example: Example) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each sequence."""
    return [
        ([int(t) for t in path[0].tokens], [int(t) for segment in path[1:] for t in segment.tokens])
        for path in example.root.paths()
    ]


def logps(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Sum of the log-probs of a completion, by a loop over tokens of the full softmax."""
    tokens = torch.tensor([*prompt, *completion])
    log_p = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
    return torch.stack([log_p[i - 1, tokens[i]] for i in range(len(prompt), len(tokens))]).sum()


def states(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Hidden states of a sequence after the final norm, (tokens, hidden size)."""
    return model.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]


def model_after(
    model: Any, context: Any, tokens: list[int], position: int, first: Tensor | None = None, **asked: Any
) -> Any:
    """Computes a sequence after entries of a cache, or from an empty one."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate([] if context is None else context.states):
        cache.update(keys[None], values[None], layer)
    before = 0 if context is None else context.size
    embeds = model.get_input_embeddings()(torch.tensor(tokens))
    if first is not None:
        embeds = torch.cat([first[None], embeds])
    mask = torch.zeros(len(embeds), before + len(embeds), dtype=embeds.dtype)
    mask = mask.masked_fill(~torch.ones_like(mask, dtype=torch.bool).tril(before), -torch.inf)
    start = position - (first is not None)
    positions = torch.arange(start, start + len(embeds))[None]
    return model(
        inputs_embeds=embeds[None],
        position_ids=positions,
        attention_mask=mask[None, None],
        past_key_values=cache,
        **asked,
    )


def logits_after(model: Any, context: Any, tokens: list[int], position: int, first: Tensor | None = None) -> Tensor:
    """Log-softmax of all tokens at each place of a sequence after entries of a cache, or after none."""
    logits: Tensor = model_after(model, context, tokens, position, first).logits
    return logits[0].log_softmax(-1)


class Step(NamedTuple):
    """The gradient of one optimizer step (SGD, learning rate 1), and what was logged."""

    gradient: dict[str, Tensor]
    metrics: dict[str, float]


def step(module: PostTrainingModule, examples: list[Example], start: nn.Module | None = None) -> Step:
    """Runs one step of a module on one global batch, in fp64, from the weights of ``start``."""
    module.max_grad_norm, module._optimizer = None, partial(torch.optim.SGD, lr=1.0)
    run, before = trainer(max_steps=1, num_sanity_val_steps=0), {}

    class Move(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if start is not None:
                pl_module.model.load_state_dict(start.state_dict(), strict=False)
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    run.callbacks.append(Move())
    run.fit(module, Batches(ExampleBatch(examples)))
    gradient = {name: before[name] - p.detach() for name, p in module.named_parameters()}
    return Step(gradient, {name: float(value) for name, value in run.callback_metrics.items()})


def assert_gradient(found: dict[str, Tensor], expected: nn.Module, prefix: str = "model.", tol: float = 1e-10) -> None:
    """Compares a step's gradient with that in ``.grad``, in norm per tensor."""
    own = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    grads = {name: p.grad for name, p in expected.named_parameters()}
    assert own.keys() == grads.keys()
    largest = max(float(grad.norm()) for grad in grads.values() if grad is not None)
    assert largest > 1e-4, "the gradient is zero: the comparison would be empty"
    for name, grad in grads.items():
        reference = torch.zeros_like(own[name]) if grad is None else grad
        error = float((own[name] - reference).norm() / max(float(reference.norm()), 1e-4 * largest))
        assert error < tol, f"{name}: {error:.1e}"
