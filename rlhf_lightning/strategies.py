"""The strategy ``fsdp2``: weights, gradients and optimizer states sharded over all ranks, results unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .models.backbone import base_model
from .models.lockstep import Lockstep, meet, set_lockstep
from .models.reference import FrozenReference
from .models.sharding import ShardedRoot, check_can_shard, shard_model, sharded_like, whole_tensor
from .models.skeleton import skeletons

if TYPE_CHECKING:
    import lightning

_HALF = ("16-mixed", "16-true")


def check_can_be_sharded(precision: str, quantization: str | None) -> None:
    """Refuses what cannot be trained in shards.

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
            "scales, which cannot be split over ranks: use strategy 'ddp', or leave quantization out"
        )


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all ranks, by PyTorch's FSDP2 (``fully_shard``).

    Written ``trainer.strategy: fsdp2``. Of policy, reference and critic every rank keeps a part, and gathers one
    decoder block at a time (embeddings, output projection and scalar heads are one more unit). Gradients are summed, as
    losses are divided by global totals; weights after a step are those of one rank, up to rounding. Ranks may have
    different numbers of micro-batches, none included: see ``models.lockstep``.

    Rank 0 reads the weights; the others are given theirs block by block, so that host memory holds one copy.
    Checkpoints are single files, as on one rank: they load at any number of ranks and under any strategy.

    Args:
        process_group_backend: of torch.distributed; by default the device's.
        timeout: of collectives.

    Raises:
        ValueError: fp16, whose loss scale ranks would choose apart, or quantised weights, which cannot be split.

    Example::

        lightning.Trainer(strategy="fsdp2", devices=8, precision="bf16-mixed").fit(module, data)
    """

    strategy_name = "fsdp2"

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None) -> None:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            data_parallel_size=1,  # of all ranks, once their number is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )
        self._roots: list[ShardedRoot] = []
        self._lockstep: Lockstep | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Makes the name known to the trainer."""
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="FSDP2 over all ranks")

    def setup_environment(self) -> None:
        """Spans the mesh over all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Loading and sharding.

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Lets rank 0 alone read weights, and every rank hear what went wrong there."""
        if not _distributed_is_initialized():
            with super().tensor_init_context(empty_init):
                yield
            return
        module: Any = self.lightning_module
        check_can_be_sharded(str(self.precision_plugin.precision), getattr(module, "quantization", None))
        with _heard_by_all(), super().tensor_init_context(False), skeletons(self.global_rank > 0):
            yield

    def setup(self, trainer: lightning.Trainer) -> None:
        """Shards policy, reference and critic; then everything goes as Lightning does it."""
        module: Any = self.lightning_module
        if not self._roots:
            groups = _models_of(module)
            with _heard_by_all():
                for model, _ in groups:
                    check_can_shard(model)
            for number, (model, heads) in enumerate(groups):
                root = shard_model(
                    model, self.device_mesh["data_parallel"], self.root_device, heads=heads, number=number
                )
                self._roots.append(root)
            self._agree_on_the_rest(module, [model for model, _ in groups])
        self._lockstep = Lockstep(self.root_device, self._roots)
        set_lockstep(self._lockstep)
        super().setup(trainer)

    def _agree_on_the_rest(self, module: Any, models: list[nn.Module]) -> None:
        """Copies from rank 0 what loading leaves behind beside weights."""
        bases: list[Any] = [base_model(model) for model in models]
        mine = {
            "generation": [getattr(base, "generation_config", None) for base in bases],
            "base": getattr(module, "_base", {}),
            "random": torch.get_rng_state(),
        }
        theirs: dict[str, Any] = self.broadcast(mine)
        for base, config in zip(bases, theirs["generation"], strict=True):
            if config is not None:
                base.generation_config = config
        if hasattr(module, "_base"):
            module._base = theirs["base"]
        torch.set_rng_state(theirs["random"])
        if hasattr(module, "remember_buffers"):
            module.remember_buffers()

    def teardown(self) -> None:
        """Ends the agreement between ranks."""
        set_lockstep(None)
        super().teardown()

    # Steps.

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs backward in step with the other ranks."""
        if self._lockstep is not None:
            closure_loss = self._lockstep.backward(closure_loss)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See LightningModule; no rank leaves before all have run what they had to."""
        with self._until_all_are_done():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See LightningModule."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See LightningModule."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See LightningModule."""
        with self._until_all_are_done(), torch.inference_mode(False), torch.no_grad():
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _until_all_are_done(self) -> Iterator[None]:
        yield
        meet()
        for root in self._roots:
            root.reshard()  # type: ignore[operator]  # fully_shard has added it

    # Checkpoints: whole tensors in one file, in the form of one rank.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimizer's state."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0, nothing elsewhere."""
        assert self.lightning_module is not None
        return self._on_rank_0(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state in whole tensors on rank 0, nothing elsewhere."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._on_rank_0(inner.state_dict())

    def _on_rank_0(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = _mapped(state, lambda tensor: whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
        return whole if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes one file, on rank 0."""
        path = self.broadcast(filepath)
        # What hooks have added (a reference that moves, say) may be sharded, too.
        whole = _mapped(checkpoint, lambda tensor: whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Opens a checkpoint on every rank; what a rank does not need of a file stays on the disk."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            raise ValueError(
                f"the checkpoint {str(path)!r} is a folder, as ModelParallelStrategy's distributed checkpoints are; "
                "strategy 'fsdp2' reads single files: resume with the strategy that wrote it"
            )
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's part of every weight."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's part of every state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
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
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_mapped(each, function) for each in value)
    return value


def _models_of(module: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Every model of a module, with the heads that read its hidden states: policy, critic, references."""
    critic = getattr(module, "critic", None)
    own_critic = getattr(critic, "model", None)
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
    """Raises on every rank what one rank has met, so that none waits for it for ever."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for rank, message in enumerate(said):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")


FSDP2Strategy.register_strategies(StrategyRegistry)
