"""Builds strategies, scorers and compressors from configurations: by the names of their classes, or by class paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..models.loading import locate
from ..models.policy_front import compressor_of
from ..models.reward_head import read_head_options
from ..utils.imports import load_attribute
from ..utils.keywords import advise
from .budget import Budget
from .sampling import SamplingParams

# The method that makes a class one of a kind.
_METHODS = {"strategy": "search", "scorer": "score", "compressor": "compress"}
# Arguments that the user of a compressor passes, not its spec.
_GIVEN = ("model", "tokenizer")
_LEARNED = "rlhf_lightning.models.ContextCompressor"


def build_strategy(spec: Any, engine: Any, *, scorer: Any = None) -> Any:
    """Builds a strategy on an engine.

    Args:
        spec: a strategy's class name such as ``MCTS`` or ``best_of_n``, also cut (``beam``), or a mapping with
            ``class_path`` (a class name, or the dotted path of a class of one's own) and ``init_args``. In these,
            ``scorer`` and ``value`` are as in ``build_scorer``, ``budget`` and ``sampling`` are mappings of their
            options, and ``engine`` is a strategy on the given engine that this one wraps.
        engine: samples from the policy.
        scorer: used if ``init_args`` name none; as in ``build_scorer``.

    Raises:
        ValueError: there is no such strategy.
        TypeError: it has no such option.

    Example:
        >>> build_strategy({"class_path": "majority_vote", "init_args": {"n": 5}}, engine=None).n
        5
    """
    cls, options = _read(strategy_spec(spec, scorer), "strategy")
    if (inner := options.pop("engine", None)) is not None:
        engine = build_strategy(inner, engine)
    for name in ("scorer", "value"):
        if options.get(name) is not None:
            options[name] = build_scorer(options[name])
    return _call(cls, _in_groups(options), "strategy", engine)


def strategy_class(spec: Any) -> type:
    """Finds the class of a strategy, as in ``build_strategy``.

    Raises:
        ValueError: there is no such strategy.
    """
    return _read(spec, "strategy")[0]


def takes_scorer(spec: Any) -> bool:
    """Returns whether a strategy, as in ``build_strategy``, has the option ``scorer``.

    Example:
        >>> takes_scorer("mcts"), takes_scorer("HiddenReasoning")
        (True, False)
    """
    return "scorer" in _options(strategy_class(spec))


def build_scorer(spec: Any) -> Any:
    """Builds a scorer.

    Args:
        spec: a scorer; the folder or hub id of a reward model, process reward model or critic; the dotted path of a
            reward function; a scorer's class name; or a mapping with ``class_path`` and ``init_args``, where ``terms``
            of a ``WeightedScorer`` are pairs of these with weights, and the ``judge`` of a ``JudgeScorer`` and the
            ``function`` of a ``VerifierScorer`` may be written as ``class_path`` and ``init_args``, too.

    Raises:
        ValueError: there is no such scorer or model.
        TypeError: it has no such option.
    """
    if _is_scorer(spec):
        return spec
    cls, options = _read(scorer_spec(spec), "scorer")
    if "terms" in options:
        options["terms"] = [(build_scorer(term), weight) for term, weight in options["terms"]]
    for name in ("judge", "function"):
        if name in options:
            options[name] = _object(options[name], name)
    return _call(cls, options, "scorer")


def strategy_spec(spec: Any, scorer: Any = None, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes a strategy in full, and checks its names and options without building it.

    Args:
        spec: as in ``build_strategy``.
        scorer: added to ``init_args`` if they name none.
        further: options that override those of ``init_args``; ``{"budget": {"tokens": 9}}`` overrides one of a group.

    Returns:
        ``class_path`` and ``init_args``, with scorers and the strategy within written in full as well.

    Raises:
        ValueError: there is no such strategy or scorer, or a value is not allowed.
        TypeError: one of them has no such option.

    Example:
        >>> strategy_spec("best_of_n", scorer="LikelihoodScorer", further={"n": 4})["init_args"]
        {'n': 4, 'scorer': {'class_path': 'LikelihoodScorer', 'init_args': {}}}
    """
    written = _with(_written(spec, "strategy"), further)
    cls, options = _read(written, "strategy")
    if (inner := options.pop("engine", None)) is not None:
        # A strategy that scores nothing itself leaves the scorer to the one within.
        own = "scorer" in _options(cls)
        inner, scorer = strategy_spec(inner, None if own else scorer), scorer if own else None
    for name, given in (("scorer", options.get("scorer") or scorer), ("value", options.get("value"))):
        if given is not None:
            options[name] = given if _is_scorer(given) else scorer_spec(given)
    _check_names(cls, options, "strategy")
    _in_groups(options)
    return {**written, "init_args": options if inner is None else {**options, "engine": inner}}


def with_options(spec: Any, further: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides options of a strategy's ``init_args``, without checking them.

    Raises:
        ValueError: there is no such strategy.

    Example:
        >>> with_options("mcts", {"simulations": 8})
        {'class_path': 'MCTS', 'init_args': {'simulations': 8}}
    """
    return _with(_written(spec, "strategy"), further)


def scorer_spec(spec: Any, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes a scorer in full, and checks its names without building it; a model's folder becomes the class for it.

    Args:
        spec: as in ``build_scorer``, but no object.
        further: options that override those of ``init_args``.

    Raises:
        ValueError: there is no such scorer or model.
        TypeError: it has no such option.
    """
    named = isinstance(spec, str) and not _is_class(spec)
    written = _with(_of_name(spec) if named else _written(spec, "scorer"), further)
    cls, options = _read(written, "scorer")
    _check_names(cls, options, "scorer")
    if "terms" in options:
        terms = [(term if _is_scorer(term) else scorer_spec(term), weight) for term, weight in options["terms"]]
        written["init_args"]["terms"] = terms
    return written


def compressor_spec(spec: Any, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes a compressor in full, and checks its names without building it.

    Args:
        spec: a class name such as ``SinkWindow`` or ``sink_window``, also cut (``trunc``); the folder of a learned
            compressor; or ``class_path`` and ``init_args``.
        further: options that override those of ``init_args``.

    Returns:
        ``class_path`` and ``init_args``; a folder becomes the option ``compressor`` of ``ContextCompressor``.

    Raises:
        ValueError: there is no such compressor.
        TypeError: it has no such option.

    Example:
        >>> compressor_spec("truncation", {"ratio": 8})
        {'class_path': 'Truncation', 'init_args': {'ratio': 8}}
    """
    if isinstance(spec, str) and (Path(spec).expanduser().exists() or "/" in spec):
        spec = {"class_path": _LEARNED, "init_args": {"compressor": spec}}
    written = _with(_written(spec, "compressor"), further)
    cls, options = _read(written, "compressor")
    if written["class_path"] == _LEARNED:
        if others := sorted(set(options) - {"compressor"}):
            raise TypeError(f"a learned compressor has its own options: leave out {others[0]!r}")
        return written
    _check_names(cls, options, "compressor")
    return written


def build_compressor(spec: Any, model: Any, tokenizer: Any, source: str | None = None) -> Any:
    """Builds a compressor of contexts for a model.

    Args:
        spec: as in ``compressor_spec``.
        model: continues after compressed contexts.
        tokenizer: of the model.
        source: its folder or hub id, by which a compressor that it was trained with is known.

    Raises:
        ValueError: there is no such compressor, a value is not allowed, or it was trained with another model.
        TypeError: it has no such option.

    Example:
        >>> build_compressor({"class_path": "Truncation", "init_args": {"ratio": 8}}, model, tokenizer).ratio
        ... # doctest: +SKIP
        8
    """
    written = compressor_spec(spec)
    cls, options = _read(written, "compressor")
    if written["class_path"] == _LEARNED:
        return compressor_of(options["compressor"], model, source)
    given = (model, tokenizer) if "tokenizer" in inspect.signature(cls).parameters else (model,)
    return cls(*given, **options)


def _is_scorer(spec: Any) -> bool:
    return callable(getattr(spec, "score", None)) and not inspect.isclass(spec)


def _of_name(name: str) -> dict[str, Any]:
    """Finds out what a text names that is no class: a reward function, or a model."""
    if not Path(name).exists():
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            load_attribute(name)
            return {"class_path": "VerifierScorer", "init_args": {"function": name}}
        if hint := advise(name, _names()):
            raise ValueError(f"there is no scorer {name!r}{hint}")
    place = locate(name, what="scorer")
    method = read_head_options(place).get("method") if Path(place).is_dir() else None
    classes = {"process_reward": "ProcessScorer", "value": "ValueScorer"}
    return {"class_path": classes.get(str(method), "RewardScorer"), "init_args": {"model": name}}


def _written(spec: Any, what: str) -> dict[str, Any]:
    cls, options = _read(spec, what)
    own = spec if isinstance(spec, str) else spec["class_path"]
    is_here = getattr(import_module(__package__), cls.__name__, None) is cls
    return {"class_path": cls.__name__ if is_here else own, "init_args": options}


def _with(written: dict[str, Any], further: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides options, those of groups one by one."""
    options = dict(written["init_args"])
    for name, value in (further or {}).items():
        group = options.get(name)
        options[name] = {**group, **value} if isinstance(value, Mapping) and isinstance(group, Mapping) else value
    return {"class_path": written["class_path"], "init_args": options}


def _in_groups(options: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the groups ``budget`` and ``sampling`` of their options."""
    groups = {"budget": Budget, "sampling": SamplingParams}
    return {
        name: _call(groups[name], value, name) if name in groups and isinstance(value, Mapping) else value
        for name, value in options.items()
    }


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
    own = "." in name and "/" not in name and name.rpartition(".")[2][:1].isupper()
    return own or _plain(name) in map(_plain, _names())


def _names() -> list[str]:
    """Lists the classes of this room that a configuration may name."""
    room = import_module(__package__)
    return [name for name in room.__all__ if inspect.isclass(getattr(room, name, None))]


def _plain(name: str) -> str:
    """Compares names in any spelling: ``MCTS``, ``mcts``, ``BestOfN``, ``best_of_n``."""
    return name.replace("_", "").replace("-", "").lower()


def _read(spec: Any, what: str) -> tuple[type, dict[str, Any]]:
    if isinstance(spec, str):
        return _class(spec, what), {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"{what} is {spec!r}: write a class name, or class_path and init_args")
    if others := sorted(set(spec) - {"class_path", "init_args"}):
        raise ValueError(f"{what} has the key {others[0]!r}: write class_path and init_args")
    return _class(spec["class_path"], what), dict(spec.get("init_args") or {})


def _class(name: str, what: str) -> Any:
    """Finds a class by its name in this room, in any spelling, cut where it is clear, or by its dotted path."""
    method, room = _METHODS[what], import_module(__package__)
    fitting = [n for n in _names() if callable(getattr(getattr(room, n), method, None))]
    near = [n for n in _names() if _plain(n) == _plain(name)]
    if not near and name and name == name.lower():  # as on a command line
        near = [n for n in fitting if _plain(n).startswith(_plain(name))]
    found: Any = load_attribute(name) if "." in name else getattr(room, near[0] if len(near) == 1 else name, None)
    if not inspect.isclass(found) or not callable(getattr(found, method, None)):
        raise ValueError(f"there is no {what} {name!r}{advise(name, [*fitting, *map(str.lower, fitting)])}")
    return found


def _call(cls: type, options: Mapping[str, Any], what: str, *arguments: Any) -> Any:
    """Builds an object; an option that it does not have is named with the nearest that it has."""
    _check_names(cls, options, what)
    return cls(*arguments, **options)


def _check_names(cls: type, options: Mapping[str, Any], what: str) -> None:
    known = {name: needed for name, needed in _options(cls).items() if what != "compressor" or name not in _GIVEN}
    for name in options:
        if name not in known:
            instead = advise(str(name), known) or f": it has {', '.join(known)}"
            raise TypeError(f"{what} {cls.__name__} has no option {name!r}{instead}")
    for name, is_required in known.items():
        if is_required and name not in options:
            raise ValueError(f"{what} {cls.__name__} needs the option {name!r}: give it")


def _options(cls: type) -> dict[str, bool]:
    """Lists the options of a class, and whether it needs them; of its bases too where it takes ``**options``."""
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        for p in parameters:
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD):
                found.setdefault(p.name, p.default is p.empty)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: is_required for name, is_required in found.items() if name not in ("self", "engine")}
