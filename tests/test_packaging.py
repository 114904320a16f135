"""The wheel: what is in it, and that it lives next to a project that has its own ``callbacks``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import rlhf_lightning

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("callbacks", "configs", "datamodules")
DATA = {".yaml", ".json", ".jinja", ".html"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that nothing is left in the repository."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    kept = ("rlhf_lightning", *LINKED, "examples", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source.parent), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (path,) = source.parent.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_links_are_committed_relative_links() -> None:
    for name in LINKED:
        assert (ROOT / "rlhf_lightning" / name).is_symlink()
        assert (ROOT / "rlhf_lightning" / name).readlink() == Path("..", name)


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {"rlhf_lightning/py.typed"}
    for folder in ("rlhf_lightning", *LINKED):
        prefix = Path() if folder == "rlhf_lightning" else Path("rlhf_lightning")
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and (path.suffix == ".py" or path.suffix in DATA) and "__pycache__" not in path.parts:
                expected.add(str(prefix / path.relative_to(ROOT)))
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == expected
    assert {name.split("/")[0] for name in packaged} == {"rlhf_lightning"}
    assert "rlhf_lightning/configs/models/nano/config.json" in packaged


def test_metadata(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headers = Parser().parsestr(metadata(wheel, "METADATA"))
    assert headers["Name"] == "rlhf-lightning"
    assert headers["Version"] == project["version"] == rlhf_lightning.__version__
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers["Requires-Python"] == ">=3.11"
    assert "rlhf-lightning = rlhf_lightning.cli:main" in metadata(wheel, "entry_points.txt")
    (lightning,) = (line for line in headers.get_all("Requires-Dist") or [] if line.startswith("lightning"))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")


# Runs in the folder of a project that has its own `callbacks` and nothing called `datamodules`.
_FOREIGN = """
import importlib, json, sys
site, root = sys.argv[1:]
# Installed from the wheel alone: an editable installation in this environment must not help.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", str(finder))]
sys.path[:] = [site, *(entry for entry in sys.path if entry not in (root, site) and "__editable__" not in entry)]
sys.path.insert(0, "")

import callbacks, rlhf_lightning, rlhf_lightning.callbacks, rlhf_lightning.datamodules
from rlhf_lightning.models import load_tokenizer
report = {
    "own": callbacks.__file__,
    "package": rlhf_lightning.__file__,
    "theirs": rlhf_lightning.callbacks.__file__,
    "stray": importlib.util.find_spec("datamodules") is not None,
    "tokens": len(load_tokenizer("configs/models/nano")("3+4").input_ids),
}
# In a clone, a stray import fails instead of making second copies of all classes.
sys.path.insert(0, root)
try:
    import datamodules
    report["second copy"] = True
except ImportError as error:
    report["second copy"] = str(error)
print(json.dumps(report))
"""


@pytest.mark.slow
def test_wheel_next_to_a_project_with_its_own_callbacks(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    wheel.extractall(site)
    (project / "callbacks").mkdir(parents=True)
    (project / "callbacks" / "__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-c", _FOREIGN, str(site), str(ROOT)], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert Path(report["own"]).resolve() == project / "callbacks" / "__init__.py"
    assert Path(report["package"]) == site / "rlhf_lightning" / "__init__.py"
    assert Path(report["theirs"]) == site / "rlhf_lightning" / "callbacks" / "__init__.py"
    assert report["stray"] is False
    assert report["tokens"] == 3
    assert "beyond top-level package" in str(report["second copy"])


def test_every_folder_of_tests_is_a_package() -> None:
    """Files of one name in two folders need it."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
