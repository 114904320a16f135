"""The house: imports go down only, `modules/` holds methods only, files and functions stay short."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_lightning
from rlhf_lightning import modules

from .invariance.methods import METHODS, PACKED

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
assert _spec is not None
assert _spec.loader is not None
house = importlib.util.module_from_spec(_spec)
sys.modules["house"] = house
_spec.loader.exec_module(house)

# The most lines that each may have, and why it has more than 400.
LONG_FILES = {
    "rlhf_lightning/inference/engine.py": (482, "one engine: its options, its checks, and the layout that it runs in"),
    "rlhf_lightning/core/module.py": (701, "options, interface and Lightning hooks of every method, each a few lines"),
    "rlhf_lightning/data/loaders.py": (409, "three loaders and the state that a run is resumed from"),
}
LONG_FUNCTIONS = {
    "datamodules/base.py::__init__": "one line for each option",
    "rlhf_lightning/core/module.py::__init__": "one line for each option, and the parts",
    "rlhf_lightning/models/cpu_logprob_tiles.py::forward": "one pass over the tiles, and what its backward needs",
}


def test_imports_go_down_only():
    graph = house.imports(house.sources())
    assert {house.room(name) for name in graph} - {"", "__main__"} == set(house.FLOORS)
    assert house.upward(graph) == []


def test_methods_load_neither_compressors_nor_reward_models_that_they_do_not_need():
    loaded = house.imports(house.sources(), deferred=False)
    for method in ("sft", "dpo", "simpo", "kto"):
        reached = house.closure(loaded, f"rlhf_lightning.modules.{method}")
        assert not [name for name in reached if re.search("compress|summaries|reward_(model|head|ensemble)", name)]
    assert "rlhf_lightning.models.context_compressor" not in house.closure(loaded, "rlhf_lightning.modules.grpo")


def test_an_import_from_above_would_be_found():
    assert house.upward(
        {"rlhf_lightning.utils.files": {"rlhf_lightning.data.files"}, "rlhf_lightning.data.files": set()}
    )


def test_modules_are_the_methods():
    files = {path.stem for path in (ROOT / "rlhf_lightning" / "modules").glob("*.py")}
    assert files == {"__init__", *house.methods().values()}
    assert sorted(house.methods()) == sorted(modules.__all__)
    assert set(modules.__all__) < set(rlhf_lightning.__all__)


@pytest.mark.parametrize("name", modules.__all__)
def test_every_method_has_configs_and_is_in_the_matrix(name):
    folder = ROOT / "configs" / house.methods()[name]
    assert {"default.yaml", "tiny.yaml"} <= {path.name for path in folder.iterdir()}
    method = getattr(modules, name)
    assert any(issubclass(entry.module, method) for entry in (METHODS | PACKED).values())


def test_what_was_gained_is_kept():
    """Bounds of ``docs/design.md``'s numbers: a change may make them better, and these bounds with them."""
    files = house.sources()
    comments, code = (sum(map(count, files.values())) for count in (house.comment_lines, house.code_lines))
    assert comments / code >= 0.0275
    assert len(house.duplicated(files)) <= 17
    loaded = house.imports(files, deferred=False)
    limits = {"sft": (85, 15_300), "dpo": (93, 16_500), "grpo": (148, 27_700)}
    for method, (most_files, most_lines) in limits.items():
        reached = house.closure(loaded, f"rlhf_lightning.modules.{method}") - {"rlhf_lightning"}
        assert len(reached) <= most_files, method
        assert house.lines(files[name] for name in reached) <= most_lines, method


def test_every_line_of_the_usage_runs(capsys):
    usage = re.findall(r"^    (python benchmarks/house\.py.*?)  +#", house.__doc__, flags=re.MULTILINE)
    assert len(usage) == 4
    said = []
    for line in usage:
        runs = subprocess.run([sys.executable, *line.split()[1:]], capture_output=True, text=True, cwd=ROOT, check=True)
        said.append(runs.stdout)
    assert said[0].splitlines()[0].split() == ["files", "of", "modules/", str(len(modules.__all__))]
    assert said[1].strip() == house.picture()
    assert [tuple(line.split()) for line in said[2].splitlines()] == house.duplicated(house.sources())
    rooms = [line.split() for line in said[3].splitlines()]
    assert {name for name, *_ in rooms} >= set(house.FLOORS)
    total = f"{sum(int(files) for _, files, _ in rooms)}, {sum(int(size) for *_, size in rooms)}"
    assert total == house.numbers()["files, lines in all"]


