"""The sharding plan of FSDP2, and how weights that rank 0 has loaded become shards.

Every decoder block is a unit; what is left of a model (embeddings, final norm, output projection, a scalar head) is one
more, which is gathered when the decoder begins and stays so until the backward pass, because the fused log-prob head
and scalar heads read their weights after it. Tied weights are in that last unit together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..models.backbone import base_model, decoder_of
from ..models.dropout import layers_left_out
from ..utils.page_cache import drop_file_pages
from .lockstep import lockstep

_ROOT = "_sharded_root"  # the attribute of a decoder that leads to its root; no registered submodule


class ShardedRoot(nn.Module):
    """What is left of a model besides its decoder blocks, as one unit that is gathered around the decoder's forward.

    Args:
        model: a causal language model.
        parts: heads that read its hidden states.
        number: by which ranks agree on its forwards.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module], number: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model, *parts])
        self._decoder = [decoder_of(model)]  # not a submodule twice
        self.number = number

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder's own forward."""
        return run(*args, **kwargs)

    def take_over(self) -> None:
        """Lets every forward of the decoder go through this unit, in step with the other ranks."""
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

    def stand_in(self) -> Tensor:
        """Makes a pass over one token, and returns its hidden states."""
        token = torch.zeros((1, 1), dtype=torch.long, device=next(self.parameters()).device)
        hidden: Tensor = self(self._run, input_ids=token, use_cache=False)[0]
        return hidden


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """Every unit of a sharded model, its root first; none where nothing is sharded."""
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
) -> ShardedRoot:
    """Shards a causal language model and the heads that read it, unit by unit, with the weights of rank 0.

    Other ranks may bring weights on the meta device; no rank holds more than its shards and one whole unit, beside what
    it has loaded itself.

    Args:
        model: the model, bare or with adapters around it.
        mesh: of all ranks, as :func:`rank_mesh` makes it.
        device: what this rank computes on.
        heads: modules that read the model's hidden states.
        number: the model's, for ``Lockstep``.
        cpu_offload: see ``block_options``.

    Raises:
        ValueError: the weights are quantised.
    """
    check_can_shard(model)
    base = base_model(model)
    known: ShardedRoot | None = getattr(decoder_of(base), _ROOT, None)
    if known is not None:  # by an earlier trainer of this process
        known.number = number
        return known
    options = block_options(mesh, cpu_offload=cpu_offload)
    for block in decoder_blocks(base):
        check_one_dtype(block)
        read = _take_from_first_rank(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **options)
        if "offload_policy" in options:
            _keep_in_place(block)
        drop_file_pages(read)
    root = ShardedRoot(base, heads, number)
    check_one_dtype(root)
    read = _take_from_first_rank(root, device)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    drop_file_pages(read)
    del read
    units: list[Any] = [root, *decoder_blocks(base)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)  # losses are divided by global totals already
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reduce_scatter_unused_params(True)  # a rank without rows uses few
    for part in root.parts:
        part.register_load_state_dict_pre_hook(_split_whole_tensors)
    root.take_over()
    return root


def check_can_shard(model: nn.Module) -> None:
    """Refuses weights that cannot be split.

    Raises:
        ValueError: the weights are quantised.
    """
    if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        raise ValueError(
            "strategy is 'fsdp2' and the weights are quantised, but bitsandbytes packs a whole matrix with its scales, "
            "which cannot be split over ranks: use strategy 'ddp', or a model that is not quantised"
        )


def check_runs_all_layers(model: nn.Module) -> None:
    """Refuses a model that is about to be trained with layers left out: each rank would wait for others' weights.

    Raises:
        ValueError: its rate of layerdrop is above 0.
    """
    rate = layers_left_out(model)
    if rate > 0:
        raise ValueError(
            f"strategy is 'fsdp2' and the config of {type(base_model(model)).__name__} leaves out layers at random "
            f"(layerdrop {rate:g}), on each rank others, whose weights no other rank would then gather: set "
            "one rate for all its dropout (--model.dropout=0.1), with which every layer runs, or use strategy 'ddp'"
        )


