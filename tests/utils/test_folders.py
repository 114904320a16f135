"""Replacing a folder: killed at any moment, even twice, the old content or the new one is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_lightning.utils.files import MARKER, PARTIAL, REPLACED, hidden_sibling, mark
from rlhf_lightning.utils.folders import recover, replace_folder

from ..helpers import Killed, killed_after

NAMES = ("a", "b", "sub/c")


def write(text: str):
    def into(folder: Path) -> None:
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    return into


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    }


OLD, NEW = dict.fromkeys(NAMES, "old"), dict.fromkeys(NAMES, "new")


def killed_replacement(place: Path, moment: int) -> bool:
    """Replaces the old folder by the new one and kills that; returns whether it was killed before its end."""
    replace_folder(place, "model", write("old"))
    try:
        with killed_after(moment):
            replace_folder(place, "model", write("new"))
    except Killed:
        return True
    return False


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    seen = set()
    for moment in range(100):
        place = tmp_path / str(moment) / "model"
        killed = killed_replacement(place, moment)
        whole = [path for path in (place, hidden_sibling(place, REPLACED)) if path.exists()]
        assert all(content(path) in (OLD, NEW) for path in whole), moment
        recover(place)
        assert content(place) in (OLD, NEW), moment
        assert [path.name for path in place.parent.iterdir()] == ["model"]
        seen.add("new" if content(place) == NEW else "old")
        if not killed:
            break
    assert not killed
    assert moment > 10
    assert seen == {"old", "new"}


def test_a_second_kill_in_the_recovery_and_a_folder_that_the_user_then_deletes(tmp_path):
    """A half-deleted folder is never restored."""
    restored = 0
    for first in range(100):
        for second in range(100):
            place = tmp_path / f"{first}-{second}" / "model"
            killed = killed_replacement(place, first)
            ended = False
            try:
                with killed_after(second):
                    recover(place)
                ended = True
            except Killed:
                pass
            if place.exists():
                assert content(place) in (OLD, NEW), (first, second)
                shutil.rmtree(place)
            recover(place)
            if place.exists():
                assert content(place) == OLD, (first, second)
                restored += 1
            if ended:
                break
        if not killed:
            break
    assert not killed
    assert restored


def test_an_unfinished_folder_is_kept_to_resume_from(tmp_path):
    place = tmp_path / "model"
    replace_folder(place, "model", write("old"))

    def half(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(place, "model", half, resumes=True)
    assert content(place) == OLD
    found = []
    replace_folder(place, "model", lambda folder: (found.append(content(folder)), write("new")(folder)), resumes=True)
    assert found == [{"a": "new"}]
    assert content(place) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    # Bad input is not resumed from; without `resumes`, nothing is.
    with pytest.raises(ValueError, match="bad"):
        replace_folder(place, "model", lambda folder: (_ for _ in ()).throw(ValueError("bad")), resumes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt):
        replace_folder(place, "model", half)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert content(place) == NEW


@pytest.mark.parametrize("resumes", [False, True])
def test_a_hidden_folder_of_the_user_is_refused_and_stays(resumes, tmp_path):
    place = tmp_path / "model"
    foreign = hidden_sibling(place, PARTIAL)
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"partial' was not written by this package: move it away$"):
        replace_folder(place, "model", write("new"), resumes=resumes)
    assert content(foreign) == {"mine": "mine"}
    assert not place.exists()


def test_a_replaced_folder_of_the_user_does_not_take_the_place_of_a_failed_one(tmp_path):
    place = tmp_path / "model"
    foreign = hidden_sibling(place, REPLACED)
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        replace_folder(place, "model", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not place.exists()
    assert content(foreign) == {"mine": "mine"}
    replace_folder(place, "model", write("old"))
    with pytest.raises(ValueError, match=r"^cannot write the model to "):
        replace_folder(place, "model", write("new"))
    assert content(place) == OLD


def test_both_hidden_folders_at_once(tmp_path):
    """Something was put at the place after a kill between two renames."""
    place = tmp_path / "model"
    for path, text in ((hidden_sibling(place, REPLACED), "old"), (hidden_sibling(place, PARTIAL), "new")):
        path.mkdir()
        write(text)(path)
        mark(path, "model")
    place.mkdir()
    (place / "mine").write_text("mine")
    recover(place, keeps_unfinished=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert content(place) == {"mine": "mine"}
