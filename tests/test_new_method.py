"""How to add a method, done: five files in a copy of the repository, then its run and the tests that find it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rlhf_lightning", "datamodules", "callbacks", "configs", "benchmarks", "tests", "examples", "docs")

LOSS = '''"""Squared surprise: a loss that no method has."""

from torch import Tensor


def x_loss(logprobs_N: Tensor) -> Tensor:
    """Computes the square of each token's negative log-probability, (N,)."""
    return logprobs_N.square()
'''
MODULE = '''"""Squared surprise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..core.module import PostTrainingModule
from ..distributed.collectives import Metrics, Rows
from ..losses.x import x_loss
from ..sequences import Example, SequenceBatch


class XModule(PostTrainingModule):
    """Minimises the mean squared log-probability of the demonstrated tokens."""

    contracts: ClassVar[tuple[str, ...]] = ("SFTDataModule",)

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Counts the scored tokens."""
        weights = (part for example in examples for part in example.weights_per_sequence())
        return {"tokens": sum(float((part > 0).sum()) for part in weights)}

    def grad_rows(self, batch: SequenceBatch) -> Rows:
        """Sums the losses of each example's tokens."""
        return {"loss": batch.sum_per_example(x_loss(self.token_stats(batch).logprobs))}

    def loss(self, rows: Rows, normalizers: dict[str, float]) -> Tensor:
        """Divides by the tokens of the global batch."""
        return rows["loss"].sum() / max(normalizers["tokens"], 1.0)

    def metrics(self, rows: Rows, normalizers: dict[str, float]) -> Metrics:
        """Logs nothing but the loss."""
        return {}
'''


def named_files() -> list[str]:
    """The numbered files of CONTRIBUTING.md's "How to add a method"."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## How to add a method")[2].partition("\n## ")[0]
    assert "is five files of the package" in section
    return re.findall(r"^\d\. \*\*`([\w./]+)`", section, flags=re.MULTILINE)


def add_method(root: Path) -> list[str]:
    """Adds the method ``x``, and returns the files that were written."""
    (root / "rlhf_lightning/losses/x.py").write_text(LOSS)
    (root / "rlhf_lightning/modules/x.py").write_text(MODULE)
    exports = root / "rlhf_lightning/modules/__init__.py"
    text = exports.read_text()
    exports.write_text(
        text.replace("\n__all__ = [", "from .x import XModule\n\n__all__ = [").replace("\n]", '\n    "XModule",\n]')
    )
    (root / "configs/x").mkdir()
    for name in ("default", "tiny"):
        config = (root / f"configs/sft/{name}.yaml").read_text()
        config = config.replace("modules.SFTModule", "modules.XModule").replace("sft", "x")
        own = ("loss_type:", "label_smoothing:")  # SFT's options, which this method lacks
        lines = [line for line in config.splitlines() if not line.strip().startswith(own)]
        (root / f"configs/x/{name}.yaml").write_text("\n".join(lines) + "\n")
    return [
        "rlhf_lightning/losses/x.py",
        "rlhf_lightning/modules/x.py",
        "rlhf_lightning/modules/__init__.py",
        "configs/x/default.yaml",
        "configs/x/tiny.yaml",
    ]


def test_contributing_names_at_most_six_files(tmp_path: Path) -> None:
    for folder in ("losses", "modules"):
        (tmp_path / "rlhf_lightning" / folder).mkdir(parents=True)
    shutil.copy(ROOT / "rlhf_lightning/modules/__init__.py", tmp_path / "rlhf_lightning/modules")
    shutil.copytree(ROOT / "configs/sft", tmp_path / "configs/sft")
    assert named_files() == add_method(tmp_path)
    assert len(named_files()) <= 6


@pytest.mark.slow
def test_a_method_of_five_files_trains_and_passes_the_tests_that_find_it(tmp_path: Path) -> None:
    """Of the tests, the matrix has an entry more, and the list of options is new."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.svg", "*.png")
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("README.md", "METHODS.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    add_method(tmp_path)
    with (tmp_path / "tests/invariance/methods.py").open("a") as matrix:
        matrix.write('\nfrom rlhf_lightning import XModule\n\nMETHODS["x"] = Method(XModule, demonstrations)\n')

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("-m", "rlhf_lightning", "fit", "--config", "configs/x/tiny.yaml")
    assert (tmp_path / "runs/tiny-x/model/model.safetensors").is_file()
    (tmp_path / "tests/option_surface.txt").write_text(run("-m", "tests.test_option_surface"))
    pytest_quietly = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    said = run(*pytest_quietly, "tests/test_house.py", "tests/test_option_surface.py")
    assert "passed" in said
    assert "failed" not in said
    assert "passed" in run(*pytest_quietly, "tests/test_configs.py", "tests/test_cli.py", "-k", "x and not fragments")
    chosen = ("-k", "x and (padded or budget or order or padding)")
    table = run(*pytest_quietly, "-p", "tests.invariance.table", "tests/invariance/test_invariance.py", *chosen)
    assert re.search(r"^\| x \|", table, flags=re.MULTILINE)
    assert re.match(r"x +[0-9a-f]{32}$", run("benchmarks/seeded_weights.py", "x"))
