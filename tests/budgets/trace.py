"""Counts what a program asks of a pretended CUDA device: operators, copies either way, and where it waits.

Operators are calls that launch kernels: views and uninitialised memory do not count. Scaled-dot-product attention
and a variable-length call of flash attention are one operator in either direction, as they are on a card. The program
*waits* when it reads memory of the device, when an operator must be finished before the size of its result is known,
and when it copies from memory that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rlhf_lightning.sequences import cascade

from ..gpu import pretended
from ..gpu.pretended import Pretended, pretended_cuda

_aten: Any = torch.ops.aten
_ROOT = Path(__file__).resolve().parents[2]
# Operators that launch nothing, besides views.
_IDLE = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.detach,
    _aten._unsafe_view,
    _aten._reshape_alias,
    _aten.lift_fresh,
    _aten.set_,
    _aten.resize_,
    _aten.is_same_size,
}
# Operators whose result, or its size, the host reads.
_WAITING = {
    _aten._local_scalar_dense: "item",
    _aten.bincount: "bincount",
    _aten.equal: "equal",
    _aten.is_nonzero: "bool",
    _aten.masked_select: "masked_select",
    _aten.nonzero: "nonzero",
    _aten.unique_consecutive: "unique",
    _aten._unique: "unique",
    _aten._unique2: "unique",
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


@dataclass
class Trace:
    """Counts, by the place in the code that asked for it.

    Args:
        operators: operators of the device, by their names.
        shapes: the same, with the shapes of what they are given.
        uploads: copies from the host to the device.
        reads: copies from the device to the host.
        waits: places where the host waits for the device: these reads, and others.
        masks: scaled-dot-product attention with a mask, which rules flash attention out.
        casts: bytes that are read and written to cast parameters to another precision.
    """

    operators: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    casts: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: Trace) -> Trace:
        """The counts that this trace has in excess of another; below 0 where it has fewer."""
        found = Trace()
        for name, counter in vars(self).items():
            difference = Counter(counter)
            difference.subtract(getattr(other, name))
            setattr(found, name, Counter({key: count for key, count in difference.items() if count}))
        return found

    def __truediv__(self, times: int) -> Trace:
        """The counts of one of some equal parts."""
        found = Trace()
        for name, counter in vars(self).items():
            setattr(found, name, Counter({key: count / times for key, count in counter.items()}))
        return found

    @property
    def totals(self) -> dict[str, float]:
        """The sum of each counter."""
        return {name: sum(counter.values()) for name, counter in vars(self).items()}


def _shapes(given: Any) -> Any:
    """The shapes of values, in place of them; numbers that are no part of a shape are left out."""
    if isinstance(given, Tensor):
        return list(given.shape)
    if not isinstance(given, list | tuple):
        return type(given).__name__
    sizes = isinstance(given, list) and all(isinstance(each, int) for each in given)
    return given if sizes else [_shapes(each) for each in given]


def place_in_code() -> str:
    """The innermost line of the package on the stack, else that of another program than torch."""
    frame, outside = sys._getframe(2), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(_ROOT)) and "site-packages" not in name and f"{_ROOT}/tests/" not in name:
            return f"{name.removeprefix(f'{_ROOT}/').removeprefix('rlhf_lightning/')}:{frame.f_lineno}"
        library = name.rpartition("site-packages/")[2]
        if outside is None and "site-packages" in name and not library.startswith("torch/"):
            outside = f"{library}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside or "?"


class Tracer:
    """Watches the pretended device.

    Attributes:
        trace: the counts since the last ``take``.
    """

    def __init__(self) -> None:
        self.trace = Trace()
        self._paused = 0

    def take(self) -> Trace:
        """Returns the counts and begins new ones."""
        found, self.trace = self.trace, Trace()
        return found

    @contextmanager
    def as_one(self, name: str, *given: Any) -> Iterator[None]:
        """Counts what is run within as one operator that is given some values."""
        self._count(name, given)
        self._paused += 1
        try:
            with _disable_current_modes():
                yield
        finally:
            self._paused -= 1

    def _count(self, name: str, given: Any) -> None:
        if not self._paused:
            self.trace.operators[name] += 1
            self.trace.shapes[f"{name} {_shapes(given)}"] += 1

    def upload(self, *, waits: bool) -> None:
        """Counts a copy to the device."""
        if self._paused:
            return
        place = place_in_code()
        self.trace.uploads[place] += 1
        if waits:
            self.trace.waits[f"upload {place}"] += 1

    def read(self, *, waits: bool) -> None:
        """Counts a copy to the host."""
        if self._paused:
            return
        place = place_in_code()
        self.trace.reads[place] += 1
        if waits:
            self.trace.waits[f"read {place}"] += 1

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Counts an operator, or the copy that it is."""
        packet = func.overloadpacket
        if packet is _aten.copy_:
            target, source = args[:2]
            free = len(args) > 2 and args[2]
            if isinstance(target, Pretended) and not isinstance(source, Pretended):
                return self.upload(waits=not (free and hasattr(source, "pretends_to_be_pinned")))
            if not isinstance(target, Pretended):
                return self.read(waits=not (free and hasattr(target, "pretends_to_be_pinned")))
        # Inside C++ a tensor of the device is one of the CPU: what begins there stays there.
        if packet is _aten._to_copy and not isinstance(args[0], Pretended):
            return self.upload(waits=True)
        if self._paused or packet in _IDLE or func.is_view:
            return None
        self._count(str(packet).removeprefix("aten."), args)
        if packet is _aten._to_copy and getattr(args[0], "_is_param", False):
            wide = kwargs.get("dtype") or args[0].dtype
            self.trace.casts[place_in_code()] += args[0].numel() * (args[0].dtype.itemsize + wide.itemsize)
        return self._look_for_waiting(func, args, kwargs)

    def _look_for_waiting(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        packet = func.overloadpacket
        if packet in _WAITING:
            self._wait(_WAITING[packet])
            if packet is _aten._local_scalar_dense:
                self.trace.reads[place_in_code()] += 1
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._wait("repeat_interleave")
        elif packet in _INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and not isinstance(index, Pretended) and index.dim():
                    self.upload(waits=True)
                elif isinstance(index, Pretended) and index.dtype in (torch.bool, torch.uint8):
                    self._wait("boolean index")

    def _wait(self, why: str) -> None:
        self.trace.waits[f"{why} {place_in_code()}"] += 1


@contextmanager
def traced_cuda() -> Iterator[Tracer]:
    """Within it, ``cuda:0`` is there and is watched, and flash attention applies wherever it would on a card."""
    tracer = Tracer()
    compose = {torch.ops.rlhf_lightning.cascade.default: cascade.cascade._init_fn}
    compose[torch.ops.rlhf_lightning.cascade_backward.default] = cascade._cascade_backward._init_fn
    with ExitStack() as stack:
        stack.enter_context(pretended_cuda())
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention(tracer)))
        stack.enter_context(patch.object(cascade, "can_use_flash_attention", lambda params: True))
        stack.enter_context(patch.object(cascade, "SDPAParams", lambda *given: given))
        for name in ("flash_forward", "flash_backward"):
            plain = getattr(cascade, name.replace("flash", "plain"))
            stack.enter_context(patch.object(cascade, name, _on_host(tracer, name, plain)))
        stack.enter_context(patch.dict(pretended.COMPOSED, compose))
        pretended.WATCHERS.append(tracer)
        stack.callback(pretended.WATCHERS.remove, tracer)
        yield tracer


