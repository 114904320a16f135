"""The sharding plan of FSDP2, and the distribution of the weights that rank 0 has loaded.

Every decoder block is a unit. The rest of a model (embeddings, final norm, output projection, scalar heads) is one root
unit, which is gathered when the decoder begins and stays gathered until the backward pass, because the fused log-prob
head and scalar heads read their weights after the decoder. Tied weights are together in the root unit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..models.backbone import base_model, decoder_blocks, decoder_of
from ..models.dropout import layerdrop_rate
from ..models.half_weights import multiplies_alone, widen_without_autocast
from ..utils.page_cache import drop_file_pages
from .lockstep import lockstep

_ROOT = "_sharded_root"  # attribute of a decoder that refers to its root; not a registered submodule


class ShardedRoot(nn.Module):
    """Holds all of a model except its decoder blocks as one unit, gathered around the decoder's forward.

    Args:
        model: a causal language model.
        parts: heads that read its hidden states.
        number: number of the model in ``Lockstep``.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module], number: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model, *parts])
        self._decoder = [decoder_of(model)]  # in a list, so that it is not registered twice
        self.number = number

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder's original forward."""
        return run(*args, **kwargs)

    def take_over(self) -> None:
        """Routes every forward of the decoder through this unit, in lockstep with the other ranks."""
        # Embeddings, final norm and heads have no module of their own around the decoder's forward, so it is wrapped.
        decoder: Any = self._decoder[0]
        own_forward = decoder.forward
        takes_positions = "position_ids" in inspect.signature(own_forward).parameters

        @wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not takes_positions:
                kwargs.pop("position_ids", None)
            agreement = lockstep()
            if agreement is None:
                return self(own_forward, *args, **kwargs)
            return agreement.forward(self.number, lambda: self(own_forward, *args, **kwargs))

        self._run = own_forward
        decoder.forward = forward
        object.__setattr__(decoder, _ROOT, self)

    @property
    def model(self) -> nn.Module:
        """The model without its heads."""
        return self.parts[0]

    def dummy_pass(self) -> Tensor:
        """Runs a dummy pass over one token, and returns its hidden states."""
        token = torch.zeros((1, 1), dtype=torch.long, device=next(self.parameters()).device)
        with ExitStack() as stack:
            # Parts that change the decoder's layers must be reached as in a real pass.
            for part in self.parts[1:]:
                enter: Any = getattr(part, "on_dummy_pass", nullcontext)
                stack.enter_context(enter())
            hidden: Tensor = self(self._run, input_ids=token, use_cache=False)[0]
        return hidden


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """Returns every unit of a sharded model, root first; empty where nothing is sharded."""
    roots = [getattr(module, _ROOT) for module in model.modules() if hasattr(module, _ROOT)]
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [*roots, *blocks]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    heads: Sequence[nn.Module] = (),
    number: int = 0,
    cpu_offload: bool = False,
    half: torch.dtype | None = None,
) -> ShardedRoot:
    """Shards a causal language model and the heads that read it, unit by unit, with the weights of rank 0.

    Other ranks may hold weights on the meta device. Besides the weights that a rank has loaded itself, it holds at most
    its shards and one whole unit.

    Args:
        model: the model, with or without adapters.
        mesh: mesh of all ranks, as :func:`rank_mesh` makes it.
        device: this rank's device.
        heads: modules that read the model's hidden states.
        number: number of the model in ``Lockstep``.
        cpu_offload: see ``block_options``.
        half: see ``gathering``.

    Raises:
        ValueError: the weights are quantised.
    """
    check_can_shard(model)
    base = base_model(model)
    known: ShardedRoot | None = getattr(decoder_of(base), _ROOT, None)
    if known is not None:  # sharded by an earlier trainer of this process
        known.number = number
        return known

    # Pages of weight files are dropped after each unit, since mapped pages count as this process's memory.
    options = block_options(mesh, cpu_offload=cpu_offload)
    for block in decoder_blocks(base):
        check_one_dtype(block)
        read = _take_from_first_rank(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **options, **gathering(block, half))
        # Trainers move modules to the device; offloaded shards stay in host memory.
        if "offload_policy" in options:
            _keep_in_place(block)
        drop_file_pages(read)

    # The root comes last: its fully_shard takes all parameters that the blocks have left.
    root = ShardedRoot(base, heads, number)
    check_one_dtype(root)
    read = _take_from_first_rank(root, device)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    drop_file_pages(read)
    del read

    # Gradients are summed, never averaged.
    units: list[Any] = [root, *decoder_blocks(base)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)  # losses are divided by global normalizers already
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reduce_scatter_unused_params(True)  # a rank without rows uses few
    for part in root.parts:
        part.register_load_state_dict_pre_hook(_split_whole_tensors)
    root.take_over()
    return root


