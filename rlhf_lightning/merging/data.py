"""Measures models on rows of data: Fisher information of their weights, and inner products of their layers' inputs.

Legend: L tokens of a row, V vocabulary, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..data.sources import Source as TableSource
from ..datamodules import SFTDataModule
from ..inference.sampling import derive_seed
from ..models import num_positions
from ..models.backbone import check_lengths
from ..models.loading import load_adapted_lm, load_causal_lm, load_tokenizer
from ..models.saving import save_pretrained
from ..utils.validation import check_count
from .methods import Fisher
from .methods.base import Activations, Method
from .sources import Source


@dataclass(frozen=True)
class Statistics:
    """Measurements of all models of a merge.

    Args:
        fisher: of every model, by name of the tensor.
        activations: of every linear layer, by name of its weight.
    """

    fisher: list[dict[str, Tensor]] | None = None
    activations: dict[str, Activations] | None = None


def measure(method: Method, sources: Sequence[Source], rows: str | None, num_rows: int, seed: int) -> Statistics:
    """Measures the models of a merge on rows of data, one model after the other.

    Args:
        method: ``Fisher`` or ``RegMean``.
        sources: the models.
        rows: a source of rows, as ``SFTDataModule`` reads them.
        num_rows: how many, from the first.
        seed: of samples.

    Raises:
        ValueError: the source has no rows, or a model does not load.
    """
    check_count("num_rows", num_rows, "256 is usual")
    tokenizer = load_tokenizer(sources[0].tokenizer_folder)
    sequences = list(islice(row_tokens(tokenizer, str(rows)), num_rows))
    if not sequences:
        raise ValueError(f"rows {rows!r} has no row to measure the models on")
    fisher, products = [], []
    for source in sources:
        model = _whole_model(source, tokenizer)
        # A weight that is not found by its name would be merged as if it had not been measured.
        if isinstance(method, Fisher):
            fisher.append(estimate_fisher(model, sequences, seed=seed))
            merged = [name for name, tensor in source.tensors.items() if tensor.dtype.is_floating_point]
            _check_names(source, merged, fisher[-1])
        else:
            products.append(estimate_products(model, sequences))
            _check_names(source, products[-1], source.tensors)
    if fisher:
        return Statistics(fisher=fisher)
    first, *others = products
    # A head that is tied in one of the models is measured in none.
    names = [name for name in first if all(name in other for other in others)]
    return Statistics(
        activations={
            name: Activations([each[name].products[0] for each in products], first[name].transposed) for name in names
        }
    )


def _whole_model(source: Source, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Loads a model in fp32; an adapter as one model with its base, whose weights have the names of the merge."""
    if not source.adapter:
        return load_causal_lm(source.folder, dtype=torch.float32, trainable=False)
    adapted = load_adapted_lm(source.root, source.folder, dtype=torch.float32)
    with TemporaryDirectory() as scratch:
        place = save_pretrained(adapted, tokenizer, Path(scratch) / "whole", merge_adapter=True)
        return load_causal_lm(place, dtype=torch.float32, trainable=False)


def _check_names(source: Source, wanted: Iterable[str], known: Container[str]) -> None:
    """Refuses models whose weights have other names in memory than in their files."""
    if odd := [name for name in wanted if name not in known]:
        raise ValueError(
            f"{len(odd)} tensors of {str(source.folder)!r} have other names in its files than when it is loaded, such "
            f"as {odd[0]!r}, so that what is measured has no place: merge it by a method that needs no rows"
        )


def row_tokens(tokenizer: PreTrainedTokenizerBase, rows: TableSource) -> Iterator[list[int]]:
    """Yields the tokens of each row, prompts with their completions as one sequence.

    A conversation is a sequence for each of its paths: several where contexts of turns do not extend each other,
    as under a template that drops reasoning.

    Args:
        tokenizer: the model's.
        rows: a source of rows, as ``SFTDataModule`` reads them.
    """
    data = SFTDataModule(val=rows, tokenizer=tokenizer, eval_batch_size=1)
    data.setup("validate")
    for batch in data.val_dataloader():
        for example in batch.examples:
            for path in example.root.paths():
                yield [token for segment in path for token in segment.tokens.tolist()]


