"""Checks of programs without running them: each check against a program that passes and one that fails it."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from rlhf_lightning.rewards import StaticCodeChecks
from rlhf_lightning.rewards.static_checks import CODE_CHECKS, _unbound

PAIRS: dict[str, tuple[str, str]] = {
    "entry_point": ("def add(a, b):\n    return a + b", "def plus(a, b):\n    return a + b"),
    "names": ("def f(x):\n    return [y for y in x if y]", "def f(x):\n    return z"),
    "imports": ("from math import sqrt\nprint(sqrt(2))", "import os.path\nprint(os.path)"),
    "calls": ("print(len('a'))", "eval('1')"),
    "handlers": ("try:\n    print(1)\nexcept ValueError:\n    print(2)", "try:\n    print(1)\nexcept:\n    print(2)"),
    "loops": ("while True:\n    break", "while 1:\n    print(1)"),
}


@pytest.mark.parametrize("check", CODE_CHECKS)
def test_each_check_tells_programs_apart(check: Any) -> None:
    good, bad = PAIRS[check]
    reward = StaticCodeChecks([check])
    assert reward(["p", "p"], [good, bad], entry_point=["add", "add"]) == [1.0, 0.0]
    assert reward.failures(bad, "add") == [check]
    assert reward.failures(good, "add") == []


def test_the_share_of_checks_that_hold() -> None:
    reward = StaticCodeChecks(["names", "calls", "imports", "loops"])
    assert reward(["p"], ["import os\neval(unknown)"]) == [0.25]


@pytest.mark.parametrize(
    "program", ["def f(:", "x = '\x00'", "(" * 5000 + ")" * 5000], ids=["syntax", "null byte", "depth"]
)
def test_what_cannot_be_parsed_gets_nothing(program: str) -> None:
    assert StaticCodeChecks()(["p"], [program]) == [0.0]
    assert StaticCodeChecks().failures(program) == ["syntax"]


@pytest.mark.parametrize(
    "program",
    [
        "import numpy as np\nnp.zeros(3)",
        "from math import *\nsqrt(2)",
        "class A:\n    b = 1\n    def c(self, *args, **kwargs): return self, args, kwargs",
        "try:\n    pass\nfinally:\n    x = 1\nprint(x, __name__)",
        "match [1]:\n    case [first, *rest]: print(first, rest)\n    case {'a': a, **others}: print(a, others)",
        "def f():\n    global g\n    g = 1\nf()\nprint(g, (h := 2), h)",
        "async def f(x):\n    async for y in x:\n        yield lambda z=y: z",
        "with open('f') as file:\n    for a, (b, *c) in file: print(a, b, c)",
    ],
)
def test_names_of_right_programs_are_bound(program: str) -> None:
    assert StaticCodeChecks(["names"])(["p"], [program]) == [1.0]


def test_handlers_that_raise_again_hide_nothing() -> None:
    checks = StaticCodeChecks(["handlers"])
    assert checks(["p"], ["try:\n    print(1)\nexcept BaseException:\n    print(2)\n    raise"]) == [1.0]
    assert checks(["p"], ["try:\n    print(1)\nexcept ValueError:\n    pass"]) == [0.0]


def test_fenced_programs_and_rows_without_an_entry_point() -> None:
    fence = "`" * 3
    text = f"Here it is:\n{fence}python\ndef f(x):\n    return x\n{fence}\n"
    assert StaticCodeChecks(["entry_point", "names"])(["p", "p"], [text, text], entry_point=["f", None]) == [1.0, 1.0]
    assert StaticCodeChecks(require_fence=True)(["p"], ["x = 1"]) == [0.0]


@pytest.mark.parametrize(
    ("checks", "word"), [([], "at least one"), (["name"], "did you mean 'names'"), ("names", "list")]
)
def test_mistakes(checks: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        StaticCodeChecks(checks)


@pytest.mark.parametrize(
    ("program", "is_there"),
    [
        ("from typing import Callable\nsolve: Callable[[int], int] = lambda n: n", True),
        ("solve, other = max, min", True),
        ("if True:\n    def solve(): return 1", True),
        ("from functools import reduce as solve", True),
        ("from typing import Callable\nsolve: Callable", False),
        ("def other():\n    def solve(): return 1", False),
        ("other = [solve for solve in (1, 2)]", False),
    ],
)
def test_an_entry_point_is_any_name_of_the_top_level(program: str, is_there: bool) -> None:
    assert StaticCodeChecks(["entry_point"])(["p"], [program], entry_point=["solve"]) == [float(is_there)]


def test_a_missing_entry_point_of_a_table_is_not_checked() -> None:
    assert StaticCodeChecks(["entry_point"])(["p"], ["x = 1"], entry_point=[float("nan")]) == [1.0]


def test_names_of_classes_and_type_parameters_are_bound() -> None:
    program = "class A:\n    name = __qualname__, __module__\n    def f(self) -> T: return __class__"
    assert _unbound(ast.parse(program)) == {"T"}
    # Python before 3.12 has no such node.
    kind = getattr(ast, "TypeVar", None) or type("TypeVar", (ast.AST,), {"_fields": ("name",)})
    tree = ast.parse(program)
    tree.body.append(kind(name="T"))
    assert _unbound(tree) == set()