def check_can_shard(model: nn.Module) -> None:
    """Refuses weights that cannot be sharded.

    Raises:
        ValueError: the weights are quantised.
    """
    if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        raise ValueError(
            "strategy is 'fsdp2' and the weights are quantised, but bitsandbytes packs a whole matrix with its scales, "
            "which cannot be split over ranks: use strategy 'ddp', or a model that is not quantised"
        )


def check_runs_all_layers(model: nn.Module) -> None:
    """Refuses to train a model with layerdrop: ranks that skip different layers would deadlock.

    Raises:
        ValueError: its rate of layerdrop is above 0.
    """
    rate = layerdrop_rate(model)
    if rate > 0:
        raise ValueError(
            f"strategy is 'fsdp2' and the config of {type(base_model(model)).__name__} skips layers at random "
            f"(layerdrop {rate:g}), on each rank others, whose weights no other rank would then gather: set "
            "one rate for all its dropout (--model.dropout=0.1), with which every layer runs, or use strategy 'ddp'"
        )


def rank_mesh(device_type: str, world: int, group: int, timeout: timedelta | None = None) -> DeviceMesh:
    """Makes the mesh of all ranks: groups of neighbouring ranks shard one copy of the weights each.

    Args:
        device_type: device type of the ranks.
        world: number of ranks.
        group: number of ranks that shard a copy; it divides ``world``.
        timeout: timeout of collectives within and between groups.

    Returns:
        A mesh of one dimension for a single group, over which FSDP2 shards; else of shape ``(world / group, group)``,
        where FSDP2 replicates over the first dimension.
    """
    if group == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    ranks = torch.arange(world).view(-1, group)
    # Groups are made here because those made by DeviceMesh would have torch's default timeout.
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def block_options(mesh: DeviceMesh, *, cpu_offload: bool) -> dict[str, Any]:
    """Returns the options of ``fully_shard`` for decoder blocks.

    Args:
        mesh: mesh of the ranks.
        cpu_offload: keep the blocks' shards, gradients and optimizer states in host memory. The rest of a model stays
            on the GPU, so that a model's first parameter, its embeddings, still shows its device. No effect on ranks
            that compute on the CPU.
    """
    return {"offload_policy": CPUOffloadPolicy()} if cpu_offload and mesh.device_type == "cuda" else {}


def gathering(block: nn.Module, half: torch.dtype | None) -> dict[str, Any]:
    """Returns the options of ``fully_shard`` with which a block is gathered in the precision that it multiplies in.

    Autocast would round the weights of its linear layers after they were gathered in fp32, twice the bytes. Scales of
    norms are rounded with them. Gradients are summed over ranks in fp32. Blocks whose weights do more than that
    (experts, convolutions; see ``multiplies_alone``) are gathered in fp32.

    Args:
        block: a decoder block, whose linear layers then also compute without autocast.
        half: the precision of autocast; ``None`` without it.
    """
    if half is None or not multiplies_alone(block):
        return {}
    widen_without_autocast(block)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return {"mp_policy": policy}