def estimate_fisher(model: nn.Module, sequences: Sequence[Sequence[int]], *, seed: int = 0) -> dict[str, Tensor]:
    r"""Estimates the diagonal Fisher information of a language model's weights.

    In every context :math:`x_{<t}` of the rows one token is drawn from the model itself,
    :math:`y_t \sim p(\cdot|x_{<t})`, and each row's gradient of :math:`\sum_t \log p(y_t|x_{<t})` is squared. As the
    draws are independent and each gradient has mean 0, its expectation is
    :math:`\sum_t \mathbb{E}_{y \sim p} [(\nabla \log p(y|x_{<t}))^2]`. (With the rows' own tokens instead of drawn ones
    it would be the empirical Fisher information, another quantity.)

    Args:
        model: a causal language model of transformers.
        sequences: tokens of rows, at least two each.
        seed: of the draws.

    Returns:
        The mean over all contexts, by name of each parameter; shared parameters under all their names.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    requires = {name: weight.requires_grad for name, weight in weights.items()}
    model.requires_grad_(True)
    try:
        sums, count = fisher_sums(model, weights, dict(enumerate(sequences)), seed=seed)
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(requires[name])
    if count == 0:
        raise ValueError("no row has two tokens: Fisher information is measured on predictions of tokens")
    return {name: total / count for name, total in sums.items()}


def fisher_sums(
    model: nn.Module, weights: Mapping[str, Tensor], sequences: Mapping[int, Sequence[int]], *, seed: int = 0
) -> tuple[dict[str, Tensor], int]:
    """Adds up the squared gradients of ``estimate_fisher`` over rows.

    Args:
        model: a causal language model of transformers.
        weights: those of its weights, by name, that the information is wanted of; they require gradients.
        sequences: tokens of rows by their numbers, with which draws are seeded.
        seed: of the draws.

    Returns:
        The sums by name, in at least fp32, and the number of contexts.

    Raises:
        ValueError: a row has more tokens than the model positions.
    """
    check_lengths(num_positions(model), sequences)
    sums = {name: torch.zeros_like(weight, dtype=_wide(weight)) for name, weight in weights.items()}
    count, distinct = 0, {id(weight): weight for weight in weights.values()}
    device = next(iter(distinct.values())).device if distinct else torch.device("cpu")
    for number, tokens in sequences.items():
        if len(tokens) < 2:
            continue
        total = drawn_logprob(model, tokens, seed=seed, number=number, device=device)
        found = torch.autograd.grad(total, list(distinct.values()), allow_unused=True)
        gradients = dict(zip(distinct, found, strict=True))
        count += len(tokens) - 1
        for name, weight in weights.items():
            gradient = gradients[id(weight)]
            if gradient is not None:
                sums[name] += gradient.to(sums[name].dtype).square()
    return sums, count


def drawn_logprob(model: nn.Module, tokens: Sequence[int], *, seed: int, number: int, device: torch.device) -> Tensor:
    """Computes the sum of the log-probs, with gradient, of tokens that the model draws after each beginning of a row.

    Args:
        model: a causal language model of transformers.
        tokens: of the row, at least two.
        seed: of the draws.
        number: of the row, by which its draws are seeded.
        device: of the model.
    """
    logits_LV = model(input_ids=torch.tensor([list(tokens)], device=device)).logits[0, :-1].float()
    generator = torch.Generator().manual_seed(derive_seed(seed, number) >> 1)
    drawn_L1 = torch.multinomial(logits_LV.detach().cpu().softmax(-1), 1, generator=generator).to(device)
    total: Tensor = logits_LV.log_softmax(-1).gather(-1, drawn_L1).sum()
    return total


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def estimate_products(model: nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, Activations]:
    """Measures the mean of x x^T over the inputs x of every linear layer, ``(I, I)`` in fp64.

    Args:
        model: a causal language model of transformers.
        sequences: tokens of rows.

    Returns:
        By name of each layer's weight; without layers whose weight is shared with an embedding.

    Raises:
        ValueError: a row has more tokens than the model positions.
    """
    check_lengths(num_positions(model), dict(enumerate(sequences)))
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers: dict[str, nn.Module] = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in shared
    }
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            product = x_NI.T @ x_NI
            sums[name] = sums[name] + product if name in sums else product
            counts[name] += len(x_NI)

        return before

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        for tokens in sequences:
            model(input_ids=torch.tensor([list(tokens)]))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: Activations([sums[name] / counts[name]], transposed=isinstance(layers[name], Conv1D)) for name in sums
    }
