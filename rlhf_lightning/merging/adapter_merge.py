"""Merges LoRA adapters into one adapter, without their base model: methods ``cat`` and ``svd``.

Tensors that an adapter trained in full (biases, and modules_to_save) are merged as differences from the base:
theta_0 + sum_i w_i (theta_i - theta_0), for which the base is read only if the weights do not sum to 1.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..models.adapters import ROPE_PARAMETERS
from ..models.safetensors_io import read_json
from ..utils.files import write_atomically
from ..utils.folders import replace_folder
from .adapter_files import PREFIX, WEIGHTS, Adapter, Factors, is_adapter, read_adapter
from .manifest import NAME, manifest_text
from .methods import Cat, Svd
from .methods.lora import Product, concatenate, truncate
from .sources import GENERATION, TOKENIZER_FILES, check_headless, check_tokenizers, find_folder
from .tensor_files import StoredTensor, file_digest, stored_tensors


@dataclass(frozen=True)
class _Sum:
    """The parts of a merged adapter, as they are written.

    Args:
        ranks: by path of the layer.
        tensors: by their names in the file.
        errors: of the layers that are not exact.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def merge_adapters(
    method: Cat | Svd,
    models: Sequence[str | Path],
    target: Path,
    *,
    base: str | Path | None,
    dtype: torch.dtype | None,
    record: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Writes the sum of adapters as an adapter's folder, with a manifest.

    Args:
        method: how to sum.
        models: folders of adapters.
        target: the folder to write.
        base: their base model, if it is another than they name.
        dtype: of the result; that of the first adapter by default.
        record: what the manifest says besides: ``method``, ``options``, ``dtype``.
        say: called with a line for each layer that is not exact.

    Raises:
        ValueError: the sum is no adapter, or the adapters do not fit each other.
    """
    adapters = [_open(model, method.name) for model in models]
    weights = list(method.weights or [1.0] * len(adapters))
    root = _check(adapters, base)
    if target in {adapter.folder for adapter in adapters}:
        raise ValueError(f"output {str(target)!r} is one of the models: choose another folder")
    digests = [file_digest(adapter.file) for adapter in adapters]
    _check_changes(adapters, digests, weights, method)

    # The sum, in fp64: adapters are small.
    found = _Sum()
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        _add_layer(found, path, adapters, weights, method)
    stored = dtype or next(iter(adapters[0].layers.values())).a_rI.dtype
    tensors = {PREFIX + name: tensor.to(stored).contiguous() for name, tensor in found.tensors.items()}
    tensors |= _trained(adapters, weights, root, dtype)
    if odd := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"the merged tensor {odd[0]!r} has values that are not finite: give smaller weights")

    config = _config(adapters, found.ranks, root)
    for path, error in found.errors.items():
        say(f"{path}: rank {found.ranks[path]}, error {error['frobenius']:.4g} ({error['relative']:.2%} of the norm)")
    inputs = [
        {"role": f"models[{number}]", "folder": str(adapter.folder), "files": {str(adapter.file): digest}}
        for number, (adapter, digest) in enumerate(zip(adapters, digests, strict=True))
    ]

    def write(place: Path) -> None:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(place))
        for name in (*TOKENIZER_FILES, GENERATION, ROPE_PARAMETERS):
            if (adapters[0].folder / name).is_file():
                shutil.copyfile(adapters[0].folder / name, place / name)
        outputs = {WEIGHTS: file_digest(place / WEIGHTS)}
        text = manifest_text(
            **record, precision="float64", layers={}, inputs=inputs, outputs=outputs, errors=found.errors
        )
        write_atomically(place / NAME, text)

    replace_folder(target, "adapter", write)


# Checks.


def _open(model: str | Path, method: str) -> Adapter:
    """Reads an adapter that can be added to others."""
    folder = find_folder(model)
    if not is_adapter(folder):
        raise ValueError(
            f"{method} merges LoRA adapters, and {str(folder)!r} is a whole model: use method='linear' or "
            "'task_arithmetic', which read adapters as well"
        )
    check_headless(folder)
    adapter = read_adapter(folder)
    if not adapter.layers:
        raise ValueError(f"the adapter {str(folder)!r} has no factors: there is nothing to merge")
    if any(factors.magnitude_O is not None for factors in adapter.layers.values()):
        raise ValueError(
            f"the adapter {str(folder)!r} uses DoRA, which rescales the base's weights: a sum of such adapters is no "
            "adapter; merge them into the base (method='task_arithmetic', base=...), which is exact"
        )
    return adapter


def _check(adapters: Sequence[Adapter], base: str | Path | None) -> str | None:
    """Checks that adapters can be added; returns their base model as they name it."""
    # One base, as far as names tell; one tokenizer; one position encoding.
    first = adapters[0]
    names = [adapter.config.get("base_model_name_or_path") for adapter in adapters]
    if base is None and len(set(names)) > 1:
        other = next(number for number, name in enumerate(names) if name != names[0])
        raise ValueError(
            f"{str(first.folder)!r} is an adapter of {names[0]!r} and {str(adapters[other].folder)!r} one of "
            f"{names[other]!r}: only adapters of one base can be merged; if it is the same model, give base="
        )
    check_tokenizers([adapter.folder for adapter in adapters])
    rotary = [_rotary(adapter.folder) for adapter in adapters]
    if any(found != rotary[0] for found in rotary):
        raise ValueError(f"the adapters were trained with different rotary frequencies ({ROPE_PARAMETERS})")

    # A sum of factors needs equal shapes, and peft's format holds either factors or a whole weight of a layer.
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        having = [adapter for adapter in adapters if path in adapter.layers]
        shapes = {_shape(adapter.layers[path]) for adapter in having}
        if len(shapes) > 1:
            raise ValueError(f"the adapters change {path!r} with different shapes, {sorted(shapes)}: they fit no base")
        if clash := [adapter for adapter in adapters if f"{path}.weight" in adapter.trained]:
            raise ValueError(
                f"{path!r} was trained in full in {str(clash[0].folder)!r} and with factors in "
                f"{str(having[0].folder)!r}, and an adapter holds one of both: merge them into the base "
                "(method='task_arithmetic', base=...)"
            )

    # Each loads alone, and their union does not.
    with_bias = any(f.bias_O is not None for adapter in adapters for f in adapter.layers.values())
    embedded = [path for adapter in adapters for path, f in adapter.layers.items() if f.embedding]
    if with_bias and embedded:
        raise ValueError(
            f"one adapter has biases of its own (lora_bias) and one changes the embedding {embedded[0]!r}, which peft "
            "loads from no single adapter: merge them into the base (method='task_arithmetic', base=...)"
        )
    return names[0] if base is None else str(base)


def _shape(factors: Factors) -> tuple[int, int, bool]:
    return factors.b_Or.shape[0], factors.a_rI.shape[1], factors.embedding


def _rotary(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / ROPE_PARAMETERS) if (folder / ROPE_PARAMETERS).is_file() else None


def _check_changes(
    adapters: Sequence[Adapter], digests: Sequence[str], weights: Sequence[float], method: Cat | Svd
) -> None:
    """Refuses a result that equals its input, and one adapter given twice."""
    if isinstance(method, Cat) and list(weights) == [1.0]:
        raise ValueError(f"the merged adapter equals {str(adapters[0].folder)!r}: give a second one, or weights")
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise ValueError(
                f"models[{digests.index(digest)}] and models[{number}] are the same adapter: give it once, with the "
                "sum of the weights"
            )


# The sum.


def _add_layer(
    found: _Sum, path: str, adapters: Sequence[Adapter], weights: Sequence[float], method: Cat | Svd
) -> None:
    """Adds one layer of the result; adapters without the layer add nothing."""
    having = [(a.layers[path], w) for a, w in zip(adapters, weights, strict=True) if path in a.layers]
    products = [(factors.b_Or.double(), factors.a_rI.double()) for factors, _ in having]
    merged: Product = concatenate(products, [weight * factors.scale for factors, weight in having])
    if isinstance(method, Svd):
        assert method.rank is not None
        merged = truncate(merged, method.rank)
    if merged.error:
        found.errors[path] = {"frobenius": merged.error, "relative": merged.error / merged.norm}
    found.ranks[path] = len(merged.a_rI)
    kind, end = ("lora_embedding_", "") if having[0][0].embedding else ("lora_", ".weight")
    found.tensors[f"{path}.{kind}A{end}"] = merged.a_rI
    found.tensors[f"{path}.{kind}B{end}"] = merged.b_Or
    # Where one adapter has biases, peft expects them in every layer.
    if any(factors.bias_O is not None for adapter in adapters for factors in adapter.layers.values()):
        bias_O = merged.b_Or.new_zeros(len(merged.b_Or))
        for factors, weight in having:
            if factors.bias_O is not None:
                bias_O += weight * factors.scale * factors.bias_O.double()
        found.tensors[f"{path}.lora_B.bias"] = bias_O


def _trained(
    adapters: Sequence[Adapter], weights: Sequence[float], root: str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Merges what the adapters trained in full, and copies weights of the base that are stored with them."""
    found, base = {}, None
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.trained):
        having = [(a, w) for a, w in zip(adapters, weights, strict=True) if name in a.trained]
        rest = 1.0 - sum(weight for _, weight in having)
        total = sum(weight * adapter.trained[name].whole().double() for adapter, weight in having)
        if abs(rest) > 1e-12:
            base = base or _base_tensors(root, name)
            if name not in base or base[name].shape != having[0][0].trained[name].shape:
                raise ValueError(
                    f"{str(having[0][0].file)!r} has {name!r} in full, and its base {root!r} has no such tensor: give "
                    "base="
                )
            total = total + rest * base[name].whole().double()
        found[name] = torch.as_tensor(total).to(dtype or having[0][0].trained[name].dtype)

    for name in dict.fromkeys(name for adapter in adapters for name in adapter.own_base):
        found[name] = _own_base(name, adapters, root)
    # In the model that peft makes, an adapted layer holds its own tensors one level deeper.
    adapted = {path for adapter in adapters for path in adapter.layers}
    stored = {}
    for name, tensor in found.items():
        layer, _, part = name.rpartition(".")
        stored[f"{PREFIX}{layer}.base_layer.{part}" if layer in adapted else PREFIX + name] = tensor.contiguous()
    return stored


