"""``rlhf-lightning evaluate``: evaluates models on a suite, and compares them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers

from ..inference.policies import PolicySpec
from ..utils.command_line import parse_options
from ..utils.imports import find_own_modules
from .evaluate import evaluate
from .report import PAGE


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of ``evaluate``.

    Args:
        models: folders or hub ids, a,b,c or a list; the others are compared with the first; or a mapping of
            names to them, or to several that sample as one, such as '{sft: A, both: [A, B]}'.
        suite: a YAML file with a suite, such as configs/suites/arithmetic.yaml.
        output: the folder of results.json, report.html and history.jsonl; results there are not computed again.
        seed: of samples and resamples.
        dtype: type of the models' weights.
    """

    models: list[str] | dict[str, PolicySpec] | str
    suite: str
    output: str
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def named(self) -> list[str] | dict[str, PolicySpec]:
        """Returns the models, those of ``a,b,c`` as a list.

        Raises:
            ValueError: a list holds an ensemble, which has no name there.
        """
        if isinstance(self.models, str):
            if self.models.lstrip().startswith("["):
                raise ValueError(f"models is {self.models}: give an ensemble a name, as in '{{sft: A, both: [A, B]}}'")
            return [name.strip() for name in self.models.split(",") if name.strip()]
        return self.models


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning evaluate``.

    Args:
        args: those of :class:`EvaluateOptions`, or ``--config FILE`` with them.
    """
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    description = "Evaluates models on a suite, and compares them."
    options = EvaluateOptions(**parse_options("evaluate", EvaluateOptions, args, description))
    try:
        report = evaluate(
            options.named(),
            options.suite,
            output=options.output,
            seed=options.seed,
            dtype=options.dtype,
            say=lambda line: print(line, file=sys.stderr),
        )
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: the same command continues after the answers that are kept in {options.output}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    print(report.table())
    print(f"report: {Path(options.output) / PAGE}")