def rank_mesh(device_type: str, world: int, group: int, timeout: timedelta | None = None) -> DeviceMesh:
    """All ranks as a mesh: groups of neighbours share one copy of the weights, and every group has a copy.

    Args:
        device_type: what ranks compute on.
        world: number of ranks.
        group: number of ranks that share a copy; it divides ``world``.
        timeout: of collectives within groups and between them.

    Returns:
        One dimension where there is one group, as FSDP2 shards over all of it; else ``(world / group, group)``, whose
        first dimension it replicates over.
    """
    if group == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    ranks = torch.arange(world).view(-1, group)
    # By hand, as groups that the mesh makes would have torch's own timeout.
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def block_options(mesh: DeviceMesh, *, cpu_offload: bool) -> dict[str, Any]:
    """What ``fully_shard`` is told of the decoder blocks beside their mesh.

    Args:
        mesh: of the ranks.
        cpu_offload: keep the blocks' shards, gradients and optimizer states in host memory. What is left of a model
            stays on the GPU, so that a model's first parameter, its embeddings, still tells where it computes. Nothing
            changes where ranks compute on the CPU.
    """
    return {"offload_policy": CPUOffloadPolicy()} if cpu_offload and mesh.device_type == "cuda" else {}


def _keep_in_place(block: Any) -> None:
    """Lets ``to`` change a block's precision, never the device of its tensors: the trainer moves whole modules."""
    apply = block._apply

    def apply_in_place(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def changed(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        module: nn.Module = apply(changed, recurse)
        return module

    block._apply = apply_in_place


def copies_of(sharded: DTensor) -> int:
    """How many times a sharded tensor is there, over all ranks."""
    mesh = sharded.device_mesh
    return mesh.size() // mesh.size(mesh.ndim - 1)


def check_one_dtype(unit: nn.Module) -> None:
    """Refuses a unit that trains weights of several dtypes, whose gradients cannot be summed in one buffer.

    Raises:
        ValueError: adapters in fp32 beside trained weights in half a precision.
    """
    trained: dict[torch.dtype, str] = {}
    for name, parameter in unit.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):  # those of another unit are sharded already
            trained.setdefault(parameter.dtype, name)
    if len(trained) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in trained.items())
        raise ValueError(
            f"strategy is 'fsdp2' and weights that are trained in one unit are in {found}: use precision 'bf16-mixed', "
            "strategy 'ddp', or a lora without modules_to_save and without adapters on embeddings"
        )


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder: its largest list of modules."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def local_shard(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a whole tensor, as FSDP2 splits it: along the first dimension, the last parts maybe empty."""
    mesh = like.device_mesh
    dimension = mesh.ndim - 1  # copies are counted along the one before
    chunks = torch.chunk(whole, mesh.size(dimension), dim=0)
    rank = mesh.get_local_rank(dimension)
    return chunks[rank] if rank < len(chunks) else whole[:0]


def sharded_like(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor that every rank can read, sharded as another one of its shape."""
    local = local_shard(whole, like).to(like.device, copy=True).contiguous()
    strides = torch.empty(whole.shape, device="meta").stride()
    placed = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=strides
    )
    return placed.to(like.device)  # type: ignore[return-value]  # what is offloaded goes to the mesh's device first


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor on the CPU that is not sharded; every rank calls it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def _split_whole_tensors(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` read whole tensors into shards."""
    own: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        given = state.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
            if given.shape != parameter.shape:
                continue  # torch says what is wrong with it
            state[prefix + name] = sharded_like(given, parameter)


def _take_from_first_rank(unit: nn.Module, device: torch.device) -> list[Tensor]:
    """Puts rank 0's weights and buffers in the place of what other ranks have, which may be nothing (meta).

    Returns:
        What this rank had loaded of the unit itself.
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
    """Sends bytes, which every backend can for every dtype."""
    if tensor.numel():
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        dist.broadcast(flat, src=0)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.dtype).view_as(tensor))
