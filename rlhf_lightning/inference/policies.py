"""Policies by the options that name them: a folder or hub id, or several of them that sample as one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..models import load_adapted_tokenizer
from ..utils.imports import load_attribute
from ..utils.messages import did_you_mean
from .engine import LocalEngine
from .ensemble import EnsemblePolicy, check_combination, shared_tokenizer

# Lists first: a command line's parser takes the first that fits, and every value is a text, too.
PolicySpec: TypeAlias = list[str] | dict[str, Any] | str
# Options of an ensemble that come from where it is used.
_GIVEN = ("tokenizer", "dtype", "device")
# Options that change no sample, and the names of the models.
_NOT_RESULTS = ("models", "max_batch_tokens")
_FORMS = "write a folder or hub id, a list of them, or class_path: EnsemblePolicy with init_args"


def policy_spec(spec: Any, name: str = "model") -> str | dict[str, Any]:
    """Checks what names a policy, without loading anything, and writes an ensemble in full.

    Args:
        spec: a folder or hub id; a list of them, whose probabilities are averaged; or ``class_path``
            (``EnsemblePolicy``, or the dotted path of a class derived from it) and ``init_args``: ``models``, and
            further options such as ``combine`` and ``weights``.
        name: of the option, for messages.

    Returns:
        The folder or hub id, or ``class_path`` and ``init_args``.

    Raises:
        ValueError: it has another form, or an option of the ensemble does not exist or has a value that is not allowed.

    Example:
        >>> policy_spec(["runs/a/model", "runs/b/model"])
        {'class_path': 'EnsemblePolicy', 'init_args': {'models': ['runs/a/model', 'runs/b/model']}}
        >>> policy_spec("runs/a/model")
        'runs/a/model'
    """
    if isinstance(spec, str | Path) and str(spec):
        return str(spec)
    if isinstance(spec, list | tuple):
        spec = {"class_path": EnsemblePolicy.__name__, "init_args": {"models": list(spec)}}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"{name} is {spec!r}: {_FORMS}")
    if others := sorted(map(str, set(spec) - {"class_path", "init_args"})):
        raise ValueError(f"{name} has the key {others[0]!r}: write class_path and init_args")
    cls, options = _class(spec["class_path"], name), dict(spec.get("init_args") or {})

    allowed = [option for option in inspect.signature(cls).parameters if option not in _GIVEN]
    for key in options:
        if key in _GIVEN:
            raise ValueError(f"init_args of {name} has {key!r}, which where the ensemble is used says: leave it out")
        if key not in allowed:
            raise ValueError(f"init_args of {name} has no key {key!r}{did_you_mean(str(key), allowed)}")
    models = options.get("models")
    named = isinstance(models, list | tuple) and all(isinstance(model, str | Path) and str(model) for model in models)
    if not models or not named:
        raise ValueError(f"{name} combines the models {models!r}: list at least one folder or hub id")
    options["models"] = [str(model) for model in models]
    check_combination(len(models), options.get("combine", "arithmetic"), options.get("weights"))
    return {"class_path": spec["class_path"], "init_args": options}


def _class(path: str, name: str) -> type[EnsemblePolicy]:
    found = EnsemblePolicy if path == EnsemblePolicy.__name__ else load_attribute(path)
    if not (inspect.isclass(found) and issubclass(found, EnsemblePolicy)):
        raise ValueError(
            f"class_path of {name} is {path!r}, which is no EnsemblePolicy: a search is named by strategy, a server by "
            "server, and any other model by its folder"
        )
    return found


def policy_models(spec: Any) -> list[str]:
    """Returns the folders and hub ids that a policy samples from.

    Example:
        >>> policy_models(["a", "b"]), policy_models("a")
        (['a', 'b'], ['a'])
    """
    written = policy_spec(spec)
    return [written] if isinstance(written, str) else list(written["init_args"]["models"])


def policy_name(spec: Any) -> str:
    """Returns a text that tells a policy from others.

    Example:
        >>> policy_name(["a", "b"])
        'a + b'
        >>> policy_name({"class_path": "EnsemblePolicy", "init_args": {"models": ["a", "b"], "combine": "vote"}})
        'a + b, combine=vote'
    """
    return ", ".join([" + ".join(policy_models(spec)), *combination(spec)])


def combination(spec: Any) -> list[str]:
    """Returns the options that a policy's samples depend on, next to its models."""
    written = policy_spec(spec)
    if isinstance(written, str):
        return []
    own = {} if written["class_path"] == EnsemblePolicy.__name__ else {"class_path": written["class_path"]}
    options = own | {name: value for name, value in sorted(written["init_args"].items()) if name not in _NOT_RESULTS}
    return [f"{name}={value}" for name, value in options.items()]


def policy_tokenizer(spec: Any, adapter: str | None = None) -> Any:
    """Loads the tokenizer of a policy; that of an ensemble is its first model's, whose tokens all others must have.

    Args:
        spec: as in :func:`policy_spec`.
        adapter: folder or hub id of an adapter on a single model.

    Raises:
        ValueError: no model has a tokenizer, or two tokenizers of an ensemble differ in a token.
    """
    written = policy_spec(spec)
    if isinstance(written, str):
        return load_adapted_tokenizer(written, adapter)
    return shared_tokenizer(policy_models(written), None)


def check_single(spec: Any, name: str, why: str) -> None:
    """Refuses an ensemble where one model is needed.

    Args:
        spec: as in :func:`policy_spec`.
        name: of the option.
        why: ends the message: what needs one model, and what to write instead.

    Raises:
        ValueError: it names several models as one.

    Example:
        >>> check_single(["a", "b"], "model", "and a GGUF file holds one: merge them first")
        Traceback (most recent call last):
        ValueError: model is an ensemble of 'a' and 'b', and a GGUF file holds one: merge them first
    """
    if not isinstance(spec, str | Path):
        models = " and ".join(map(repr, policy_models(spec)))
        raise ValueError(f"{name} is an ensemble of {models}, {why}")


def build_policy(spec: Any, *, dtype: str = "auto", device: Any = None, **options: Any) -> LocalEngine | EnsemblePolicy:
    """Loads what samples: a model with its tokenizer, or several as one.

    Args:
        spec: as in :func:`policy_spec`.
        dtype: of the weights; see ``LocalEngine.from_pretrained``.
        device: where they run; by default the GPU if there is one.
        options: further ones of ``LocalEngine.from_pretrained``; of an ensemble ``max_batch_tokens`` alone, which its
            ``init_args`` override.

    Raises:
        ValueError: something cannot be loaded, or tokenizers or vocabularies of an ensemble differ.

    Example:
        >>> build_policy(["runs/a/model", "runs/b/model"]).generate(["3+4=?"])[0][0].text  # doctest: +SKIP
        '7'
    """
    written = policy_spec(spec)
    if isinstance(written, str):
        return LocalEngine.from_pretrained(written, dtype=dtype, device=device, **options)
    arguments = {**options, **written["init_args"]}
    return _class(written["class_path"], "model")(dtype=dtype, device=device, **arguments)
