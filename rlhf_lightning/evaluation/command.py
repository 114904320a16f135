"""``rlhf-lightning evaluate``: evaluates models on a suite, and compares them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import transformers

from ..utils import yaml_parser
from ..utils.imports import find_own_modules
from ..utils.messages import UsageError, explain
from .evaluate import evaluate
from .report import PAGE


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of ``evaluate``.

    Args:
        models: folders or hub ids, the first of which the others are compared with: a,b,c or a list; or a mapping of
            names to them.
        suite: a YAML file with a suite, such as configs/suites/arithmetic.yaml.
        output: the folder of results.json, report.html and history.jsonl; results there are not computed again.
        seed: of samples and resamples.
        dtype: type of the models' weights.
    """

    models: list[str] | dict[str, str] | str
    suite: str
    output: str
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def named(self) -> list[str] | dict[str, str]:
        """Returns the models, those of ``a,b,c`` as a list."""
        if isinstance(self.models, str):
            return [name.strip() for name in self.models.split(",") if name.strip()]
        return self.models


class _Parser(jsonargparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": yaml_parser.MODE, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        names = (action.dest for action in self._actions)
        raise UsageError(f"evaluate: {explain(message, names)}") from ex


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning evaluate``.

    Args:
        args: those of :class:`EvaluateOptions`, or ``--config FILE`` with them.
    """
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    parser = _Parser(prog="rlhf-lightning evaluate", description="Evaluates models on a suite, and compares them.")
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_class_arguments(EvaluateOptions, as_group=False)
    given = yaml_parser.plain(parser.instantiate(parser.parse_args([*args])))
    options = EvaluateOptions(**{field.name: given[field.name] for field in fields(EvaluateOptions)})
    report = evaluate(
        options.named(),
        options.suite,
        output=options.output,
        seed=options.seed,
        dtype=options.dtype,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(report.table())
    print(f"report: {Path(options.output) / PAGE}")
