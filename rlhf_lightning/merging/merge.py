"""Merges models on disk: checks them, streams them through a method, and writes a folder with a manifest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..utils.files import MARKER, check_replaceable, hold, release, write_atomically
from ..utils.folders import replace_folder
from ..utils.keywords import advise
from ..utils.validation import check_choice
from .adapter_merge import merge_adapters
from .data import Statistics, measure
from .manifest import NAME, manifest_text
from .methods import ADAPTER_METHODS, METHODS, Cat, Svd
from .methods.base import Method
from .sources import Source, chat_template_differs, check_same, open_source, with_equal_ties
from .stream import Journal, Merge, is_merged, worker_pool, write_shards
from .tensor_files import INDEX, BackgroundDigests, Shard, fingerprint, plan_shards

Precision = Literal["float32", "float64"]
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
Layers = Mapping[str, Mapping[str, Any]]


def merge(
    method: str,
    *,
    models: Sequence[str | Path],
    output: str | Path,
    base: str | Path | None = None,
    dtype: str | None = None,
    precision: Precision = "float32",
    layers: Layers | None = None,
    max_shard_size: str = "5GB",
    rows: str | None = None,
    num_rows: int = 256,
    data_seed: int = 0,
    keep: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Path:
    """Merges models into one, tensor by tensor, and writes it with a manifest.

    Only some rows of one tensor of each model are in memory at a time. The folder appears when it is complete; a killed
    merge leaves a hidden folder, from which the same call continues to the same bytes. The result is checked while it
    is written: values that are not finite, and a result that equals one of its inputs, are errors.

    Args:
        method: ``linear``, ``task_arithmetic``, ``ties``, ``dare``, ``dare_ties``, ``della``, ``breadcrumbs``,
            ``slerp``, ``karcher``, ``geometric_median``, ``model_stock``, ``sign_consensus``, ``fisher``, ``regmean``;
            or ``cat`` and ``svd``, which merge LoRA adapters into one adapter.
        models: folders of models, or of LoRA adapters, which are added to their base exactly.
        output: the folder to write; an earlier model of this package there is replaced.
        base: of differences, for the methods that need one; of adapters, instead of the one that they name. Other
            methods do not need it; they check that it fits the models.
        dtype: of the result: ``float32``, ``bfloat16``, ``float16`` or ``float64``; the first model's by default.
        precision: to compute in: ``float32`` or ``float64``; ``cat`` and ``svd`` always compute in float64.
        layers: options for some tensors: a mapping of regular expressions, searched in the tensors' names, to options
            of the method; the first that matches is used.
        max_shard_size: of a file of a whole model, such as ``5GB``.
        rows: for ``fisher`` and ``regmean``: rows to measure the models on, as ``SFTDataModule`` reads them.
        num_rows: how many of them, from the first.
        data_seed: of the samples that Fisher information is measured on.
        keep: accept a result that equals one of its inputs, as a soup of one model does.
        say: called with a line for each finished file.
        options: of the method, such as ``weights``, ``density``, ``preset`` or ``t``.

    Returns:
        The folder.

    Raises:
        ValueError: the models do not fit each other, an option is out of range, or the result is useless.
        TypeError: the method has no such option.

    Example:
        >>> merge("ties", base="base", models=["a", "b"], output="merged", density=0.2)  # doctest: +SKIP
        PosixPath('/home/me/merged')
    """
    chosen = build_method(method, options)
    variants = layer_methods(chosen, layers or {})
    most_bytes = parse_size(max_shard_size)
    _check(chosen, variants, len(models), dtype=dtype, precision=precision, base=base, rows=rows)
    target = Path(output).expanduser().resolve()
    result = None if dtype is None else _DTYPES[dtype]
    record: dict[str, Any] = {"method": method, "options": chosen.conventions(), "dtype": dtype or "as stored"}
    if isinstance(chosen, Cat | Svd):
        with _held(target, "adapter"):
            merge_adapters(chosen, models, target, base=base, dtype=result, record=record, say=say)
        return target

    sources, root = _open(models, base, _DTYPES[precision], target, differences=chosen.needs_base)
    if chat_template_differs(sources):
        say(f"the chat templates differ: that of {str(sources[0].folder)!r} is written")
    record |= {"layers": {pattern: dict(given) for pattern, given in (layers or {}).items()}, "precision": precision}
    with _held(target, "model"):
        statistics = Statistics()
        if chosen.needs_data:
            statistics = measure(chosen, sources, rows, num_rows, data_seed)
            record["options"] |= {"rows": str(rows), "num_rows": num_rows, "data_seed": data_seed}
        run = Merge(
            sources,
            root,
            lambda name: method_of(name, chosen, variants),
            _DTYPES[precision],
            _result_types(sources[0], result),
            statistics.fisher,
            statistics.activations,
        )
        if keep:
            run.equal = [False] * len(run.equal)
        _write(run, target, record, most_bytes, say)
    return target


@contextmanager
def _held(target: Path, kind: str) -> Iterator[None]:
    """Locks a folder that is going to be written, and checks that it may be replaced."""
    hold(target)
    try:
        check_replaceable(target, kind)
        yield
    finally:
        release(target)


def _check(
    method: Method,
    variants: Mapping[str, Method],
    num_models: int,
    *,
    dtype: str | None,
    precision: str,
    base: str | Path | None,
    rows: str | None,
) -> None:
    """Checks the options with each other."""
    check_choice("precision", precision, ("float32", "float64"))
    if dtype is not None:
        check_choice("dtype", dtype, _DTYPES)
    if num_models == 0:
        raise ValueError("models is empty: give at least one folder")
    for variant in (method, *variants.values()):
        variant.check(num_models)
    if method.needs_base and base is None:
        raise ValueError(f"{method.name} merges differences to a base model: give base=")
    if isinstance(method, Cat | Svd) and variants:
        raise ValueError(f"{method.name} merges every layer in the same way: remove layers")
    if method.needs_data != (rows is not None):
        raise ValueError(
            f"{method.name} measures the models on rows of data: give rows="
            if method.needs_data
            else f"rows is {rows!r}, and {method.name} measures nothing: remove rows, or choose fisher or regmean"
        )


def _open(
    models: Sequence[str | Path], base: str | Path | None, dtype: torch.dtype, target: Path, *, differences: bool
) -> tuple[list[Source], Source | None]:
    """Opens the models, and the base where differences to it are merged; checks all that headers and configs tell."""
    opened = [open_source(model, base=base, dtype=dtype) for model in models]
    # Methods of no differences need no base of whole models; one that is given has to fit them all the same.
    if base is not None and (differences or not any(source.adapter for source in opened)):
        opened.append(open_source(base, dtype=dtype))
    everything = with_equal_ties(opened)
    sources, root = everything[: len(models)], everything[len(models)] if differences else None
    check_same(everything)
    if target in {source.folder for source in everything}:
        raise ValueError(f"output {str(target)!r} is one of the models: choose another folder")
    return sources, root


# Methods with their options.


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """Builds a method from its name and options.

    Raises:
        ValueError: there is no such method, or an option is out of range.
        TypeError: the method has no such option.

    Example:
        >>> build_method("slerp", {"t": 0.3})
        Slerp(t=0.3, antiparallel='error')
    """
    known: dict[str, type[Method]] = {**METHODS, **ADAPTER_METHODS}
    check_choice("method", name, known)
    cls = known[name]
    return cls(**_known(cls, options))


def _known(cls: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    allowed = [field.name for field in fields(cls)]
    for option in options:
        if option not in allowed:
            raise TypeError(f"the method {cls.name} takes no {option!r}{advise(option, allowed)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def layer_methods(method: Method, layers: Layers) -> dict[str, Method]:
    """Builds the method with the options of every pattern.

    Raises:
        ValueError: a pattern is no regular expression, or an option is out of range.
    """
    found = {}
    for pattern, options in layers.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"layers has the pattern {pattern!r}, which is no regular expression ({error})") from None
        if not isinstance(options, Mapping):
            raise TypeError(f"layers has {options!r} for {pattern!r}: give a mapping of options, such as {{'t': 0.3}}")
        found[pattern] = replace(method, **_known(type(method), options))
    return found


def method_of(name: str, method: Method, variants: Mapping[str, Method]) -> Method:
    """Returns the method with the options of one tensor."""
    return next((variant for pattern, variant in variants.items() if re.search(pattern, name)), method)


def parse_size(text: str) -> int:
    """Parses a size such as ``5GB``.

    Example:
        >>> parse_size("500MB")
        500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", str(text).strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"max_shard_size is {text!r}; it must be a number and a unit, such as 5GB or 500MB")
    return size