def test_code_that_occurs_twice_is_found(tmp_path, monkeypatch):
    """Seven equal lines are one pair, at their first line; the same lines in another order are not."""
    lines = [f"x{n} = {n}" for n in range(7)]
    for name, written in {"a": ["a = 1", *lines], "b": [*lines, "b = 1"], "c": lines[::-1]}.items():
        (tmp_path / f"{name}.py").write_text("\n".join(written) + "\n")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.duplicated({name: tmp_path / f"{name}.py" for name in "abc"}) == [("b.py:1", "a.py:2")]


def test_files_are_short():
    """At most 400 lines; those that have more cannot grow, and one that has become short leaves the list."""
    sizes = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in house.sources().values()}
    assert {name for name, size in sizes.items() if size > 400} == set(LONG_FILES)
    for name, (most, _) in LONG_FILES.items():
        assert sizes[name] <= most, f"{name} has {sizes[name]} lines, {most} are allowed"


def test_functions_are_short():
    files = house.sources().values()
    long = {f"{p.relative_to(ROOT)}::{f.name}" for p in files for f in house.functions(p) if house.length(f) > 60}
    assert long == set(LONG_FUNCTIONS)


def test_inheritance_is_shallow():
    depth, deepest = house.depth(house.sources())
    assert depth <= 3, f"{deepest} is {depth} classes deep: share code by functions"


def test_contributing_lists_the_floors():
    text = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text())
    assert "ground first: " + ", ".join(f"`{floor}`" for floor in house.FLOORS) in text


def test_contributing_shows_the_picture():
    assert house.picture() in (ROOT / "CONTRIBUTING.md").read_text()


WRITTEN = ("rlhf_lightning", "datamodules", "callbacks", "examples", "tests", "benchmarks", "configs", "docs")
RETIRED = (
    "[Tt]hose that",
    "by itself",
    "tak(?:es|ing) the place of",
    "goes on",
    "is to be",
    "[Mm]end(?:s|ed)?",
    "of which",
    "beside(?!:)",  # the colon: a prefix of names in checkpoints
    "(?:made|trained) behind",
    "(?:is|are|was|were) none(?! %)",  # the blank and the sign: a test in a template
    "in silence",
)
# A sentence that begins with "What" and is no question, in text, after another one, in a comment or a docstring.
STATEMENTS = re.compile(r'(?m)(?:^ *(?:# )?|[.:;] |""")What [a-z][^.?]*(?=[.?](?:\s|""")|$(?!\n))')


def written() -> list[Path]:
    """All text of the repository: code, YAML, templates and documents; not this file, which lists the idioms."""
    ends = {".py", ".yaml", ".jinja", ".md"}
    found = [p for top in WRITTEN for p in (ROOT / top).rglob("*") if p.suffix in ends]
    return [p for p in (*found, *ROOT.glob("*.md")) if p != Path(__file__).resolve() and not p.is_symlink()]


def statements(text: str) -> list[str]:
    """The statements of a text that begin with "What"."""
    return [f.group().strip() for f in STATEMENTS.finditer(text) if text[f.end() : f.end() + 1] != "?"]


def test_words_are_the_fields():
    """The idioms of the list were this project's own; each has a plainer word."""
    idioms = re.compile(rf"\b({'|'.join(RETIRED)})\b")
    found = [(str(p.relative_to(ROOT)), idioms.findall(p.read_text())) for p in written()]
    assert [entry for entry in found if entry[1]] == []


def test_sentences_begin_with_their_verb_or_subject():
    found = [(str(p.relative_to(ROOT)), statements(p.read_text())) for p in written()]
    assert [entry for entry in found if entry[1]] == []


def test_statements_that_begin_with_what_are_found():
    text = '"""What it is."""\n    # What comes.\n# What comes?\nWhat is\n2 + 2? So. What is left is\nsmall.\n'
    assert statements(text) == ['"""What it is', "# What comes", ". What is left is\nsmall"]
