"""Settings and fixtures that all tests share."""

from __future__ import annotations

import functools
import gc
import logging
import os

# Objects of imports and collection live until the end: looking for garbage among millions of objects takes seconds.
gc.disable()
# Before the first import of torch, transformers or wandb: all three read these once. One thread, because products this
# small are slower on two, and because sums keep one order.
os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MPLBACKEND": "agg"})
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests tokenize again, unless they are about what is kept.
os.environ["RLHF_LIGHTNING_CACHE"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lightning.fabric.utilities import registry
from transformers import PreTrainedTokenizerFast

from .helpers import char_tokenizer, save_tiny_model


def pytest_collection_finish() -> None:
    """From here on garbage is looked for again, among what tests make."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Adds up what tests counted and recorded as a property that is a mapping, over tests and workers."""
    counted: dict[str, Counter[str]] = {}
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                if isinstance(value, dict):
                    counted.setdefault(name, Counter()).update(value)
    for name, counts in counted.items():
        terminalreporter.write_line(f"{name}: {', '.join(f'{key} {n}' for key, n in sorted(counts.items()))}")


@pytest.fixture(scope="session")
def levels_of_loggers() -> dict[logging.Logger, int]:
    """The levels before any fixture of a module has run a pipeline."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    return {logger: logger.level for logger in loggers}


@pytest.fixture(autouse=True)
def levels_of_loggers_are_put_back(levels_of_loggers: dict[logging.Logger, int]) -> None:
    """A pipeline that runs in the tests' own process makes the libraries quiet for good."""
    for logger, level in levels_of_loggers.items():
        if logger.level != level:  # setting one empties the caches of all loggers
            logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def packages_are_listed_once() -> Iterator[None]:
    """Every trainer asks the metadata of all installed packages for callbacks, and none is installed meanwhile."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


# Of launchers.
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def no_seed_and_no_rank_are_left() -> Iterator[None]:
    """Lightning keeps a seed in the environment, and strategies of later tests' processes would draw from it again.

    So do ranks: where one is left, accelerate waits for others as soon as anything asks it for its state.
    """
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", *RANKS):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer; shared, so a test that changes it makes its own with ``helpers.char_tokenizer()``."""
    return char_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model_folder("qwen3")``: a folder with a tiny random model and its tokenizer, written once; read only."""
    folders: dict[str, Path] = {}

    def folder(arch: str = "llama") -> Path:
        if arch not in folders:
            folders[arch] = save_tiny_model(tmp_path_factory.mktemp("models") / arch, arch)
        return folders[arch]

    return folder
