"""What other libraries say to everybody, and nobody who trains a model with this one has to read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# A kernel for 4-bit weights on the CPU: said to whoever imports peft beside bitsandbytes, quantised or not.
_BITSANDBYTES = "bitsandbytes.backends.cpu.ops", ("Failed to load CPU gemm_4bit_forward",)
# Advertisements for services of its maker's.
_LIGHTNING = "lightning.pytorch.utilities.rank_zero", ("💡 Tip:",)
_WARNINGS = (
    # Validation rows are optional here, and a run without them was meant to be one.
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Total length of `list` across ranks is zero",
    # A policy is trained in the mode in which it is scored, so that ratios begin at 1.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Between Lightning and torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class _Without(logging.Filter):
    """Lets everything pass but messages with certain beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be handled."""
        return not record.getMessage().startswith(self.beginnings)


for _name, _beginnings in (_BITSANDBYTES, _LIGHTNING):
    logging.getLogger(_name).addFilter(_Without(_beginnings))


def ignore_warnings() -> None:
    """Leaves out warnings that mean nothing here, until somebody resets the filters."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves them out for the command line, from its beginning."""
    with warnings.catch_warnings():
        ignore_warnings()
        yield
