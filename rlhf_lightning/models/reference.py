"""Reference policies: adapters off, a copied adapter, or a frozen second model; never part of the module's parameters.

A reference is a context that yields the model to score with, so that a loss uses all three kinds in the same way::

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
from torch.distributed.tensor import DTensor

from .backbone import evaluating
from .half_weights import hold_frozen, unrounded

ADAPTER_COPY = "ref"  # the adapter that keeps the weights from which a loaded adapter started
# Prefix, in checkpoints, of the names of kept weights that belong to no adapter; older checkpoints have it.
_KEPT = "beside:"


class Reference(Protocol):
    """Interface of the reference policies that a loss compares with."""

    rebuildable: bool

    def scoring(self) -> AbstractContextManager[nn.Module]:
        """Yields the reference model, in evaluation mode and without gradients."""

    def to(self, device: torch.device) -> None:
        """Moves the tensors it holds; the owner of the reference calls this, since no parent module does."""

    def remember(self) -> None:
        """Copies weights of the policy that training will change, unless they are kept already."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint must hold; empty where the reference can be rebuilt."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` returned."""


class AdapterReference:
    """Scores with the policy itself, its adapter switched off or replaced by the frozen copy ``ref`` of its start.

    Weights that are trained outside of the adapter (biases, with ``bias: all`` or ``lora_only``; norms that a user has
    unfrozen) are kept as they were, and replace the trained ones while the reference scores.

    Args:
        model: the PEFT model that is being trained; it is the reference as well, so no second model is in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.rebuildable = True
        self.kept: dict[str, Tensor] = {}  # by the names of parameters
        self.remember()

    def remember(self) -> None:
        """Copies weights that are trained outside of the adapter, unless they are kept already.

        Raises:
            ValueError: such weights are sharded, so that they cannot be exchanged.
        """
        for name, parameter in trained_beside_adapters(self.model).items():
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"the reference is the model with its adapter off, but {name} is trained in addition to the "
                    "adapter, in shards: use reference='frozen'"
                )
            if name not in self.kept:
                self.kept[name] = parameter.detach().clone()

    def to(self, device: torch.device) -> None:
        """Moves the kept weights to a device."""
        self.kept = {name: tensor.to(device) for name, tensor in self.kept.items()}

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """Yields the policy as it was before training, in evaluation mode and without gradients."""
        # Weights may have been unfrozen since the last call.
        self.remember()
        switched = self._switched_off() if ADAPTER_COPY not in self.model.peft_config else self._copy_active()
        with evaluating(self.model), torch.no_grad(), self._exchanged(), _same_trainable(self.model), switched:
            yield self.model

    def _switched_off(self) -> AbstractContextManager[None]:
        off: AbstractContextManager[None] = self.model.disable_adapter()
        return off

    @contextmanager
    def _copy_active(self) -> Iterator[None]:
        active = self.model.active_adapter
        self.model.set_adapter(ADAPTER_COPY)
        try:
            yield
        finally:
            self.model.set_adapter(active)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """Swaps in the kept weights; via ``data``, so that an open graph does not register the change."""
        own = {name: p for name, p in self.model.named_parameters() if name in self.kept}
        now = {name: parameter.detach().clone() for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data.copy_(self.kept[name])
        try:
            with unrounded(self.model, own.values()):
                yield
        finally:
            for name, parameter in own.items():
                parameter.data.copy_(now[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the copied adapter and the other kept weights, if they have been moved since they were loaded."""
        if self.rebuildable:
            return {}
        kept = {f"{_KEPT}{name}": tensor for name, tensor in self.kept.items()}
        return _adapter_state(self.model, [ADAPTER_COPY]) | kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the copied adapter, which can then no longer be rebuilt."""
        if not state:
            return
        self.rebuildable = False
        for name, tensor in state.items():
            if name.startswith(_KEPT):
                self.kept[name.removeprefix(_KEPT)] = tensor.clone()
        self.model.load_state_dict({n: t for n, t in state.items() if not n.startswith(_KEPT)}, strict=False)


class FrozenReference:
    """Scores with a second model whose weights are frozen.

    It is not a submodule: no optimizer sees it, no gradient bucket holds it, and a checkpoint saves it only where it
    cannot be rebuilt.

    Args:
        model: the reference model.
        rebuildable: whether the same weights can be loaded again from their source; otherwise a checkpoint holds them.

    Attributes:
        moves: whether training moves it; set before training by what does.
    """

    def __init__(self, model: nn.Module, *, rebuildable: bool) -> None:
        # Which of its weights differ from the source's: a checkpoint has to hold them.
        self._trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.model = model.eval().requires_grad_(False)
        self.rebuildable = rebuildable
        self.moves = False
        self._held: torch.dtype | None = None

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keeps the weights of linear layers as autocast rounds them, unless the reference moves.

        Args:
            dtype: the precision of autocast; ``None`` without it.

        Raises:
            ValueError: they were rounded for an earlier run, and are needed in fp32 now.
        """
        wanted = None if self.moves else dtype
        if self._held not in (None, wanted):
            raise ValueError(
                f"the reference was rounded to {self._held} for an earlier run of this module: build a new module for "
                "a run in another precision, or with a reference that moves"
            )
        hold_frozen(self.model, wanted, exact=False)
        self._held = wanted

    @classmethod
    def copy_of(cls, policy: nn.Module, *, rebuildable: bool) -> FrozenReference:
        """Makes a frozen copy of a policy in its present state."""
        return cls(copy.deepcopy(policy), rebuildable=rebuildable)

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """Yields the frozen model, without gradients."""
        with torch.no_grad():
            yield self.model

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    def remember(self) -> None:
        """Does nothing, since the model holds all weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the weights if they cannot be loaded again; of a model with an adapter, the trained ones only."""
        if self.rebuildable:
            return {}
        adapters, state = getattr(self.model, "peft_config", None), self.model.state_dict()
        if adapters is None:
            return state
        return _adapter_state(self.model, adapters) | {n: t for n, t in state.items() if n in self._trained}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the weights, which can then no longer be rebuilt."""
        if state:
            self.rebuildable = False
            self.model.load_state_dict(state, strict=not hasattr(self.model, "peft_config"))


def trained_beside_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Finds trained parameters of a PEFT model that belong to no adapter, so that switching adapters keeps them.

    Parameters of an adapter have its name in theirs: ``lora_A.default.weight``, ``modules_to_save.default.bias``.
    """
    adapters: Any = model.peft_config
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and set(adapters).isdisjoint(name.split("."))
    }


@contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """Restores which parameters are trainable, since switching adapters changes that."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def _adapter_state(model: nn.Module, adapters: Collection[str]) -> dict[str, Tensor]:
    """Selects the part of a state dict that belongs to adapters of these names."""
    return {name: value for name, value in model.state_dict().items() if not set(adapters).isdisjoint(name.split("."))}


def folder_fingerprint(folder: str) -> str | None:
    """Digests names, sizes and both ends of the weight files in a local model folder; ``None`` for a hub id."""
    files = (
        sorted(p for p in Path(folder).glob("*") if p.suffix in {".safetensors", ".bin"})
        if Path(folder).is_dir()
        else []
    )
    if not files:
        return None
    digest = blake2b(digest_size=16)
    edge = 1 << 20
    # Both ends of each file: the header with its shapes, and weights. Reading all would take minutes for large models.
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            file.seek(max(0, size - edge))
            digest.update(file.read(edge))
    return digest.hexdigest()
