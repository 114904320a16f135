from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core import rank_zero

import rlhf_lightning  # noqa: F401  (hides what bitsandbytes says)
from rlhf_lightning.utils.quiet import quiet


def test_bitsandbytes_without_its_kernel(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from %s: %s.", "kernels-community", "No module")
    logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_advertisements(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = rank_zero.log  # whatever others have done to it or to its parents
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger=logger.name)
    rank_zero_info("💡 Tip: For seamless cloud logging, try installing something")
    rank_zero_info("You are using a CUDA device ('NVIDIA H100') that has Tensor Cores. To properly utilize them")
    rank_zero_info("GPU available: False")
    assert caplog.messages == ["GPU available: False"]


def test_warnings() -> None:
    skipped = "You defined a `validation_step` but have no `val_dataloader`. Skipping val loop."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn(skipped, stacklevel=1)
            warnings.warn("Total length of `list` across ranks is zero. Please make sure", stacklevel=1)
            warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning, stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        warnings.warn(skipped, stacklevel=1)
    assert [str(warning.message) for warning in found] == ["something else", skipped]
