"""The table of faults names tests and files that there are."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md")
FOLDERS = ("rlhf_lightning", "callbacks", "datamodules", "tests", "benchmarks", "configs")
# A file, the name of something in it, or both; ``...`` and ``*`` stand for the rest of a name.
TEST = re.compile(r"([\w/.{},]*\w\.py|[\w/]+(?=::))?((?:::[\w.*]+)*)")


@cache
def files() -> frozenset[str]:
    """The files of the product, by their paths below its root; links are followed once."""
    found = {path.name for path in ROOT.glob("*.*")}
    for folder in FOLDERS:
        found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    return frozenset(found)


@cache
def names(file: str) -> frozenset[str]:
    """Names that a file of code defines, at any depth."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def is_there(name: str, known: frozenset[str]) -> bool:
    beginning = name.rstrip(".*")
    return name in known or (beginning != name and any(one.startswith(beginning) for one in known))


def wrong_tests(cell: str) -> list[str]:
    """Lists missing tests of a cell: files are whole paths, and a bare ``::name`` belongs to the last one."""
    found, last = [], None
    for match in TEST.finditer(cell):
        file, rest = match[1], [name for name in match[2].split("::") if name]
        if file is not None:
            last = file if file in files() else None
            found += [] if last else [file]
        if last is not None:
            found += [f"{last}::{name}" for name in rest if not is_there(name, names(last))]
    return found


def wrong_places(cell: str) -> list[str]:
    """Files of a cell that there are not, by whole paths or their ends, and what stands in none of them."""
    found = []
    for path, name in re.findall(r"([\w/.{},]*\w\.(?:py|md|yaml))(?:::(\w+))?", cell):
        held = [file for file in files() if file == path or file.endswith(f"/{path}")]
        if path.endswith(".py") and name:
            held = [file for file in held if name in names(file)]
        if not held and path not in ("config.yaml", "default.yaml"):
            found.append(f"{path}::{name}" if name else path)
    return found


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_test_and_file_of_the_table_exists() -> None:
    table = rows()
    assert len(table) > 100
    assert [row[0] for row in table if len(row) != 4 or not all(row)] == []
    assert {row[0]: wrong for row in table if (wrong := wrong_tests(row[1]))} == {}
    assert {row[0]: wrong for row in table if (wrong := wrong_places(row[3]))} == {}
    assert len({(row[0], row[1]) for row in table}) == len(table)


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("tests/faults/test_readme_of_faults.py::test_every_test_and_file_of_the_table_exists, ::wrong_tests", []),
        ("tests/faults/test_readme_of_faults.py::test_every_..., ::wrong_*", []),
        ("tests/faults/test_readme_of_faults.py (slow), ::gone", ["tests/faults/test_readme_of_faults.py::gone"]),
        ("tests/faults/test_gone.py::rows", ["tests/faults/test_gone.py"]),
        ("test_a2::rows", ["test_a2"]),
        ("test_readme_of_faults.py::rows", ["test_readme_of_faults.py"]),
    ],
)
def test_what_is_gone_is_found(cell: str, wrong: list[str]) -> None:
    assert wrong_tests(cell) == wrong


def test_places_that_are_gone_are_found() -> None:
    assert wrong_places("utils/files.py::claim, files.py, rl/gone.py, utils/files.py::gone") == [
        "rl/gone.py",
        "utils/files.py::gone",
    ]
