"""Ensembles of reward models on one decoder: members that are heads, or an adapter and a head each.

A folder of an ensemble of adapters holds the first member's adapter in peft's layout (``adapter_config.json``,
``adapter_model.safetensors``), the other members' adapters in ``reward_adapters.safetensors`` under their names in the
model (``...lora_A.member_1.weight``), and all heads in ``reward_head.safetensors``.

Legend: E examples, S sequences, D hidden size, M members, K attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed.collectives import Rows
from ..models.reference import ADAPTER_COPY
from ..models.reward_head import HeadKind, read_head_options, stored_file, whole
from ..models.safetensors_io import read_weights
from ..sequences import Example, SequenceBatch
from ..utils.validation import check_choice, check_count
from .headed_module import HeadedModule
from .router_loss import AUX_LOSS, RouterLoss

EnsembleKind = Literal["heads", "adapters"]

MEMBER_ADAPTERS = "reward_adapters.safetensors"
_MEAN_DECAY = 0.99  # of the members' running means, per step


class EnsembleModule(HeadedModule):
    """A module with M members that score the same sequences.

    Args:
        model: Hugging Face id or folder.
        num_models: M, at least 1.
        ensemble: ``heads`` share the decoder and are computed together; ``adapters``: each member has a LoRA adapter
            and a head of its own on one frozen decoder. Members run one after the other, forward and backward, so that
            the activations of only one are in memory; a step takes M times as long.
        head: kind of the heads.
        num_attributes: K, at least 1.
        seed: seed of initial weights, combined with the number of the member.
        kwargs: options of ``HeadedModule``.
    """

    def __init__(
        self,
        model: str,
        *,
        num_models: int,
        ensemble: EnsembleKind,
        head: HeadKind,
        num_attributes: int,
        seed: int,
        **kwargs: Any,
    ) -> None:
        check_count("num_models", num_models, "1 is no ensemble; 4 is a usual one")
        check_choice("ensemble", ensemble, ("heads", "adapters"))
        super().__init__(model, seed=seed, **kwargs)
        self.num_models = num_models
        self.ensemble: EnsembleKind = ensemble
        self.head_kind: HeadKind = head
        self.num_attributes = num_attributes
        self._turn: int | None = None  # the member whose pass is running
        # The running mean of each member's rewards before division by its weight, which corrects the initial bias.
        self._mean_sum = torch.zeros(num_models, num_attributes, dtype=torch.float64)
        self._mean_weight = 0.0

    @property
    def trains_members_in_turn(self) -> bool:
        """Whether members are computed one after the other."""
        return self.ensemble == "adapters" and self.num_models > 1

    @property
    def in_turn(self) -> slice:
        """The members that a pass computes: all, or the one whose turn it is."""
        return slice(None) if self._turn is None else slice(self._turn, self._turn + 1)

    def head_shape(self) -> dict[str, Any]:
        """Returns the shape of M heads with K outputs each."""
        return {"kind": self.head_kind, "num_outputs": self.num_attributes, "num_models": self.num_models}

    def configure_model(self) -> None:
        """Builds the decoder with its adapters and heads, and loads those that are stored with the model."""
        if self.is_configured:
            return
        super().configure_model()
        stored = self.model_source if self.init == "pretrained" else None
        assert self.model is not None
        if self.ensemble == "adapters":
            add_member_adapters(self.model, self.num_models, seed=self.seed, folder=stored)
        if stored is not None and not self._mean_weight:
            self._load_means(stored)

    def _load_means(self, folder: str) -> None:
        means = read_head_options(folder).get("member_means")
        if means is not None:
            self._mean_sum, self._mean_weight = torch.tensor(means, dtype=torch.float64), 1.0

    def member_outputs(self, batch: SequenceBatch, states_of: Callable[[SequenceBatch], Tensor]) -> Tensor:
        """Applies the heads of all members (or of the one whose turn it is) to states ``(S, D)``: ``(S, M, K)``."""
        if not self.trains_members_in_turn:
            return self.head_outputs(states_of(batch))
        if self._turn is not None:
            return self._own_outputs(batch, states_of, self._turn)
        outputs = []
        for member in range(self.num_models):
            with using_member(self.model, member):
                outputs.append(self._own_outputs(batch, states_of, member))
        return torch.cat(outputs, dim=1)

    def _own_outputs(self, batch: SequenceBatch, states_of: Callable[[SequenceBatch], Tensor], member: int) -> Tensor:
        outputs: Tensor = self.head(states_of(batch), member)
        return outputs

    @property
    def router_loss(self) -> RouterLoss | None:
        """The load-balancing loss, averaged over members that take turns, as is the method's own loss."""
        loss = super().router_loss
        if loss is None or not self.trains_members_in_turn:
            return loss
        return replace(loss, coef=loss.coef / self.num_models)

    def backward_examples(self, examples: Sequence[Example]) -> tuple[Rows, dict[str, float]]:
        """Accumulates the gradient of the global batch's loss, for all members at once or one after the other."""
        if not self.trains_members_in_turn:
            return super().backward_examples(examples)
        parts: list[Rows] = []
        normalizers: dict[str, float] = {}
        balance = 0.0
        for member in range(self.num_models):
            self._turn = member
            try:
                with using_member(self.model, member):
                    rows, normalizers = super().backward_examples(examples)
            finally:
                self._turn = None
            parts.append(rows)
            balance += normalizers.get(AUX_LOSS, 0.0) / self.num_models
        return self.joined(parts), normalizers | ({AUX_LOSS: balance} if AUX_LOSS in normalizers else {})

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """Joins the rows of each member, of the same examples in the same order, into rows of all."""
        rows = dict(parts[0])
        for name, dim in (("rewards", 2), ("weights", 1)):
            if name in rows:
                rows[name] = torch.cat([part[name] for part in parts], dim=dim)
        return rows

    # Means of members.

    def centred(self, rewards: Tensor) -> Tensor:
        """Subtracts the members' means from rewards ``(..., M, K)``; does nothing before the first mean."""
        return rewards - self.member_means.to(rewards) if self._mean_weight else rewards

    @property
    def member_means(self) -> Tensor:
        """``(M, K)`` running means of the rewards of an ensemble that learns from pairs, over training rows."""
        return self._mean_sum / max(self._mean_weight, 1e-12)

    def remember_means(self, rewards: Tensor) -> None:
        """Updates the running means with the rewards ``(E, sequences of a row, M, K)`` of a global batch."""
        self._mean_sum = _MEAN_DECAY * self._mean_sum + rewards.double().mean(dim=(0, 1)).cpu()
        self._mean_weight = _MEAN_DECAY * self._mean_weight + 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the running means."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward"] = {"mean_sum": self._mean_sum, "mean_weight": self._mean_weight}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the running means."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("reward")
        if state is not None:
            self._mean_sum, self._mean_weight = state["mean_sum"], state["mean_weight"]

    # Export.

    def ensemble_options(self) -> Mapping[str, Any]:
        """Returns the options of the ensemble that are stored for ``from_pretrained``."""
        means = {"member_means": self.member_means.tolist()} if self._mean_weight else {}
        return {"num_models": self.num_models, "ensemble": self.ensemble, **means}

    def load_head_files(self, folder: str) -> None:
        """Loads the head, the members' means, and the adapters of all members except the first."""
        super().load_head_files(folder)
        self._load_means(folder)
        if self.trains_members_in_turn:
            members = member_state(self.model)
            state = _stored_state(folder, members)
            if not state:
                raise ValueError(f"{folder!r} holds no adapters of further members: export it again")
            _fill(members, state)

    def head_files_writer(self) -> Callable[[Path], None]:
        """Adds the adapters of all members except the first, which is written as the model's adapter."""
        write_head = super().head_files_writer()
        if not self.trains_members_in_turn:
            return write_head
        state = {name: whole(tensor).contiguous() for name, tensor in member_state(self.model).items()}

        def write(place: Path) -> None:
            write_head(place)
            save_file(state, place / MEMBER_ADAPTERS, metadata={"format": "pt"})

        return write


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
        if any(part.startswith(_name("")) for part in name.split(".")):
            found[name] = parameter
    return found


def _name(member: int | str) -> str:
    return f"member_{member}"


def _first_adapter(model: Any) -> str:
    return next(str(name) for name in model.peft_config if name != ADAPTER_COPY)


def _activate(model: Any, adapter: str) -> None:
    """Switches the active adapter only; peft would also change ``requires_grad``."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_adapter(model.get_base_model(), adapter)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def _stored_state(folder: str | None, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        name: own[".".join(first if part.startswith(_name("")) else part for part in name.split("."))].detach()
        for name in members
    }


@torch.no_grad()
def _fill(members: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, parameter in members.items():
        parameter.copy_(state[name])
