"""Builds strategies and scorers from configurations: by the names of their classes, or by class paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..models.loading import locate
from ..models.reward_head import read_head_options
from ..utils.imports import load_attribute
from ..utils.keywords import advise
from .budget import Budget
from .sampling import SamplingParams


def build_strategy(spec: Any, engine: Any, *, scorer: Any = None) -> Any:
    """Builds a strategy on an engine.

    Args:
        spec: a strategy's class name such as ``MCTS``, or a mapping with ``class_path`` (a class name, or the dotted
            path of a class of one's own) and ``init_args``. In these, ``scorer`` and ``value`` are as in
            ``build_scorer``, ``budget`` and ``sampling`` are mappings of their options, and ``engine`` is a strategy
            on the given engine that this one wraps.
        engine: samples from the policy.
        scorer: used if ``init_args`` name none; as in ``build_scorer``.

    Raises:
        ValueError: there is no such strategy.
        TypeError: it has no such option.

    Example:
        >>> build_strategy({"class_path": "MajorityVote", "init_args": {"n": 5}}, engine=None).n
        5
    """
    cls, options = _read(spec, "strategy")
    if (inner := options.pop("engine", None)) is not None:
        # A strategy that scores nothing itself leaves the scorer to the one within.
        own = "scorer" in _options(cls)
        engine, scorer = build_strategy(inner, engine, scorer=None if own else scorer), scorer if own else None
    given = options.pop("scorer", None) or scorer
    if given is not None:
        options["scorer"] = build_scorer(given)
    if options.get("value") is not None:
        options["value"] = build_scorer(options["value"])
    for name, group in (("budget", Budget), ("sampling", SamplingParams)):
        if isinstance(options.get(name), Mapping):
            options[name] = _call(group, options[name], name)
    return _call(cls, options, "strategy", engine)


def build_scorer(spec: Any) -> Any:
    """Builds a scorer.

    Args:
        spec: a scorer; the folder or hub id of a reward model, process reward model or critic; a scorer's class name;
            or a mapping with ``class_path`` and ``init_args``, where ``terms`` of a ``WeightedScorer`` are pairs of
            these with weights, and the ``judge`` of a ``JudgeScorer`` and the ``function`` of a ``VerifierScorer`` may
            be written as ``class_path`` and ``init_args``, too.

    Raises:
        ValueError: there is no such scorer or model.
        TypeError: it has no such option.
    """
    if callable(getattr(spec, "score", None)) and not inspect.isclass(spec):
        return spec
    if isinstance(spec, str) and not _is_class(spec):
        if not Path(spec).exists() and (hint := advise(spec, _names())):
            raise ValueError(f"there is no scorer {spec!r}{hint}")
        model = locate(spec, what="scorer")
        method = read_head_options(model).get("method") if Path(model).is_dir() else None
        names = {"process_reward": "ProcessScorer", "value": "ValueScorer"}
        return _class(names.get(str(method), "RewardScorer"), "scorer")(spec)
    cls, options = _read(spec, "scorer")
    if "terms" in options:
        options["terms"] = [(build_scorer(term), weight) for term, weight in options["terms"]]
    for name in ("judge", "function"):
        if name in options:
            options[name] = _object(options[name], name)
    return _call(cls, options, "scorer")


def _object(spec: Any, what: str) -> Any:
    """Builds an object that is written as ``class_path`` and ``init_args``, those within included."""
    if not isinstance(spec, Mapping):
        return spec
    if not isinstance(spec.get("class_path"), str) or set(spec) - {"class_path", "init_args"}:
        raise ValueError(f"{what} has the keys {sorted(map(str, spec))}: write class_path and init_args")
    arguments = {
        name: _object(value, name) if isinstance(value, Mapping) and "class_path" in value else value
        for name, value in (spec.get("init_args") or {}).items()
    }
    try:
        return load_attribute(spec["class_path"])(**arguments)
    except TypeError as error:
        raise ValueError(f"the init_args of {what} do not fit {spec['class_path']}: {error}") from error


def _is_class(name: str) -> bool:
    return name in _names() or ("/" not in name and name.rpartition(".")[2][:1].isupper() and "." in name)


def _names() -> list[str]:
    """Lists the classes of this room that a configuration may name."""
    room = import_module(__package__)
    return [name for name in room.__all__ if inspect.isclass(getattr(room, name, None))]


def _read(spec: Any, what: str) -> tuple[type, dict[str, Any]]:
    if isinstance(spec, str):
        return _class(spec, what), {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"{what} is {spec!r}: write a class name, or class_path and init_args")
    if others := sorted(set(spec) - {"class_path", "init_args"}):
        raise ValueError(f"{what} has the key {others[0]!r}: write class_path and init_args")
    return _class(spec["class_path"], what), dict(spec.get("init_args") or {})


def _class(name: str, what: str) -> Any:
    """Finds a class by its name in this room, or by its dotted path."""
    found: Any = load_attribute(name) if "." in name else getattr(import_module(__package__), name, None)
    method = "search" if what == "strategy" else "score"
    if not inspect.isclass(found) or not callable(getattr(found, method, None)):
        fitting = [n for n in _names() if callable(getattr(getattr(import_module(__package__), n), method, None))]
        raise ValueError(f"there is no {what} {name!r}{advise(name, fitting)}")
    return found


def _call(cls: type, options: Mapping[str, Any], what: str, *arguments: Any) -> Any:
    """Builds an object; an option that it does not have is named with the nearest that it has."""
    known = list(_options(cls))
    for name in options:
        if name not in known:
            raise TypeError(f"{what} {cls.__name__} has no option {name!r}{advise(str(name), known)}")
    return cls(*arguments, **options)


def _options(cls: type) -> dict[str, None]:
    """Lists the options of a class, those of its bases included where it takes ``**options``."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        found |= {p.name: None for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: None for name in found if name not in ("self", "engine")}
