"""The command line on a pretended card: every method, precision, subcommand and option, on one device."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from .matrix import OPTIONS, PRECISIONS, SUBCOMMANDS, Folders, Run, every_run, finite, start
from .steps import EIGHT

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `.*_dataloader`")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.make(tmp_path_factory.mktemp("models"))


def name(run: Run) -> str:
    return "-".join(map(str, run))


def check(run: Run, folders: Folders, place: Path) -> None:
    found = start(run, folders, place)
    assert found.devices == {"cuda:0"}
    assert found.products_on_host == {}
    if run.subcommand == "predict":
        assert finite(place / "predictions.jsonl") == 4
    if run.subcommand == "fit" and "export" in run.names:
        assert (place / "exported").is_dir()
    if run.subcommand == "fit" and "checkpoints" in run.names:
        assert list((place / "kept").glob("*.ckpt"))


@pytest.mark.parametrize("run", list(every_run()), ids=name)
def test_every_run(run: Run, folders: Folders, tmp_path: Path) -> None:
    check(run, folders, tmp_path)


def test_every_pair_is_in_the_matrix() -> None:
    runs = list(every_run())
    assert {run[:3] for run in runs} == set(product(EIGHT, PRECISIONS, SUBCOMMANDS))
    trained = [run for run in runs if run.subcommand == "fit"]
    for options in OPTIONS:
        for chosen, option in options.items():
            assert {run.method for run in trained if chosen in run.names} == set(option.methods), chosen
    sets = range(len(OPTIONS))
    for kind, values in (("precision", PRECISIONS), ("subcommand", SUBCOMMANDS), ("method", EIGHT)):
        assert {(getattr(run, kind), run.options) for run in runs} == set(product(values, sets))
