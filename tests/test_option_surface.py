"""The options that configs can name, with their defaults, as users know them: a change is seen and meant.

After a change that is meant, ``python -m tests.test_option_surface > tests/option_surface.txt`` writes the file again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import rlhf_lightning
from rlhf_lightning import callbacks, core, datamodules
from rlhf_lightning.modules import GRPOModule, PPOModule
from rlhf_lightning.utils.keywords import keyword_parameters

FILE = Path(__file__).with_suffix("").parent / "option_surface.txt"


def classes() -> list[type]:
    """Modules, datamodules, callbacks, loggers, the strategy and the schedule."""
    named = [getattr(place, name) for place in (rlhf_lightning, datamodules, callbacks) for name in place.__all__]
    found = {c for c in named if inspect.isclass(c) and not c.__name__.endswith("Loader")} | {core.WarmupSchedule}
    return sorted(found - {datamodules.ExampleDataModule}, key=lambda c: c.__name__)


def options(name: str, default: Any) -> Iterator[str]:
    """An option, or in its place those of its group."""
    if is_dataclass(default):
        for field in fields(default):
            yield from options(f"{name}.{field.name}", getattr(default, field.name))
    else:
        yield name if default is inspect.Parameter.empty else f"{name} = {default!r}"


def surface() -> list[str]:
    lines = []
    for cls in classes():
        for name, parameter in sorted(keyword_parameters(cls).items()):
            lines += options(f"{cls.__name__}.{name}", parameter.default)
    return lines


def test_the_option_surface_is_frozen() -> None:
    assert surface() == FILE.read_text().splitlines(), __doc__


def test_groups_are_flattened_and_inherited_options_are_there() -> None:
    lines = surface()
    for line in ("GRPOModule.loss.epsilon = 0.2", "GRPOModule.rewards", "DPOModule.micro_batch_tokens = 8192"):
        assert line in lines
    assert not [line for line in lines if "(" in line and "PolicyLoss" in line]


def test_few_options_are_at_the_top() -> None:
    """Beyond the options that all methods share."""
    common = set(keyword_parameters(core.PostTrainingModule))
    for cls, most in ((GRPOModule, 21), (PPOModule, 22)):
        assert len(set(keyword_parameters(cls)) - common) <= most


if __name__ == "__main__":
    print("\n".join(surface()))
