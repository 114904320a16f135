"""A pretended CUDA device: tensors that say ``cuda:0`` and compute on the CPU.

It refuses operands that CUDA refuses for every kernel: a generator of another device, and operands of mixed devices.
It does not model kernels, memory, streams or speed. Everything it changes in torch is put back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CUDA = torch.device("cuda", 0)
_aten: Any = torch.ops.aten
# Operators that take tensors of both devices: copies between them, and indices in host memory.
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm}
_MIXED = {_aten.copy_, _aten._to_copy, _aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class Watcher(Protocol):
    """Is told of the device's work while it is among ``WATCHERS``."""

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """An operator is run on the device, or copies between the devices."""

    def upload(self, *, waits: bool) -> None:
        """Host memory is copied to the device."""

    def read(self, *, waits: bool) -> None:
        """Memory of the device is copied to the host."""


WATCHERS: list[Watcher] = []
# Operators that are computed by others on the device, not as a whole: their own functions.
COMPOSED: dict[Any, Callable[..., Any]] = {}


class Pretended(Tensor):
    """A tensor on the pretended device.

    Args:
        inner: what it holds, on the CPU.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        for watcher in WATCHERS:
            watcher.read(waits=True)
        return _Fetch.apply(self) if self.requires_grad else Tensor.detach(self).inner.clone()

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = _target(args, kwargs)
        found = self.cpu() if _of_host(device) else self
        return found if dtype is None else Tensor.to(found, dtype)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = Pretended(self.inner.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # type: ignore[attr-defined]
        return copied

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.inner.clone()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.to(CUDA)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _of_host(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on what the tensors hold."""
    tensors = list(_tensors((*args, *kwargs.values())))
    here = [t for t in tensors if isinstance(t, Pretended)]
    asked = kwargs.get("device")
    # Inside C++ these tensors are the CPU's, which asks for "the device of the input" by that name.
    goes_here = bool(here) or (asked is not None and not _of_host(asked))
    if not goes_here:
        return _run_on_host(func, args, kwargs)
    composed = COMPOSED.get(func, func.decompose if _is_composed(func) else None)
    if composed is not None:
        with _Mode():
            return composed(*args, **kwargs)
    for watcher in WATCHERS:
        watcher.operator(func, args, kwargs)
    _check_devices(func, tensors, kwargs.get("generator"))
    packet = func.overloadpacket
    given = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    if asked is not None:
        given["device"] = torch.device("cpu")
    inner_args = _mapped(_inner, args)
    inner_kwargs = {name: _mapped(_inner, value) for name, value in given.items()}
    if packet is _aten.histc and not inner_args[0].is_floating_point():  # a card counts whole numbers, too
        out = func(inner_args[0].double(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    elif packet in _PRODUCTS and func._overloadname in ("dtype", "dtype_out"):
        out = _wide_product(func, *inner_args, **inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)
    if packet is _aten.copy_ and not isinstance(args[0], Pretended):
        return args[0]
    if packet in (_aten.set_, _aten.resize_):
        return args[0]
    # A view of a weight is no inference tensor, even where it is made in inference mode.
    plain_view = func.is_view and not args[0].is_inference()
    with torch.inference_mode(False) if plain_view else nullcontext():
        wrapped = _mapped(_wrapped, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, each) for each in value) if isinstance(value, list | tuple) else value


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, Pretended) else tensor


def _wrapped(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Pretended) else Pretended(tensor)


@cache
def _is_composed(func: Any) -> bool:
    """Whether an operator is made of others; above autograd torch has taken it apart already."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _run_on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", None)
    made = func(*args, **kwargs)
    if pinned:
        made.pretends_to_be_pinned = True
    return made


def _check_devices(func: Any, tensors: list[Tensor], generator: Any) -> None:
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    host = [tuple(t.shape) for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
    here = any(isinstance(t, Pretended) for t in tensors)
    if here and host and func.overloadpacket not in _MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} was given {host} on cpu")


def _wide_product(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A product that the CPU does not have: of half precision, added up in single precision."""
    *summand, left, right, wide = args
    kinds = {left.dtype, right.dtype}, {wide, *(t.dtype for t in (*summand, *kwargs.values()))}
    if kinds[0] not in ({torch.bfloat16}, {torch.float16}) or kinds[1] != {torch.float32}:
        raise RuntimeError(f"out_dtype must be fp32 for fp16/bf16 inputs: {func} was given {kinds}")
    plain = func.overloadpacket.out if "out" in kwargs else func.overloadpacket.default
    return plain(*summand, left.to(wide), right.to(wide), **kwargs)


