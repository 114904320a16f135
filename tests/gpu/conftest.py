"""``device``: every test runs on the CPU wherever it is cheap, and on CUDA where there is one.

What CUDA alone can do asks for ``cuda``. Without a device, both say so.
"""

from __future__ import annotations

import pytest
import torch

NO_CUDA = "no CUDA device on this machine: not tested on a GPU"
_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=_GPU)])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
