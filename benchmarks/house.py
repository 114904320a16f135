"""Measures the source: packages and the imports between them, size, inheritance depth, comments, docstrings.

    python benchmarks/house.py             # the numbers
    python benchmarks/house.py --picture   # the rooms, one floor a line, with the imports of each
    python benchmarks/house.py --twice     # the places of code that occurs twice
    python benchmarks/house.py --rooms     # files and lines of each room

``CONTRIBUTING.md`` lists the floors, and ``tests/test_house.py`` checks the code against them.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_lightning"
# Ground first: a room imports from its own floor and from those below.
FLOORS = (
    "utils",
    "losses",
    "sequences",
    "data",
    "models",
    "distributed",
    "metrics",
    "core",
    "inference",
    "rewards",
    "rl",
    "datamodules",
    "evaluation",
    "generation",
    "merging",
    "export",
    "loggers",
    "self_improvement",
    "callbacks",
    "modules",
    "cli",
    "labeling",
    "planning",
    "pipeline",
)
Graph = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """The modules of the package by their dotted names."""
    found = {}
    for top in (ROOT / PACKAGE, ROOT / "datamodules", ROOT / "callbacks"):
        for path in sorted(top.rglob("*.py")):
            inside = path.relative_to(ROOT).with_suffix("").parts
            parts = inside if inside[0] == PACKAGE else (PACKAGE, *inside)
            if parts[:2] in ((PACKAGE, "datamodules"), (PACKAGE, "callbacks")) and inside[0] == PACKAGE:
                continue  # reached through a symbolic link
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def methods() -> dict[str, str]:
    """The files of the methods by the names of their classes, as ``modules/__init__.py`` exports them."""
    tree = ast.parse((ROOT / PACKAGE / "modules" / "__init__.py").read_text(encoding="utf-8"))
    taken = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: str(node.module) for node in taken for alias in node.names}


def imports(files: dict[str, Path], *, deferred: bool = True) -> Graph:
    """The modules of the package that each module imports.

    With ``deferred`` also inside of functions and for type checkers; otherwise only the imports that run when it is
    loaded.

    Names of a package are looked up in its ``__init__``: ``from ..inference import Budget`` imports
    ``inference.budget``.
    """
    named = {name: list(_named_imports(name, path, deferred)) for name, path in files.items()}
    faces = {name: dict(named[name]) for name, path in files.items() if path.name == "__init__.py"}

    def resolved(full: str, seen: frozenset[str] = frozenset()) -> str | None:
        if full in files or full in seen:
            return full if full in files else None
        origin, _, name = full.rpartition(".")
        target = faces.get(origin, {}).get(name)
        found = resolved(target, seen | {full}) if target else None
        return found or (origin if origin in files else None)

    return {name: {other for _, full in pairs if (other := resolved(full))} for name, pairs in named.items()}


def _statements_run(node: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    """All nodes of a tree, or the ones that run when the module is loaded: not in functions, nor for type checkers."""
    yield node
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        if deferred or not (is_function or for_types):
            yield from _statements_run(child, deferred)


def _named_imports(name: str, path: Path, deferred: bool) -> Iterator[tuple[str, str]]:
    """Each name that a module imports from the package, and the dotted place that it is imported from."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in _statements_run(ast.parse(path.read_text(encoding="utf-8")), deferred):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.asname or alias.name, f"{origin}.{alias.name}"


def room(module: str) -> str:
    """The room of a module: the first folder or file below the package, nothing for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward(graph: Graph) -> list[tuple[str, str]]:
    """Imports from a floor above, as pairs of modules."""
    level = {name: number for number, name in enumerate(FLOORS)}
    return sorted(
        (name, other)
        for name, others in graph.items()
        for other in others
        if room(name) in level and room(other) in level and level[room(other)] > level[room(name)]
    )


def closure(graph: Graph, start: str) -> set[str]:
    """A module and all its direct and indirect imports; a package's ``__init__`` is not followed."""
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph.get(name, set())
    return found


def length(node: ast.AST) -> int:
    """Number of lines of a function or class without its docstring."""
    lines = (node.end_lineno or 0) - node.lineno + 1  # type: ignore[attr-defined]
    text = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
    return lines - (text.count("\n") + 1 if text else 0)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstrings(path: Path) -> Iterator[str]:
    """All docstrings of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def comment_lines(path: Path) -> int:
    """Number of lines that hold only a comment."""
    with tokenize.open(path) as file:
        tokens = tokenize.generate_tokens(file.readline)
        return sum(token.type == tokenize.COMMENT and token.line.strip().startswith("#") for token in tokens)


def code_lines(path: Path) -> int:
    """Number of lines that are neither empty, nor a comment, nor of a docstring."""
    text = path.read_text(encoding="utf-8")
    written = sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
    of_docstrings = sum(sum(bool(line.strip()) for line in text.splitlines()) for text in docstrings(path))
    return written - of_docstrings


def depth(files: dict[str, Path]) -> tuple[int, str]:
    """The longest chain of the package's own classes, and the class at its end."""
    bases: dict[str, list[str]] = {}
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def below(name: str) -> int:
        return 1 + max((below(base) for base in bases[name] if base in bases), default=0)

    return max((below(name), name) for name in bases)


