"""``rlhf-lightning merge``: merges models, verifies a merge, and reports conflicts before one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import torch
import transformers

from ..evaluation.answers import answer_prompts, load_verifier, read_prompts
from ..inference import LocalEngine, SamplingParams
from ..models import load_causal_lm, load_tokenizer
from ..utils import yaml_parser
from ..utils.imports import find_own_modules
from ..utils.messages import UsageError, explain
from .conflicts import conflict_report
from .manifest import verify
from .merge import Precision, merge
from .methods import METHODS
from .soups import greedy_soup

_USAGE = """\
usage: rlhf-lightning merge --method NAME --models '[A, B]' --output FOLDER [--base FOLDER] [--NAME VALUE ...]
       rlhf-lightning merge verify FOLDER
       rlhf-lightning merge conflicts --models '[A, B]' [--base FOLDER] [--output FOLDER]"""
# Options of the command that are no options of a method.
_GENERAL = ("method", "models", "output", "base", "dtype", "precision", "layers", "max_shard_size")
_DATA = ("rows", "num_rows", "data_seed")
_SOUP = ("prompts", "verifier", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of ``merge``. Those of the methods are unset by default; see METHODS.md for each.

    Args:
        method: name of the method, or greedy_soup.
        models: folders of models or adapters.
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
        prompts: greedy_soup: prompts that models are tested on.
        verifier: greedy_soup: dotted path of the reward function whose mean is the metric.
        max_new_tokens: greedy_soup: of an answer.
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

    def given(self, *names: str) -> dict[str, Any]:
        """Returns the named options that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def of_method(self) -> dict[str, Any]:
        """Returns the options of the method that are set."""
        others = (*_GENERAL, *_DATA, *_SOUP)
        return self.given(*(field.name for field in fields(self) if field.name not in others))


def run(options: MergeOptions, say: Any = print) -> Path:
    """Merges with checked options: see ``merge`` and ``greedy_soup``.

    Raises:
        ValueError: as these do.
    """
    general = options.given("base", "dtype", "precision", "layers", "max_shard_size")
    if options.method != "greedy_soup":
        if options.prompts is not None:
            raise ValueError("prompts are read by method greedy_soup only: remove prompts, or set the method")
        data = options.given(*_DATA)
        if data and not (options.method in METHODS and METHODS[options.method].needs_data):
            raise ValueError(f"{next(iter(data))} is read by the methods fisher and regmean only")
        return merge(
            options.method,
            models=options.models,
            output=options.output,
            say=say,
            **general,
            **data,
            **options.of_method(),
        )
    if options.prompts is None:
        raise ValueError("greedy_soup tests models on prompts: give prompts, such as sums:prompts?split=validation")
    evaluate = partial(accuracy, prompts=options.prompts, verifier=options.verifier, length=options.max_new_tokens)
    soup = greedy_soup(options.models, options.output, evaluate=evaluate, say=say, **general, **options.of_method())
    say(f"the soup has {len(soup.ingredients)} of {len(options.models)} models: {', '.join(soup.ingredients)}")
    return soup.folder


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


class _Parser(jsonargparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": yaml_parser.MODE, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        names = (action.dest for action in self._actions)
        raise UsageError(f"merge: {explain(message, names)}") from ex


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning merge``.

    Args:
        args: those of :class:`MergeOptions`, or ``--config FILE`` with them; ``verify FOLDER``; ``conflicts`` with
            ``--models``, ``--base`` and ``--output``.

    Raises:
        SystemExit: 1 if ``verify`` finds a difference.
    """
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    if args[:1] == ["verify"]:
        _verify(args[1:])
    elif args[:1] == ["conflicts"]:
        _conflicts(args[1:])
    else:
        parser = _Parser(prog="rlhf-lightning merge", description=(merge.__doc__ or "").partition("\n")[0])
        parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
        parser.add_class_arguments(MergeOptions, as_group=False)
        given = yaml_parser.plain(parser.instantiate(parser.parse_args([*args])))
        try:
            folder = run(MergeOptions(**{field.name: given[field.name] for field in fields(MergeOptions)}))
        except TypeError as error:  # an option of another method
            raise UsageError(f"merge: {error}") from error
        print(f"merged: {folder}")


def _verify(args: Sequence[str]) -> None:
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError("merge verify needs one folder: rlhf-lightning merge verify FOLDER")
    differences = verify(args[0])
    for line in differences:
        print(line)
    if differences:
        sys.exit(1)
    print("nothing differs from the manifest")


def _conflicts(args: Sequence[str]) -> None:
    parser = _Parser(prog="rlhf-lightning merge conflicts", description="Compares models before a merge.")
    parser.add_argument("--models", type=list[str], required=True, help="folders of models or adapters")
    parser.add_argument("--base", type=str | None, default=None, help="the model that they were trained from")
    parser.add_argument("--output", type=str | None, default=None, help="folder of conflicts.json and conflicts.png")
    given = yaml_parser.plain(parser.parse_args([*args]))
    report = conflict_report(given["models"], given["base"])
    print(report.table())
    if given["output"]:
        report.save(given["output"])
        print(f"report: {given['output']}")