class OnPretended(SingleDeviceStrategy):
    """One process on the pretended device, placed by Lightning's own code."""

    strategy_name = "pretended"

    def __init__(self) -> None:
        super().__init__(device="cuda:0", accelerator=_Accelerator())

    @property
    def root_device(self) -> torch.device:
        return CUDA


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Does nothing: the pretended device needs no setup."""


class _Event:
    """A point in time; the device is never ahead of or after the host."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.time - self.time)


def _target(args: Any, kwargs: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Where ``Tensor.to`` goes, and the dtype."""
    given = [*args, *kwargs.values()]
    like = next((a for a in given if isinstance(a, Tensor)), None)
    if like is not None:
        return like.device, like.dtype
    device = next((a for a in given if isinstance(a, str | torch.device)), None)
    return device, next((a for a in given if isinstance(a, torch.dtype)), None)


def _attention(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scaled-dot-product attention, whose causal mask C++ would make where it finds the tensors: in host memory."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        if dropout_p and options.get("is_causal") and isinstance(query, Pretended):  # only then one is made
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=CUDA).tril()
            options["is_causal"] = False
        return plain(query, key, value, attn_mask, dropout_p, **options)

    return attend


def _host(kind: Any) -> Any:
    return "cpu" if kind in (None, "cuda") else kind


def _autocasting() -> dict[str, Any]:
    """Functions of autocast, by name: that of the device is the CPU's."""
    autocast, enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(autocast):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_host(device_type), *args, **kwargs)

    return {
        "torch.autocast": Autocast,
        "torch.amp.autocast": Autocast,
        "torch.is_autocast_enabled": lambda kind=None: enabled(_host(kind)),
        "torch.get_autocast_dtype": lambda kind: dtype_of(_host(kind)),
    }


def _placing() -> dict[str, Any]:
    """Functions that make tensors or move them, by name."""
    tensor, move = torch.tensor, Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = _target(args, kwargs)
        if device is None or _of_host(device) or isinstance(self, Pretended):
            return move(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.requires_grad:
            return move(self, device=CUDA, dtype=dtype)
        for watcher in WATCHERS:
            free = kwargs.get("non_blocking", False) and getattr(self, "pretends_to_be_pinned", False)
            watcher.upload(waits=not free)
        # Threads that load weights do not see the mode of this one.
        plain = self.detach().clone()
        return Pretended(plain if dtype is None else move(plain, dtype))

    def make(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        stack = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, _device.DeviceContext)]
        place = device or (stack[-1] if stack else "cpu")
        if _of_host(place):
            return tensor(data, dtype=dtype, device=place, **kwargs)
        return tensor(data, dtype=dtype, device="cpu", **kwargs).to(CUDA)

    def wrap(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return make(data, dtype=dtype, device=device)

    return {"torch.tensor": make, "torch.as_tensor": wrap, "torch.Tensor.to": to}


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it, ``cuda:0`` is there."""
    replaced = {
        **_autocasting(),
        **_placing(),
        "torch.nn.functional.scaled_dot_product_attention": _attention(F.scaled_dot_product_attention),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda device=None: (7, 0),  # no kernel of newer cards is asked for
        "torch.cuda.get_rng_state": lambda device=None: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        "torch.cuda.Event": _Event,
        "torch.cuda.current_stream": lambda device=None: None,
        "torch.cuda.get_device_name": lambda device=None: "pretended",
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # fp16's scaler works
    }
    _device._device_constructors()  # kept by torch: must hold the true functions
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        # New parameters in the place of old ones: those of another device cannot be put into these.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        stack.enter_context(_Mode())
        yield