def _own_base(name: str, adapters: Sequence[Adapter], root: str | None) -> Tensor:
    """Returns a weight of the base that some adapters store, and that all must share."""
    holder = next(adapter for adapter in adapters if name in adapter.own_base)
    value = holder.own_base[name].whole()
    for adapter in adapters:
        other = adapter.own_base.get(name) or _base_tensors(root, name).get(name)
        if other is None or other.shape != tuple(value.shape) or not torch.equal(other.whole(), value):
            raise ValueError(
                f"{str(holder.file)!r} holds the base's weight {name!r}, and it differs from that of "
                f"{str(adapter.folder)!r}: their bases are not the same"
            )
    return value


def _base_tensors(root: str | None, name: str) -> dict[str, StoredTensor]:
    """Finds the tensors of the adapters' base."""
    if root is None:
        raise ValueError(f"{name!r} was trained in full, and is merged as a difference to the base: give base=")
    return stored_tensors(find_folder(root))


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], root: str | None) -> LoraConfig:
    """Returns the config of the result: the scale of every layer is 1."""
    configs = [adapter.config for adapter in adapters]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others: dict[str, int] = {path: r for path, r in ranks.items() if r != rank}
    biases = {config.get("bias", "none") for config in configs}
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        modules_to_save=saved or None,
        bias=next(kind for kind in ("all", "lora_only", "none") if kind in biases),
        lora_bias=any(factors.bias_O is not None for adapter in adapters for factors in adapter.layers.values()),
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        task_type=configs[0].get("task_type"),
        base_model_name_or_path=root,
        inference_mode=True,
    )
    config.target_modules = sorted(ranks)
    return config
