"""Members of an ensemble of reward models on one decoder: their adapters, whose turn it is, and their mean rewards.

A folder of an ensemble of adapters holds the first member's adapter in peft's layout (``adapter_config.json``,
``adapter_model.safetensors``), the other members' adapters in ``reward_adapters.safetensors`` under their names in the
model (``...lora_A.member_1.weight``), and all heads in ``reward_head.safetensors``.

Legend: E examples, M members, K attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..utils.transfer import to_device
from .adapters import MEMBER_PREFIX
from .reference import ADAPTER_COPY
from .reward_head import stored_file
from .safetensors_io import read_weights

MEMBER_ADAPTERS = "reward_adapters.safetensors"
_DECAY = 0.99  # of the running means, per step


class MemberMeans:
    """Running means of the members' rewards over training rows, with decay 0.99 per step and bias correction.

    Losses of pairs do not determine a member's mean reward, so rewards are comparable between members only after
    centring.

    Args:
        num_models: M.
        num_attributes: K.

    Example:
        >>> means = MemberMeans(2, 1)
        >>> means.update(torch.tensor([[[[1.0], [5.0]]], [[[3.0], [7.0]]]]))
        >>> means.centred(torch.tensor([[2.5], [5.0]])).flatten().tolist()
        [0.5, -1.0]
    """

    def __init__(self, num_models: int, num_attributes: int) -> None:
        # In fp64 and not buffers: a trainer's precision would round them. In host memory, also where a trainer builds
        # the model on its device.
        self.sum = torch.zeros(num_models, num_attributes, dtype=torch.float64, device="cpu")
        self.weight = 0.0  # of the rewards in the sum: 0 before the first update

    @property
    def value(self) -> Tensor:
        """The means ``(M, K)``; 0 before the first update."""
        return self.sum / max(self.weight, 1e-12)

    def update(self, rewards: Tensor) -> None:
        """Adds the rewards ``(E, sequences of a row, M, K)`` of a global batch."""
        self.sum = _DECAY * self.sum + rewards.double().mean(dim=(0, 1)).cpu()
        self.weight = _DECAY * self.weight + 1

    def centred(self, rewards: Tensor) -> Tensor:
        """Subtracts the means from rewards ``(..., M, K)``; does nothing before the first update."""
        if not self.weight:
            return rewards
        return rewards - to_device({"means": self.value.to(rewards.dtype)}, rewards.device)["means"]

    def set(self, value: Sequence[Sequence[float]]) -> None:
        """Sets the means, as stored in a folder."""
        self.sum, self.weight = torch.tensor(value, dtype=torch.float64, device="cpu"), 1.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"mean_sum": self.sum, "mean_weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        self.sum, self.weight = state["mean_sum"], state["mean_weight"]


# Adapters of members.


def add_member_adapters(model: nn.Module, num_models: int, *, seed: int, folder: str | None = None) -> None:
    """Adds the LoRA adapters of the other members to a model whose one adapter is the first member's.

    They are loaded if the folder holds them. Otherwise they are initialised as new adapters, drawn from (seed, number
    of the member), or as copies of the first adapter if that was loaded. They are not listed in ``peft_config``, so
    that code which saves or merges *the* adapter of a model still finds one.

    Args:
        model: the model, changed in place.
        num_models: M.
        seed: seed of initial weights.
        folder: folder that may hold stored adapters.

    Raises:
        ValueError: the model has no adapter, or the stored ones are of another ensemble.
    """
    holder: Any = model
    if not hasattr(holder, "peft_config"):
        raise ValueError("ensemble is 'adapters', but the model has no adapter: give lora={'r': 16}, or use 'heads'")
    first = _first_adapter(holder)
    loaded = ADAPTER_COPY in holder.peft_config
    trainable = [parameter for parameter in holder.parameters() if parameter.requires_grad]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        for member in range(1, num_models):
            name = _name(member)
            torch.manual_seed(int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big"))
            holder.add_adapter(name, copy.deepcopy(holder.peft_config[first]))
            del holder.peft_config[name]
    _activate(holder, first)
    members = member_state(holder)
    for parameter in [*trainable, *members.values()]:
        parameter.requires_grad_(True)
    if loaded:
        _fill(members, _stored_state(folder, members) or _copies(holder, first, members))


def load_member_adapters(model: nn.Module, folder: str | Path) -> None:
    """Loads the stored adapters of all members except the first.

    Args:
        model: model with the adapters of ``add_member_adapters``.
        folder: folder of an exported ensemble with as many members.

    Raises:
        ValueError: the folder holds none, or those of another ensemble.
    """
    members = member_state(model)
    state = _stored_state(folder, members)
    if not state:
        raise ValueError(f"{str(folder)!r} holds no adapters of further members: export it again")
    _fill(members, state)


@contextmanager
def using_member(model: nn.Module, member: int) -> Iterator[None]:
    """Activates the adapter of a member within a context.

    Args:
        model: model with the adapters of ``add_member_adapters``.
        member: number of the member, from 0.
    """
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    before = list(layer.active_adapters)
    _activate(model, _name(member) if member else _first_adapter(model))
    try:
        yield
    finally:
        _activate(model, before[0])


def member_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of the adapters of all members except the first, by their names in the model."""
    found = {}
    for name, parameter in model.named_parameters():
        if any(part.startswith(MEMBER_PREFIX) for part in name.split(".")):
            found[name] = parameter
    return found


def _name(member: int) -> str:
    return f"{MEMBER_PREFIX}{member}"


def _first_adapter(model: Any) -> str:
    return next(str(name) for name in model.peft_config if name != ADAPTER_COPY)


def _activate(model: Any, adapter: str) -> None:
    """Switches the active adapter only; peft would also change ``requires_grad``."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_adapter(model.get_base_model(), adapter)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def _stored_state(folder: str | Path | None, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = None if folder is None else stored_file(folder, MEMBER_ADAPTERS)
    if path is None:
        return {}
    state = read_weights(path)
    if {name: tensor.shape for name, tensor in state.items()} != {n: p.shape for n, p in members.items()}:
        raise ValueError(
            f"the adapters stored in {str(path)!r} are those of another ensemble: leave num_models as it was trained "
            "(from_pretrained reads it)"
        )
    return state


def _copies(model: nn.Module, first: str, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the first member's weights under the names of the others."""
    own = dict(model.named_parameters())
    return {
        name: own[".".join(first if part.startswith(MEMBER_PREFIX) else part for part in name.split("."))].detach()
        for name in members
    }


@torch.no_grad()
def _fill(members: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, parameter in members.items():
        parameter.copy_(state[name])