def _keep_in_place(block: Any) -> None:
    """Restricts ``to`` to change a block's dtype but not its device, as the trainer moves whole modules."""
    apply = block._apply

    def apply_in_place(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def changed(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        module: nn.Module = apply(changed, recurse)
        return module

    block._apply = apply_in_place


def copies_of(sharded: DTensor) -> int:
    """Returns the number of copies of a sharded tensor over all ranks."""
    mesh = sharded.device_mesh
    return mesh.size() // mesh.size(mesh.ndim - 1)


def check_one_dtype(unit: nn.Module) -> None:
    """Refuses a unit with trained weights of several dtypes, whose gradients cannot be reduced in one buffer.

    Raises:
        ValueError: the unit has fp32 adapters and trained weights in half precision, for example.
    """
    trained: dict[torch.dtype, str] = {}
    for name, parameter in unit.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):  # DTensors belong to another unit
            trained.setdefault(parameter.dtype, name)
    if len(trained) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in trained.items())
        raise ValueError(
            f"strategy is 'fsdp2' and weights that are trained in one unit are in {found}: use precision 'bf16-mixed', "
            "strategy 'ddp', or a lora without modules_to_save and without adapters on embeddings"
        )


def local_shard(whole: Tensor, like: DTensor) -> Tensor:
    """Returns this rank's part of a whole tensor as FSDP2 splits it: along dimension 0, the last parts maybe empty."""
    mesh = like.device_mesh
    dimension = mesh.ndim - 1  # a dimension before it is that of copies
    chunks = torch.chunk(whole, mesh.size(dimension), dim=0)
    # torch.chunk may return fewer chunks than ranks: the last ranks then have none.
    rank = mesh.get_local_rank(dimension)
    return chunks[rank] if rank < len(chunks) else whole[:0]


def sharded_like(whole: Tensor, like: DTensor) -> DTensor:
    """Shards a whole tensor, which every rank holds, like another one of its shape."""
    local = local_shard(whole, like).to(like.device, copy=True).contiguous()
    strides = torch.empty(whole.shape, device="meta").stride()
    placed = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=strides
    )
    return placed.to(like.device)  # type: ignore[return-value]  # from_local puts offloaded parts on the mesh's device


def whole_tensor(value: Tensor) -> Tensor:
    """Gathers a tensor to the CPU; every rank calls it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def _split_whole_tensors(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Splits whole tensors of a state dict, so that ``load_state_dict`` loads them into shards."""
    own: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        given = state.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
            if given.shape != parameter.shape:
                continue  # load_state_dict reports the mismatch
            state[prefix + name] = sharded_like(given, parameter)


def _take_from_first_rank(unit: nn.Module, device: torch.device) -> list[Tensor]:
    """Replaces the weights and buffers of a unit, which may be on the meta device, by those of rank 0.

    Returns:
        The CPU tensors that this rank had loaded for the unit.
    """
    made: dict[int, nn.Parameter] = {}
    loaded: list[Tensor] = []
    sent: set[int] = set()
    for owner in unit.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or isinstance(parameter, DTensor):
                continue
            kept = made.get(id(parameter))  # tied weights stay tied
            if kept is None:
                loaded += [] if parameter.is_meta or parameter.is_cuda else [parameter.data]
                kept = _placed_parameter(parameter, device)
                made[id(parameter)] = made[id(kept)] = kept
            owner._parameters[name] = kept
            # Tied weights are sent once.
            if id(kept) not in sent:
                sent.add(id(kept))
                _broadcast(kept.data)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                placed = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                owner._buffers[name] = placed
                _broadcast(placed)
    return loaded


def _placed_parameter(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if parameter.is_meta:
        return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    parameter.data = parameter.data.to(device).contiguous()
    return parameter


def _broadcast(tensor: Tensor) -> None:
    """Broadcasts a tensor as bytes, which every backend supports for every dtype."""
    if tensor.numel():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(flat, src=0)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.dtype).view_as(tensor))
