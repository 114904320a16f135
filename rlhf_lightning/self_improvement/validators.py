"""Adversarial validation: checks that look for what a model's accuracy does not show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..inference import Engine
from ..utils.imports import load_attribute
from ..utils.option_groups import OptionGroup, build_group
from .findings import ModelCheck, Validation
from .task_checks import Consistency, Robustness, Verdicts
from .trained_checks import Discriminator, FlawDetector

_CHECKS: dict[str, type[OptionGroup]] = {
    cls.__name__: cls for cls in (Verdicts, Robustness, Consistency, Discriminator, FlawDetector)
}


class AdversarialValidator:
    """Runs checks that look for what a model's accuracy does not show.

    Args:
        checks: at least one: ``Verdicts``, ``Robustness``, ``Consistency``, ``Discriminator``, ``FlawDetector``, an
            object of your own with ``run(engine, seed)``, or a mapping with ``class_path`` (one of these names, or a
            dotted path) and ``init_args``.

    Raises:
        TypeError: an option that a check does not have.
        ValueError: no check, one that does not exist, or an option out of its range.

    Example:
        >>> task = {"name": "sums", "prompts": "sums:prompts?split=test&rows=50"}
        >>> robust = {"class_path": "Robustness", "init_args": {"task": task, "perturbations": ("spaces",)}}
        >>> AdversarialValidator([robust]).checks[0].max_drop
        0.1
    """

    def __init__(self, checks: Sequence[ModelCheck | Mapping[str, Any]]) -> None:
        if not checks or isinstance(checks, str | Mapping):
            raise ValueError(f"checks is {checks!r}; give a list of at least one of {', '.join(_CHECKS)}")
        self.checks = tuple(_check(given) for given in checks)

    def validate(self, engine: Engine, *, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Validation:
        """Runs all checks.

        Args:
            engine: the model's, with a tokenizer.
            seed: of samples, perturbations and classifiers.
            say: shown one line per check.
        """
        findings = []
        for check in self.checks:
            findings.append(check.run(engine, seed))
            say(f"{'passed' if findings[-1].passed else 'FAILED'}: {findings[-1].detail}")
        return Validation(tuple(findings))


def _check(given: ModelCheck | Mapping[str, Any]) -> ModelCheck:
    """Builds a check, unless it is one already."""
    found: Any = given
    if isinstance(given, Mapping):
        name, options = given.get("class_path"), dict(given.get("init_args") or {})
        if name in _CHECKS:
            # YAML has lists only.
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
            found = build_group(options, _CHECKS[str(name)])
        elif isinstance(name, str) and "." in name:
            found = load_attribute(name)(**options)
        else:
            advice = f"write one of {', '.join(_CHECKS)}, or the dotted path of your own"
            raise ValueError(f"there is no check {name!r}; {advice}")
    if not callable(getattr(found, "run", None)):
        raise TypeError(f"a check is {given!r}; it must have the method run(engine, seed)")
    checked: ModelCheck = found
    return checked
