"""Reward for programs that pass checks which do not run them."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, get_args

from ..data.cell_checks import is_missing
from ..utils.messages import did_you_mean
from .code_tests import extract_program, parse_program

CodeCheck = Literal["entry_point", "names", "imports", "calls", "handlers", "loops"]
CODE_CHECKS: Final[tuple[CodeCheck, ...]] = get_args(CodeCheck)

# Modules and functions that reach out of a program, or hide what it does.
IMPORTS: Final = ("ctypes", "importlib", "multiprocessing", "os", "shutil", "signal", "socket", "subprocess", "sys")
CALLS: Final = ("__import__", "compile", "eval", "exec", "exit", "globals", "input", "open", "quit")

# Names within which others are local; names that modules and classes have without binding them; type parameters, by
# name because they are new in Python 3.12.
_SCOPES: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
_GIVEN: Final = ("__annotations__", "__class__", "__file__", "__module__", "__name__", "__qualname__")
_TYPE_PARAMETERS: Final = ("ParamSpec", "TypeVar", "TypeVarTuple")


class StaticCodeChecks:
    """Rewards a program with the share of static checks that it passes; one that is no Python gets 0.

    The program is parsed and never run, so that the checks are safe and cheap, and say nothing of what it computes:
    use them next to ``CodeTestsReward``.

    - ``entry_point``: the function or class that the row names is bound at the top level; not checked where the row
      names none.
    - ``names``: every name that is read is bound somewhere in the program, or is a builtin.
    - ``imports``: no module of ``forbidden_imports`` is imported.
    - ``calls``: no function of ``forbidden_calls`` is called by its name.
    - ``handlers``: no handler hides every error (``except:`` or ``except BaseException:``, or one whose body is
      ``pass``).
    - ``loops``: no ``while`` with a constant true condition is without ``break``, ``return``, ``raise`` and ``yield``.

    Args:
        checks: at least one of them.
        column: the row's column with the name of the entry point.
        forbidden_imports: names of modules, without their submodules' names.
        forbidden_calls: names of functions.
        require_fence: treat a completion without a fenced block as one without a program.

    Raises:
        ValueError: no check, or one that does not exist.

    Example:
        >>> checks = StaticCodeChecks(["names", "calls"])
        >>> checks(["p"] * 3, ["def f(x): return x", "eval(y)", "def f(:"])
        [1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        checks: Sequence[CodeCheck] = CODE_CHECKS,
        column: str = "entry_point",
        forbidden_imports: Sequence[str] = IMPORTS,
        forbidden_calls: Sequence[str] = CALLS,
        require_fence: bool = False,
    ) -> None:
        if isinstance(checks, str) or not checks:
            raise ValueError(f"checks is {checks!r}; give a list of at least one of {', '.join(CODE_CHECKS)}")
        for check in checks:
            if check not in CODE_CHECKS:
                raise ValueError(f"there is no check {check!r}{did_you_mean(str(check), CODE_CHECKS)}")
        self.checks = tuple(dict.fromkeys(checks))
        self.column = column
        self.forbidden_imports = frozenset(forbidden_imports)
        self.forbidden_calls = frozenset(forbidden_calls)
        self.require_fence = require_fence

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        """Scores each completion.

        Args:
            prompts: not read.
            completions: texts with a program each.
            columns: the rows' other columns; ``entry_point`` is read where it is there.

        Returns:
            Numbers from 0 to 1.
        """
        names = columns.get(self.column) or [None] * len(completions)
        return [self._share(text, name) for text, name in zip(completions, names, strict=True)]

    def failures(self, completion: str, entry_point: str | None = None) -> list[str]:
        """Returns the names of the checks that a program fails, ``syntax`` alone if it is no Python."""
        tree = self._parsed(completion)
        return ["syntax"] if tree is None else [name for name, ok in self._verdicts(tree, entry_point) if not ok]

    def _share(self, completion: str, entry_point: str | None) -> float:
        tree = self._parsed(completion)
        if tree is None:
            return 0.0
        verdicts = [ok for _, ok in self._verdicts(tree, entry_point)]
        return sum(verdicts) / len(verdicts) if verdicts else 1.0

    def _parsed(self, completion: str) -> ast.Module | None:
        program = extract_program(completion, require_fence=self.require_fence)
        return None if program is None else parse_program(program)

    def _verdicts(self, tree: ast.Module, entry_point: str | None) -> Iterator[tuple[str, bool]]:
        found: dict[str, Callable[[], bool]] = {
            "names": lambda: not _unbound(tree),
            "imports": lambda: not self.forbidden_imports & set(_imported(tree)),
            "calls": lambda: not self.forbidden_calls & set(_called(tree)),
            "handlers": lambda: not any(map(_hides_errors, ast.walk(tree))),
            "loops": lambda: not any(map(_never_ends, ast.walk(tree))),
        }
        for name in self.checks:
            if name != "entry_point":
                yield name, found[name]()
            elif entry_point is not None and not is_missing(entry_point):
                yield name, entry_point.split(".")[0] in _defined(tree)


def _defined(tree: ast.Module) -> set[str]:
    """Names that the top level binds to functions, classes or values, also within its ``if``, ``try`` and ``with``."""
    defined: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        # `solve: Callable` alone announces a value and binds none.
        if isinstance(node, ast.AnnAssign) and node.value is None:
            continue
        defined.update(_bound_by(node))
        if not isinstance(node, _SCOPES):
            nodes += ast.iter_child_nodes(node)
    return defined


def _unbound(tree: ast.Module) -> set[str]:
    """Names that are read and bound nowhere: scopes are not told apart, so that no right program is refused."""
    bound = {*dir(builtins), *_GIVEN}
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        bound.update(_bound_by(node))
    # After `from module import *` anything may be bound.
    return set() if "*" in bound else read - bound


def _bound_by(node: ast.AST) -> list[str]:
    """Names that a node binds, without its children; ``*`` for all those of a module."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.arg(arg=name):
            return [name]
        case ast.alias(name=name, asname=given):
            return [given or name.partition(".")[0]]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case _ if type(node).__name__ in _TYPE_PARAMETERS:
            return [str(vars(node)["name"])]
    return []


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _called(tree: ast.Module) -> Iterator[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return (function.id for function in calls if isinstance(function, ast.Name))


def _hides_errors(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    everything = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "BaseException")
    reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    return (everything and not reraises) or all(isinstance(inner, ast.Pass) for inner in node.body)


def _never_ends(node: ast.AST) -> bool:
    if not (isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and node.test.value):
        return False
    return not any(
        isinstance(n, ast.Break | ast.Return | ast.Raise | ast.Yield | ast.YieldFrom) for n in ast.walk(node)
    )
