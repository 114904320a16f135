"""The examples in docstrings run, and print what they say; the public classes of some rooms have one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import ModuleType

import pytest
import torch

import rlhf_lightning

from .test_house import house

ROOMS = sorted({house.room(name) for name in house.sources()} - {"", "__main__"})
# At most so many public classes of a room have no example of their own: protocols, and parts that others hand out.
WITHOUT_EXAMPLE = {"core": 1, "sequences": 3, "models": 9, "inference": 6, "evaluation": 6, "self_improvement": 9}


def face(room: str) -> ModuleType:
    return importlib.import_module(f"rlhf_lightning.{room}")


@pytest.mark.parametrize("room", ROOMS)
def test_examples_run(room, tmp_path, monkeypatch):
    """With torch and all that the package and the room export, as a reader would import them."""
    monkeypatch.chdir(tmp_path)
    faces = (rlhf_lightning, face(room))
    public = {name: getattr(place, name) for place in faces for name in getattr(place, "__all__", ())}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed: list[str] = []
    for name in (name for name in house.sources() if house.room(name) == room):
        module = importlib.import_module(name)
        finder = doctest.DocTestFinder(exclude_empty=True)
        for test in finder.find(module, name, extraglobs={"torch": torch, **public, **vars(module)}):
            runner.run(test, out=failed.append)
    assert failed == []


def without_example(room: str) -> list[str]:
    """The public classes of a room whose docstring shows no example."""
    public = {name: getattr(face(room), name) for name in face(room).__all__}
    classes = {name: kind for name, kind in public.items() if inspect.isclass(kind)}
    return sorted(name for name, kind in classes.items() if "Example:" not in (kind.__doc__ or ""))


@pytest.mark.parametrize("room", WITHOUT_EXAMPLE)
def test_public_classes_have_examples(room):
    assert len(without_example(room)) <= WITHOUT_EXAMPLE[room]
