"""Merging methods: one file each, pure functions on tensors."""

from __future__ import annotations

from .base import Method, TensorView, merge_tensors, merge_view, view_of
from .breadcrumbs import Breadcrumbs
from .dare import Dare, DareTies
from .della import Della
from .fisher import Fisher
from .geometric_median import GeometricMedian
from .karcher import Karcher
from .linear import Linear
from .lora import Cat, Svd
from .model_stock import ModelStock
from .regmean import RegMean
from .sign_consensus import SignConsensus
from .slerp import Slerp
from .task_arithmetic import TaskArithmetic
from .ties import Ties

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Linear,
        TaskArithmetic,
        Ties,
        Dare,
        DareTies,
        Della,
        Breadcrumbs,
        Slerp,
        Karcher,
        GeometricMedian,
        ModelStock,
        SignConsensus,
        Fisher,
        RegMean,
    )
}
# Methods that merge adapters into an adapter.
ADAPTER_METHODS: dict[str, type[Cat] | type[Svd]] = {"cat": Cat, "svd": Svd}

__all__ = [
    "ADAPTER_METHODS",
    "METHODS",
    "Breadcrumbs",
    "Cat",
    "Dare",
    "DareTies",
    "Della",
    "Fisher",
    "GeometricMedian",
    "Karcher",
    "Linear",
    "Method",
    "ModelStock",
    "RegMean",
    "SignConsensus",
    "Slerp",
    "Svd",
    "TaskArithmetic",
    "TensorView",
    "Ties",
    "merge_tensors",
    "merge_view",
    "view_of",
]
