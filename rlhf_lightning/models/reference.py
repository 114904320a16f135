"""Reference policies: adapters off, a copied adapter, or a frozen second model; never part of the module's parameters.

A reference is entered like a context and yields the model to score with, so that its three kinds look alike to a loss::

    with reference.scoring() as model:
        stats = token_stats(model, batch, layout)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .backbone import evaluating

ADAPTER_COPY = "ref"  # the adapter that keeps the weights from which a loaded adapter started


class Reference(Protocol):
    """What a loss asks of a reference policy."""

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """Yields the reference model, in evaluation mode and without gradients."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the reference: nothing where it can be rebuilt."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` returned."""


class AdapterReference:
    """The policy with its adapter switched off, or with the frozen copy ``ref`` of the adapter that it started from.

    Args:
        model: the PEFT model that is being trained; it is the reference as well, so no second model is in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.rebuildable = True

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """See Reference."""
        with evaluating(self.model), torch.no_grad():
            if ADAPTER_COPY not in self.model.peft_config:
                with self.model.disable_adapter():
                    yield self.model
                return
            active = self.model.active_adapter
            trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
            self.model.set_adapter(ADAPTER_COPY)
            try:
                yield self.model
            finally:
                self.model.set_adapter(active)
                # Switching adapters also switches what is trainable; the copy must stay frozen.
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(name in trainable)

    def state_dict(self) -> dict[str, Tensor]:
        """The copied adapter, where it has been moved since it was loaded."""
        return {} if self.rebuildable else _adapter_state(self.model, [ADAPTER_COPY])

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the copied adapter, which can then no longer be rebuilt."""
        if state:
            self.rebuildable = False
            self.model.load_state_dict(state, strict=False)


class FrozenReference:
    """A second model whose weights never change.

    It is no submodule of anything: no optimizer sees it, no gradient bucket holds it, and a checkpoint saves it only
    where it cannot be rebuilt.

    Args:
        model: the reference model.
        rebuildable: whether the same weights can be loaded again from where they came; a checkpoint holds others.
    """

    def __init__(self, model: nn.Module, *, rebuildable: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self.rebuildable = rebuildable

    @classmethod
    def copy_of(cls, policy: nn.Module, *, rebuildable: bool) -> FrozenReference:
        """A frozen copy of a policy as it stands now."""
        return cls(copy.deepcopy(policy), rebuildable=rebuildable)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """See Reference."""
        with torch.no_grad():
            yield self.model

    def to(self, device: torch.device) -> None:
        """Moves the model; whoever owns the reference calls it, since no parent module does."""
        self.model.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, where they cannot be loaded again; of a model with an adapter, the adapter alone."""
        if self.rebuildable:
            return {}
        adapters = getattr(self.model, "peft_config", None)
        return self.model.state_dict() if adapters is None else _adapter_state(self.model, adapters)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the weights, which can then no longer be rebuilt."""
        if state:
            self.rebuildable = False
            self.model.load_state_dict(state, strict=not hasattr(self.model, "peft_config"))


def _adapter_state(model: nn.Module, adapters: Collection[str]) -> dict[str, Tensor]:
    """The part of a state dict that belongs to adapters of these names."""
    return {name: value for name, value in model.state_dict().items() if not set(adapters).isdisjoint(name.split("."))}


def folder_fingerprint(folder: str) -> str | None:
    """A digest of a local model folder's weight files: names, sizes and both ends of each; ``None`` for a hub id."""
    files = (
        sorted(p for p in Path(folder).glob("*") if p.suffix in {".safetensors", ".bin"})
        if Path(folder).is_dir()
        else []
    )
    if not files:
        return None
    digest = blake2b(digest_size=16)
    edge = 1 << 20
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            file.seek(max(0, size - edge))
            digest.update(file.read(edge))
    return digest.hexdigest()