def _result_types(first: Source, dtype: torch.dtype | None) -> Callable[[str], torch.dtype]:
    """Returns the type of each tensor of the result: the requested one, or that of the first model's file."""

    def of(name: str) -> torch.dtype:
        tensor: Any = first.tensors[name]
        stored = getattr(tensor, "base", tensor).dtype
        return stored if dtype is None or not is_merged(tensor) else dtype

    return of


# Writing.


def _write(
    run: Merge,
    target: Path,
    record: dict[str, Any],
    most_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Writes the folder under its hidden name, and renames it when it is complete and checked."""
    first = run.models[0]
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    shards = plan_shards(shapes, {name: run.dtype_of(name) for name in shapes}, most_bytes)
    files = [file for source in run.inputs for file in source.files]
    plan = {**record, "inputs": fingerprint(files), "shards": [[s.file, list(s.tensors)] for s in shards]}

    def write(fresh: Path) -> None:
        journal = Journal(fresh, plan)
        if journal.resume():
            say(f"resumed after {len(journal.shards)} of {len(shards)} files")
        else:
            _clear(fresh)
            journal.save()
        digests = BackgroundDigests(files)
        try:
            with worker_pool() as run.pool:
                outputs = write_shards(run, shards, fresh, journal, run.surveys(), say)
            _check_changed(run)
            if fingerprint(files) != plan["inputs"]:
                raise ValueError("a model was changed while it was merged: merge again")
            text = manifest_text(**record, inputs=_inputs(run, digests.result()), outputs=outputs)
            _write_rest(first, fresh, shards, text, record["dtype"])
        finally:
            digests.stop()
        journal.path.unlink()

    replace_folder(target, "model", write, resumes=True)


def _inputs(run: Merge, digests: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Describes the models for the manifest: roles, folders, and the sha256 of their files."""
    return [
        {
            "role": "base" if source is run.base else f"models[{number}]",
            "folder": str(source.folder),
            "files": {str(file): digests[file] for file in source.files},
        }
        for number, source in enumerate(run.inputs)
    ]


def _check_changed(run: Merge) -> None:
    """Refuses a result that equals one of its inputs; a single adapter may be merged into its base."""
    for number, equal in enumerate(run.equal):
        source = run.inputs[number]
        if equal and not (source.adapter and len(run.models) == 1):
            role = "the base" if source is run.base else f"models[{number}]"
            raise ValueError(
                f"the merged model equals {role}, {str(source.folder)!r}, in every tensor: the models are the same, or "
                "the options leave nothing of the others (weights, scale, density, dtype)"
            )


def _write_rest(first: Source, fresh: Path, shards: Sequence[Shard], manifest: str, dtype: str) -> None:
    """Writes index, config, tokenizer and manifest."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.size for shard in shards)},
            "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
        }
        write_atomically(fresh / INDEX, json.dumps(index, indent=2) + "\n")
    config = dict(first.config)
    if dtype != "as stored":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_atomically(fresh / "config.json", json.dumps(config, indent=2) + "\n")
    for path in first.companions():
        shutil.copyfile(path, fresh / path.name)
    write_atomically(fresh / NAME, manifest)


def _clear(fresh: Path) -> None:
    """Removes what another merge, or a killed export, has left in the hidden folder."""
    for path in fresh.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
