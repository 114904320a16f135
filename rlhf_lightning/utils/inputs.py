"""Finds and hashes the inputs of a configuration: files, folders, an adapter's base, the source of named functions."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .files import content_hash
from .imports import find_own_modules
from .packaged_configs import packaged_config

# Options whose value may be a folder or a task instead of a hub id. Files are looked for in every option.
_SOURCES = (
    *("model", "models", "base", "tokenizer", "adapter", "draft", "scorer", "judge", "compressor"),
    *("solver", "opponents"),
    *("train", "val", "test", "predict", "prompts", "rows", "input", "evaluation"),
)
# Options that name outputs.
_WRITTEN = ("output", "dirpath", "save_dir", "default_root_dir", "log_dir", "folder", "filename", "root_dir")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_PACKAGE = Path(__file__).resolve().parents[1]


def input_hashes(config: Any) -> dict[str, str]:
    """Hashes all inputs of a configuration.

    Inputs are models (with the base model of an adapter), tokenizers, rows and prompts (with the folder in
    ``GSM8K_DIR``), every other file that is named anywhere, and the source of every user-defined function and class
    that is named by its dotted path, with the user's modules that it imports.

    Returns:
        Digests by the names in the configuration.
    """
    found: dict[str, str] = {}
    for key, value in _values(config):
        for name, path in _places(key, value):
            digest = content_hash(path)
            if digest is not None:
                found[name] = digest
        # A dotted path names code: its source is an input as much as a file of rows.
        if _DOTTED.fullmatch(value) and not Path(value).exists():
            files = own_sources(value)
            if files:
                digests = [f"{file.name}\0{content_hash(file)}\n" for file in files]
                found[f"source of {value}"] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def _values(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text of a configuration with its option."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _values(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _values(value, key)
    elif isinstance(config, str):
        yield key, config


def _places(key: str, value: str) -> Iterator[tuple[str, Path]]:
    """Yields the existing files and folders that a text may name, with their names."""
    name, _, query = value.partition("?")
    # In a query "+" means a space; in a folder's name it means "+".
    candidates = dict.fromkeys((value, name, *(part for _, part in parse_qsl(query.replace("+", "%2B")))))
    for candidate in candidates if key not in _WRITTEN else ():
        path = packaged_config(candidate) or Path(candidate).expanduser()
        try:
            known = path.is_file() or (key in _SOURCES and path.is_dir())
        except (OSError, ValueError):  # not a path: too long, or with a zero byte
            continue
        if candidate and known:
            yield candidate, path
            yield from _bases(candidate, path)

    # A folder that a task finds by an environment variable.
    if name.startswith("gsm8k:") and "path=" not in query and os.environ.get("GSM8K_DIR"):
        yield "GSM8K_DIR", Path(os.environ["GSM8K_DIR"]).expanduser()


def _bases(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the base model of an adapter, if it is a local folder."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return  # loading reports a damaged file
    if not isinstance(base, str) or not base:
        return
    # As the loader looks for it: packaged, as written, relative to the adapter.
    for path in (packaged_config(base), Path(base).expanduser(), folder / base):
        if path is not None and path.is_dir() and path.resolve() != folder.resolve():
            yield f"base of {name}", path
            yield from _bases(f"base of {name}", path)
            return


def own_sources(dotted: str) -> list[Path]:
    """Finds the user's source files of a dotted path, and the files that they import.

    Nothing is imported or run. Installed packages and Python itself are not listed: their versions are recorded.

    Args:
        dotted: ``package.module.name``.

    Returns:
        The files in a fixed order; empty if the path names no module of the user.
    """
    find_own_modules()
    waiting, seen = [dotted.partition(".")[0]], set()
    files: set[Path] = set()
    while waiting:
        # Whole packages, since a function may call anything in its own.
        root = waiting.pop()
        if root in seen or root in sys.stdlib_module_names:
            continue
        seen.add(root)
        for file in _files_of(root):
            files.add(file)
            waiting += _imports(file.read_bytes())
    return sorted(files)


def _files_of(root: str) -> list[Path]:
    """The files of a top-level module or package of the user, from where Python would import it."""
    for entry in sys.path:
        place = Path(entry or ".").resolve()
        package, module = place / root, place / f"{root}.py"
        if (package / "__init__.py").is_file() or (package.is_dir() and not module.is_file()):
            files = sorted(package.rglob("*.py"))
        else:
            files = [module] if module.is_file() else []
        # The first entry that has the name decides, as in an import.
        if files:
            return [] if any(package.is_relative_to(foreign) for foreign in _installed()) else files
    return []


def _installed() -> tuple[Path, ...]:
    """The folders of Python, of installed packages and of this package."""
    return (*(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")), _PACKAGE)


@functools.cache
def _imports(source: bytes) -> tuple[str, ...]:
    """The top-level names of the modules that a source imports; it is parsed once, and every stage of a run asks."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module.partition(".")[0])
    return tuple(dict.fromkeys(names))
