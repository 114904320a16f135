"""The strategy ``fsdp2``: weights, gradients and optimizer states sharded over ranks, with unchanged results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..models.backbone import base_model
from ..models.meta_init import skeletons
from ..models.reference import FrozenReference
from .fsdp2 import (
    ShardedRoot,
    check_can_shard,
    check_runs_all_layers,
    rank_mesh,
    shard_model,
    sharded_like,
    whole_tensor,
)
from .lockstep import Lockstep, barrier, set_lockstep

if TYPE_CHECKING:
    import lightning

_HALF = ("16-mixed", "16-true")


def check_can_be_sharded(precision: str, quantization: str | None) -> None:
    """Refuses precisions and quantizations that cannot be trained in shards.

    Raises:
        ValueError: fp16, or quantised weights.
    """
    if precision in _HALF:
        raise ValueError(
            f"trainer.precision is {precision!r} with strategy 'fsdp2', where ranks see different shards and would "
            "scale their losses apart: use 'bf16-mixed'"
        )
    if quantization is not None:
        raise ValueError(
            f"quantization is {quantization!r} with strategy 'fsdp2', but bitsandbytes packs a whole matrix with its "
            "scales, which cannot be split over ranks: use strategy 'ddp', or remove quantization"
        )


def shard_group_size(shard_over: Literal["world", "node"] | int, per_node: int, num_nodes: int) -> int:
    """Returns the number of ranks that share one copy of the weights.

    Args:
        shard_over: ``"world"``, ``"node"``, or the number itself.
        per_node: number of ranks per node.
        num_nodes: number of nodes.

    Raises:
        ValueError: the number does not divide the number of all ranks.

    Example:
        >>> shard_group_size("world", 8, 2), shard_group_size("node", 8, 2), shard_group_size(4, 8, 2)
        (16, 8, 4)
    """
    world = per_node * num_nodes
    if isinstance(shard_over, str):
        return world if shard_over == "world" else per_node
    if world % shard_over:
        fitting = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise ValueError(
            f"shard_over is {shard_over}, which does not divide the {world} ranks into groups of one size: use one of "
            f"{fitting}"
        )
    return shard_over


def _check_shard_over(value: Any) -> None:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value not in ("world", "node"):
        raise ValueError(
            f"shard_over is {value!r}; it must be 'world', 'node', or a number of ranks of at least 1: write 'node' to "
            "keep a copy of the weights on every machine"
        )


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism, by PyTorch's FSDP2 (``fully_shard``), over all ranks or over each node's.

    Configured by ``trainer.strategy: fsdp2``. Every rank holds a shard of policy, reference and critic, and gathers one
    decoder block at a time (embeddings, output projection and scalar heads are one more unit). Gradients are summed, as
    losses are divided by global normalizers; weights after a step are those of one rank, up to rounding. Ranks may have
    different numbers of micro-batches, zero included: see ``distributed.lockstep``.

    Rank 0 reads the weights and broadcasts them block by block, so that host memory holds one copy. Checkpoints are
    single files, as on one rank: they load with any number of ranks and under any strategy.

    With ``shard_over="node"`` every node holds a copy of the weights (hybrid sharding; Zhao et al., 2023,
    arXiv:2304.11277, section 3.2.2): weights are gathered within a node, and only gradients are reduced between nodes.
    This is faster if the network between nodes is slower than within them and a copy fits on one. Results are the same.

    With ``cpu_offload=True`` the decoder blocks of policy, reference and critic, their gradients and optimizer states
    are kept in host memory: a block is copied to the GPU when it runs, its gradient is copied back, and the optimizer
    steps on the CPU (ZeRO-Offload; Ren et al., 2021, arXiv:2101.06840). This is slower, and meant for models that do
    not fit otherwise. Embeddings, output projection and scalar heads stay on the GPU. It has no effect on CPUs.

    Args:
        process_group_backend: backend of torch.distributed; by default the device's, and with ``cpu_offload`` on GPUs
            ``cpu:gloo,cuda:nccl``.
        timeout: timeout of collectives.
        shard_over: the ranks that share one copy of the weights: ``world``, ``node``, or that many neighbours, a number
            that divides the number of all ranks.
        cpu_offload: keep decoder blocks in host memory.

    Raises:
        ValueError: fp16, as ranks would choose different loss scales; quantised weights, which cannot be split; a
            value of ``shard_over`` that does not fit the ranks; or a backend that cannot reach offloaded weights.

    Example::

        lightning.Trainer(strategy="fsdp2", devices=8, precision="bf16-mixed").fit(module, data)
        lightning.Trainer(strategy=FSDP2Strategy(shard_over="node"), devices=8, num_nodes=4).fit(module, data)
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        shard_over: Literal["world", "node"] | int = "world",
        cpu_offload: bool = False,
    ) -> None:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            data_parallel_size=1,  # set in setup_environment, when the number of ranks is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )
        _check_shard_over(shard_over)
        if cpu_offload and process_group_backend == "nccl":
            raise ValueError(
                "process_group_backend is 'nccl' with cpu_offload=True, whose weights lie in host memory, where nccl "
                "cannot gather them: write 'cpu:gloo,cuda:nccl', or remove it"
            )
        self.shard_over = shard_over
        self.cpu_offload = cpu_offload
        self._mesh: DeviceMesh | None = None
        self._roots: list[ShardedRoot] = []
        self._lockstep: Lockstep | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers the name ``fsdp2``."""
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="FSDP2")

    def setup_environment(self) -> None:
        """Starts the process group and makes the mesh of all ranks."""
        group = shard_group_size(self.shard_over, self.num_processes, self.num_nodes)
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.cpu_offload and self.root_device.type == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # checkpoints gather shards in host memory
        super().setup_environment()
        self._mesh = rank_mesh(self.root_device.type, self.world_size, group, self._timeout)

    # Loading and sharding.

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Lets only rank 0 read weights, and raises its errors on every rank."""
        if not _distributed_is_initialized():
            with super().tensor_init_context(empty_init):
                yield
            return
        module: Any = self.lightning_module
        check_can_be_sharded(str(self.precision_plugin.precision), getattr(module, "quantization", None))
        with _heard_by_all(), super().tensor_init_context(False), skeletons(self.global_rank > 0):
            yield

    def setup(self, trainer: lightning.Trainer) -> None:
        """Shards policy, reference and critic, then continues with Lightning's setup."""
        module: Any = self.lightning_module
        # Once per strategy: `validate` after `fit` finds the models sharded.
        if not self._roots:
            groups = _models_of(module)
            with _heard_by_all():
                for model, _ in groups:
                    check_can_shard(model)
                    if trainer.state.fn == "fit":
                        check_runs_all_layers(model)
            for number, (model, heads) in enumerate(groups):
                assert self._mesh is not None
                options: dict[str, Any] = {"heads": heads, "number": number, "cpu_offload": self.cpu_offload}
                options["half"] = torch.bfloat16 if str(self.precision_plugin.precision) == "bf16-mixed" else None
                self._roots.append(shard_model(model, self._mesh, self.root_device, **options))
            self._agree_on_the_rest(module, [model for model, _ in groups])
        self._lockstep = Lockstep(self.root_device, self._roots)
        set_lockstep(self._lockstep)
        super().setup(trainer)

    def _agree_on_the_rest(self, module: Any, models: list[nn.Module]) -> None:
        """Copies the results of loading other than weights from rank 0: configs, fingerprint, random state."""
        # Skeletons lack what loading reads besides weights, and drew other random numbers.
        bases: list[Any] = [base_model(model) for model in models]
        resume = getattr(module, "resume", None)  # a module of another library has none
        local = {
            "generation": [getattr(base, "generation_config", None) for base in bases],
            "base": None if resume is None else resume.base,
            "random": torch.get_rng_state(),
        }
        first: dict[str, Any] = self.broadcast(local)
        for base, config in zip(bases, first["generation"], strict=True):
            if config is not None:
                base.generation_config = config
        if resume is not None:
            resume.base = first["base"]
        torch.set_rng_state(first["random"])

    def teardown(self) -> None:
        """Ends the lockstep of ranks."""
        set_lockstep(None)
        super().teardown()

    # Steps.

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs backward in lockstep with the other ranks."""
        if self._lockstep is not None:
            closure_loss = self._lockstep.backward(closure_loss)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a training step, and returns when all ranks have finished their passes."""
        with self._until_all_are_done():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a validation step, and returns when all ranks have finished their passes."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a test step, and returns when all ranks have finished their passes."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a prediction step, and returns when all ranks have finished their passes."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _until_all_are_done(self) -> Iterator[None]:
        yield
        barrier()
        for root in self._roots:
            root.reshard()  # type: ignore[operator]  # fully_shard has added it

    # Checkpoints: whole tensors in one file, as on one rank.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Always true: Lightning passes the optimizer's state to ``load_optimizer_state_dict``."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathers whole weights on rank 0; returns an empty dictionary elsewhere."""
        assert self.lightning_module is not None
        return self._on_rank_0(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathers the optimizer's state in whole tensors on rank 0; returns an empty dictionary elsewhere."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._on_rank_0(inner.state_dict())

    def _on_rank_0(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = _mapped(state, lambda tensor: whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
        return whole if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes one file on rank 0."""
        path = self.broadcast(filepath)
        # State added by hooks, such as a reference's weights, may be sharded too.
        whole = _mapped(checkpoint, lambda tensor: whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Opens a checkpoint on every rank, memory-mapped, so that a rank reads only the parts that it needs."""
        path = Path(checkpoint_path)
        if path.is_dir():
            raise ValueError(
                f"the checkpoint {str(path)!r} is a folder, as ModelParallelStrategy's distributed checkpoints are; "
                "strategy 'fsdp2' reads single files: resume with the strategy that wrote it"
            )
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's part of every weight."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's part of every optimizer state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # States are numbered in the order of the parameter groups, here as in the file.
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = dict(state["state"])
            for number, parameter in zip(numbers, parameters, strict=True):
                if number in own and isinstance(parameter, DTensor):
                    own[number] = {name: _like(value, parameter) for name, value in own[number].items()}
            optimizer.load_state_dict({**state, "state": own})


def _like(value: Any, parameter: DTensor) -> Any:
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return sharded_like(value, parameter)
    return value


def _mapped(value: Any, function: Any) -> Any:
    """Applies a function to every tensor of nested dictionaries, lists and tuples, in their order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(each, function) for key, each in value.items()}
    # Named tuples are values of their own, without tensors.
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_mapped(each, function) for each in value)
    return value


def _models_of(module: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Returns every model of a module with the heads that read its hidden states: policy, critic, references."""
    critic = getattr(module, "critic", None)
    own_critic = getattr(critic, "model", None)
    # Modules that read the policy's hidden states are gathered with its root; a critic with its own model is not.
    heads = [
        child
        for name, child in module.named_children()
        if name != "model" and any(True for _ in child.parameters()) and (child is not critic or own_critic is None)
    ]
    models = [(module.model, heads)]
    if own_critic is not None and critic is not None:
        models.append((own_critic, [critic.head]))
    references = [each for each in getattr(module, "references", ()) if isinstance(each, FrozenReference)]
    return models + [(reference.model, []) for reference in references]


@contextmanager
def _heard_by_all() -> Iterator[None]:
    """Raises an exception of one rank on every rank, so that none waits for it forever."""
    local_error: Exception | None = None
    try:
        yield
    except Exception as error:
        local_error = error

    # Every rank gets here, whether or not it failed, so that the collective is complete.
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if local_error is None else str(local_error))
    if local_error is not None:
        raise local_error
    for rank, message in enumerate(said):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")


FSDP2Strategy.register_strategies(StrategyRegistry)
