"""All options of a merge as one group, of the command and of a pipeline's stage, and what they do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

import torch

from ..evaluation.answers import answer_prompts, load_verifier, read_prompts
from ..inference import LocalEngine, SamplingParams
from ..metrics.direction import direction_of
from ..models import load_causal_lm, load_tokenizer
from ..utils.validation import check_choice
from .merge import Precision, build_method, layer_methods, merge, parse_size
from .methods import ADAPTER_METHODS, METHODS
from .soups import greedy_soup

# Options that are no options of a method.
_GENERAL = ("method", "models", "output", "base", "dtype", "precision", "layers", "max_shard_size")
_DATA = ("rows", "num_rows", "data_seed")
_SOUP = ("prompts", "verifier", "max_new_tokens", "validate", "metric", "mode")
_GREEDY = "greedy_soup"
# Measures the model in a folder.
Evaluate = Callable[[Path], float]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of ``merge``. Those of the methods are unset by default; see METHODS.md for each.

    Args:
        method: name of the method, or greedy_soup.
        models: folders of models or adapters; a pattern such as runs/sft/model-* stands for all that match, and a
            .json file for the folders that it lists.
        output: the folder to write.
        base: of differences, or of adapters.
        dtype: of the result; the first model's by default.
        precision: to compute in.
        layers: options for tensors by regular expressions of their names.
        max_shard_size: of a file.
        weights: one per model.
        normalize: linear: divide by the sum of the weights.
        scale: lambda, the factor of the merged differences.
        density: fraction of differences that is kept.
        preset: convention of ties, dare, dare_ties and della.
        seed: of random masks.
        epsilon: della: half the range of probabilities.
        gamma: breadcrumbs: fraction of outliers that is dropped.
        rank: svd: of the merged adapter.
        t: slerp: position between the two models.
        antiparallel: slerp: what to do with opposite directions.
        max_iterations: karcher, geometric_median.
        tolerance: karcher, geometric_median.
        confidence_threshold: sign_consensus: least agreement.
        floor: fisher: added to the information.
        shrinkage: regmean: factor of entries off the diagonal.
        ridge: regmean: added to the diagonal.
        rows: fisher, regmean: rows to measure the models on.
        num_rows: fisher, regmean: how many of them.
        data_seed: fisher: of samples.
        prompts: greedy_soup: prompts that models are tested on; their mean reward is the metric.
        verifier: greedy_soup: dotted path of the reward function of prompts.
        max_new_tokens: greedy_soup: of an answer to prompts.
        validate: greedy_soup: instead of prompts, config files of `rlhf-lightning validate`: each model takes the place
            of the configured one, and is measured on data.val and by the callbacks.
        metric: greedy_soup: with validate, the metric, such as val/loss or val/rewards/accuracies.
        mode: greedy_soup: whether more (max) or less (min) of the metric is better; by default, what its name says.
    """

    method: str
    models: list[str]
    output: str
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    precision: Precision = "float32"
    layers: dict[str, dict[str, Any]] | None = None
    max_shard_size: str = "5GB"
    weights: list[float] | None = None
    normalize: bool | None = None
    scale: float | None = None
    density: float | None = None
    preset: Literal["paper", "peft", "mergekit"] | None = None
    seed: int | None = None
    epsilon: float | None = None
    gamma: float | None = None
    rank: int | None = None
    t: float | None = None
    antiparallel: Literal["error", "linear"] | None = None
    max_iterations: int | None = None
    tolerance: float | None = None
    confidence_threshold: float | None = None
    floor: float | None = None
    shrinkage: float | None = None
    ridge: float | None = None
    rows: str | None = None
    num_rows: int | None = None
    data_seed: int | None = None
    prompts: str | None = None
    verifier: str = "rlhf_lightning.rewards.exact_answer"
    max_new_tokens: int = 256
    validate: list[str] = field(default_factory=list)
    metric: str | None = None
    mode: Literal["max", "min"] | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Returns the named options that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def of_method(self) -> dict[str, Any]:
        """Returns the options of the method that are set."""
        others = (*_GENERAL, *_DATA, *_SOUP)
        names = [option.name for option in fields(MergeOptions)]
        return self.given(*(name for name in names if name not in others))

    def check(self) -> None:
        """Checks the options with each other, without opening a model.

        Raises:
            ValueError: an option is out of range, or read by another method only.
        """
        if not isinstance(self.models, list | tuple):
            raise ValueError(f"models is {self.models!r}; it must be a list of folders")
        parse_size(self.max_shard_size)
        if self.method == _GREEDY:
            self._check_soup()
            return
        check_choice("method", self.method, (*METHODS, *ADAPTER_METHODS, _GREEDY))
        for name, verb in (("prompts", "are"), ("validate", "is"), ("metric", "is"), ("mode", "is")):
            if getattr(self, name):
                raise ValueError(f"{name} {verb} read by method greedy_soup only: remove {name}, or set the method")
        try:
            method = build_method(self.method, self.of_method())
            layer_methods(method, self.layers or {})
        except TypeError as error:  # an option of another method
            raise ValueError(str(error)) from error
        data = self.given(*_DATA)
        if data and not method.needs_data:
            raise ValueError(f"{next(iter(data))} is read by the methods fisher and regmean only")

    def _check_soup(self) -> None:
        if (self.prompts is None) == (not self.validate):
            raise ValueError(
                "greedy_soup chooses by a metric: give prompts, such as sums:prompts?split=validation, or validate: "
                "config files with a module and data.val"
            )
        if self.validate and self.metric is None:
            raise ValueError("validate measures many metrics: give the one to choose by, such as metric: val/loss")
        if self.prompts is not None and (self.metric or self.mode):
            raise ValueError("metric and mode belong to validate; the metric of prompts is their mean reward")
        if self.prompts is not None:
            load_verifier(self.verifier)
        if self.mode is not None:
            check_choice("mode", self.mode, ("max", "min"))


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Args:
        folder: of the merged model.
        metrics: numbers of it by name: of models, and of a soup its ingredients and its metric.
    """

    folder: Path
    metrics: dict[str, float]


def run(options: MergeOptions, say: Callable[[str], None] = print, evaluate: Evaluate | None = None) -> Merged:
    """Merges with checked options: see ``merge`` and ``greedy_soup``.

    Args:
        options: the options.
        say: called with a line for each finished file or evaluation.
        evaluate: measures a model by ``validate`` and ``metric``, where these are given.

    Raises:
        ValueError: as these do.
    """
    options.check()
    models = expand(options.models)
    general = options.given("base", "dtype", "precision", "layers", "max_shard_size")
    if options.method != _GREEDY:
        own = general | options.given(*_DATA) | options.of_method()
        folder = merge(options.method, models=models, output=options.output, say=say, **own)
        return Merged(folder, {"models": float(len(models))})
    if options.validate:
        assert evaluate is not None
        mode = options.mode or direction_of(str(options.metric))
    else:
        evaluate = partial(
            accuracy, prompts=str(options.prompts), verifier=options.verifier, length=options.max_new_tokens
        )
        mode = "max"
    soup = greedy_soup(models, options.output, evaluate=evaluate, mode=mode, say=say, **general, **options.of_method())
    say(f"the soup has {len(soup.ingredients)} of {len(models)} models: {', '.join(soup.ingredients)}")
    counts = {"models": float(len(models)), "ingredients": float(len(soup.ingredients))}
    return Merged(
        soup.folder,
        counts | {"best_model": max(soup.values) if mode == "max" else min(soup.values), "soup": soup.value},
    )


def expand(models: Sequence[str]) -> list[str]:
    """Replaces patterns by the folders of models that match, in the order of the numbers in their names.

    A file that ends in ``.json``, such as the output ``models`` of rounds, is a list of folders, relative to it.

    Raises:
        ValueError: no folder of a model matches, or the list cannot be read.
    """
    found: list[str] = []
    for model in map(str, models):
        if model.endswith(".json"):
            found += _listed(Path(model).expanduser())
            continue
        if not has_magic(model):
            found.append(model)
            continue
        place = Path(model).expanduser()
        root = Path(place.anchor) if place.is_absolute() else Path()
        matches = [p for p in root.glob(str(place.relative_to(root))) if _holds_model(p)]
        if not matches:
            raise ValueError(f"no folder of a model matches {model!r}: write the folders, or another pattern")
        found += sorted((str(match) for match in matches), key=_natural)
    return found


def _listed(file: Path) -> list[str]:
    try:
        places = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the list of models {str(file)!r} cannot be read ({error}): write the folders") from error
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        raise ValueError(f"{str(file)!r} is no list of folders of models: write the folders")
    return [os.path.normpath(file.parent / place) for place in places]


def _holds_model(folder: Path) -> bool:
    hidden = folder.name.startswith(".")
    return not hidden and any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts model-9 before model-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def accuracy(folder: Path, *, prompts: str, verifier: str, length: int) -> float:
    """Returns the mean reward of a model's greedy answers."""
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, trainable=False), load_tokenizer(folder)
    greedy = SamplingParams(max_new_tokens=length, temperature=0.0)
    examples = read_prompts(prompts, tokenizer)
    groups = answer_prompts(LocalEngine(model, tokenizer), examples, load_verifier(verifier), sampling=greedy)
    rewards = [answer.reward for group in groups for answer in group if answer.reward is not None]
    if not rewards:
        raise ValueError(f"no reward for any of the prompts {prompts!r}: they lack what the verifier reads")
    return sum(rewards) / len(rewards)
