"""Silences messages of other libraries that do not matter to users of this one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# A missing kernel for 4-bit weights on the CPU: logged when peft and bitsandbytes are imported, quantised or not.
_BITSANDBYTES = "bitsandbytes.backends.cpu.ops", ("Failed to load CPU gemm_4bit_forward",)
# Advertisements for other products, and for TF32, which rounds what is kept in fp32 so that it is not rounded.
_LIGHTNING = "lightning.pytorch.utilities.rank_zero", ("💡 Tip:", "You are using a CUDA device (")
_WARNINGS = (
    # Validation rows are optional here, so a run without them is intended.
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Total length of `list` across ranks is zero",
    # A policy is trained in the mode in which it is scored, so that ratios begin at 1.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Between Lightning and torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class _Without(logging.Filter):
    """Drops log records whose messages have certain prefixes."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether to handle a record."""
        return not record.getMessage().startswith(self.beginnings)


for _name, _beginnings in (_BITSANDBYTES, _LIGHTNING):
    logging.getLogger(_name).addFilter(_Without(_beginnings))


def ignore_warnings() -> None:
    """Ignores warnings that do not apply here, until the filters are reset."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignores these warnings within the context, for the command line."""
    with warnings.catch_warnings():
        ignore_warnings()
        yield


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hides transformers' table of weights that a model has and a file has not, or the reverse, within the context."""
    logger, drop = logging.getLogger("transformers.modeling_utils"), _WithoutReport()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


class _WithoutReport(logging.Filter):
    """Drops the table."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether to handle a record."""
        return "LOAD REPORT" not in record.getMessage()