def _host(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _device(value: Any) -> Any:
    return Pretended(value) if isinstance(value, Tensor) else value


def _on_host(tracer: Tracer, name: str, function: Any) -> Any:
    """A call of flash attention, in plain operators."""

    def run(*args: Any) -> Any:
        *states, call = args
        bounds = {"queries": _host(call.queries), "keys": _host(call.keys)}
        with tracer.as_one(name, *states):
            found = function(*map(_host, states), call._replace(**bounds))
        return type(found)(map(_device, found))

    return run


def _attention(tracer: Tracer) -> Any:
    plain = F.scaled_dot_product_attention

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Tensor:
            with tracer.as_one("attention", query, key, value, mask):
                out = Pretended(plain(*map(_host, (query, key, value)), attn_mask=_host(mask), **options))
            ctx.options = options
            ctx.save_for_backward(query, key, value, mask, out)
            return out

        @staticmethod
        def backward(ctx: Any, slope: Any) -> Any:  # type: ignore[override]
            *states, mask, _ = ctx.saved_tensors
            with tracer.as_one("attention_backward", slope), torch.enable_grad():
                leaves = [_host(state).detach().requires_grad_() for state in states]
                again = plain(*leaves, attn_mask=_host(mask), **ctx.options)
                found = torch.autograd.grad(again, leaves, _host(slope))
            return (*map(Pretended, found), None, None)

    def run(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Tensor:
        if not isinstance(query, Pretended):
            return plain(query, key, value, attn_mask=attn_mask, **options)
        if torch.is_autocast_enabled("cuda"):  # which casts the states of this operator
            query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
        if attn_mask is not None:
            tracer.trace.masks[place_in_code()] += 1
        return Attention.apply(query, key, value, attn_mask, options)  # type: ignore[no-any-return]

    return run