def duplicated(files: dict[str, Path], size: int = 6) -> list[tuple[str, str]]:
    """The pairs of places ``file:line`` that share at least ``size`` lines of code, imports and docstrings aside."""
    seen: dict[tuple[str, ...], tuple[str, int, int]] = {}  # the block's lines -> file, line, position in the file
    pairs: list[tuple[str, str]] = []
    last: tuple[str, int, str, int] | None = None  # where the block before this one was found, here and there
    for path in files.values():
        name, written = str(path.relative_to(ROOT)), list(_statements(path))
        for at in range(len(written) - size + 1):
            block = tuple(text for _, text in written[at : at + size])
            if block not in seen:
                seen[block] = name, written[at][0], at
                continue
            other, line, there = seen[block]
            # A longer block is found at each of its lines, and counts once.
            if last != (name, at - 1, other, there - 1):
                pairs.append((f"{name}:{written[at][0]}", f"{other}:{line}"))
            last = name, at, other, there
    return pairs


def _statements(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of code of a file with their numbers, without imports, docstrings, comments and closing brackets."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), start=1):
        code = line.strip()
        if number not in left_out and code.strip("()[]{},:") and not code.startswith("#"):
            yield number, code


def lines(paths: Iterable[Path]) -> int:
    """Total number of lines of files."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def numbers() -> dict[str, str]:
    """All measurements, by name."""
    files = sources()
    graph = imports(files)
    texts = [text for path in files.values() for text in docstrings(path)]
    comments, code = (sum(map(count, files.values())) for count in (comment_lines, code_lines))
    chain, name = depth(files)
    found = {
        "files of modules/": str(sum(room(module) == "modules" and module.count(".") == 2 for module in files)),
        "files, lines in all": f"{len(files)}, {lines(files.values())}",
        "rooms, arrows between them": f"{len({room(m) for m in files} - {''})}, {len(arrows(graph))}",
        "imports from a floor above": str(len(upward(graph))),
        "depth of inheritance": f"{chain} ({name})",
        "comment lines per code line": f"{comments / code:.3f}",
        "blocks of 6 lines that occur twice": str(len(duplicated(files))),
        "docstrings, and how many begin with "
        "'What'": f"{len(texts)}, {sum(text.startswith('What ') for text in texts)}",
    }
    loaded = imports(files, deferred=False)
    for method in ("sft", "dpo", "grpo"):
        reached = closure(loaded, f"{PACKAGE}.modules.{method}") - {PACKAGE}
        found[f"import closure of {method}"] = f"{len(reached)} files, {lines(files[m] for m in reached)} lines"
    return found


def sizes() -> dict[str, tuple[int, int]]:
    """Files and lines of each room, ground first; what is on no floor comes last."""
    found: dict[str, list[Path]] = {}
    for name, path in sources().items():
        found.setdefault(room(name) or PACKAGE, []).append(path)
    order = [*FLOORS, *sorted(set(found) - set(FLOORS))]
    return {name: (len(found[name]), lines(found[name])) for name in order if name in found}


def arrows(graph: Graph) -> Counter[tuple[str, str]]:
    """Counts the imports of each room from another."""
    pairs = ((room(name), room(other)) for name, others in graph.items() for other in others)
    return Counter((one, two) for one, two in pairs if one != two and one in FLOORS and two in FLOORS)


def picture() -> str:
    """Formats the floors as text, top first, each with the rooms that it imports from."""
    found = arrows(imports(sources()))
    rows = []
    for name in reversed(FLOORS):
        below = [two for two in reversed(FLOORS) if (name, two) in found]
        rows.append(f"{name:17s} uses {', '.join(below) or 'nothing'}")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["--picture"]:
        print(picture())
    elif sys.argv[1:] == ["--twice"]:
        print("\n".join(f"{place:55s} {other}" for place, other in duplicated(sources())))
    elif sys.argv[1:] == ["--rooms"]:
        print("\n".join(f"{name:20s} {files:4d} {size:6d}" for name, (files, size) in sizes().items()))
    elif sys.argv[1:]:
        raise SystemExit(f"unknown argument {sys.argv[1]!r}: allowed are --picture, --twice and --rooms")
    else:
        print("\n".join(f"{name:40s} {value}" for name, value in numbers().items()))
