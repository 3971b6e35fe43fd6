"""Convolutions of which every derivative is again a convolution that PyTorch has a fast path for.

Also what PyTorch's autocast leaves out of them.

PyTorch's own second derivative makes the kernels' gradient by a convolution with kernels as large
as the images, and the input's whether anybody wants it or not. Here ``aten::convolution`` and
``aten::convolution_backward`` do it all, images channels-last: pooling and convolutions are faster
so, and what stands between them keeps the order.

Many optimizees' convolutions as one, each with kernels of its own, PyTorch makes a convolution of
as many groups, which takes as long as all of them. Here small ones are products of matrices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Numbers in an output. Of smaller ones neither order nor second derivatives are worth the Python.
_SMALLEST = 2**17
# Numbers that kernels see, one that several see as often. Of more, products of matrices take up to
# eight times as long as convolutions, most of it in adding up the gradients of what several see.
_MOST_SEEN = 2**16
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_VIEWS = {torch.Tensor.view, torch.Tensor.view_as}
# Of images channels-last, these ask for the order by name, which nothing tells under vmap.
_GROUP_NORMS = frozenset((functional.group_norm, torch.group_norm))
_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def fast(wanted: bool | None) -> AbstractContextManager[Any]:
    """Inside, ``conv1d``, ``conv2d`` and ``conv3d`` on a CPU are this module's.

    Under ``torch.func``'s transforms, forward-mode differentiation and autocast, and of tensor
    subclasses, they stay PyTorch's.

    Args:
        wanted: All of them, none, or, where ``None``, those in float32 that are large enough to be
            faster.
    """
    return nullcontext() if wanted is False else _Fast(bool(wanted))


def products(on_gpu: bool = False) -> AbstractContextManager[Any]:
    """Inside, small convolutions on a CPU are products of matrices, under ``torch.func.vmap``, too.

    Those of several groups, transposed ones, and any under autocast stay PyTorch's.

    Args:
        on_gpu: Whether convolutions of any size on a GPU are, too.
    """
    return _Products(on_gpu)


def are_products(call: Callable[[], object]) -> bool | None:
    """Whether :func:`products` takes all convolutions that are called; ``None`` without any.

    That is without autocast, whatever surrounds this.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _Products(on_gpu=False) as mode:
        call()
    return not mode.left if mode.taken or mode.left else None


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, :class:`torch.autocast`, of convolutions under ``torch.func.vmap``, too.

    These it lets pass. It casts without its cache, which a graph that is captured had to keep.

    Args:
        device: Whose operations are cast, ``"cpu"`` or ``"cuda"``.
        dtype: What they compute in.
    """
    with torch.autocast(device, dtype, cache_enabled=False), _Cast(dtype):
        yield


def pays(call: Callable[[], object]) -> bool:
    """Whether anything that is called is faster here: what intercepts calls costs each of them."""
    with torch.no_grad(), _Fast(every=False) as mode:
        call()
    return mode.taken > 0


class _How(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rest(self) -> tuple[Any, ...]:
        """Arguments as both of PyTorch's functions take them, not transposed."""
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups


class _Cast(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS or func in _TRANSPOSED:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        single = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self._dtype) if single else value


class _Convolving(TorchFunctionMode, ABC):
    """Computes convolutions in PyTorch's place, those that it takes.

    Attributes:
        taken: How many it has taken.
        left: How many it has left to PyTorch.
    """

    _plain: frozenset[Callable[..., Any]] = frozenset()  # what is given images channels-first

    def __init__(self) -> None:
        super().__init__()
        self.taken = self.left = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and not types:
            x, weight, bias, how = _bind(_CONVOLUTIONS[func], *args, **kwargs)
            if how is not None and _fits(x, weight, bias, how) and self._takes(x, weight, how):
                self.taken += 1
                return self._compute(x, weight, bias, how)
        self.left += func in _CONVOLUTIONS or func in _TRANSPOSED
        if func in _VIEWS:
            return _view(func, *args, **kwargs)
        if func in self._plain:
            return _ordered_plainly(func, *args, **kwargs)
        return func(*args, **kwargs)

    @abstractmethod
    def _takes(self, x: Tensor, weight: Tensor, how: _How) -> bool:
        """Whether it takes a convolution whose arguments fit."""

    @abstractmethod
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Any:
        """The result of a convolution that it takes."""


class _Fast(_Convolving):
    def __init__(self, every: bool) -> None:
        super().__init__()
        self._every = every

    def _takes(self, x: Tensor, weight: Tensor, how: _How) -> bool:
        if x.device.type != "cpu" or _elsewhere():
            return False
        if self._every:
            return x.numel() > 0
        return x.dtype == torch.float32 and _out(x, weight, how) >= _SMALLEST

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Any:
        return _Convolution.apply(_ordered(x), _ordered(weight), bias, how)


class _Products(_Convolving):
    _plain = _GROUP_NORMS

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def _takes(self, x: Tensor, weight: Tensor, how: _How) -> bool:
        device = x.device.type
        return (
            how.groups == 1
            and x.shape[1] == weight.shape[1]
            and min(_sizes(x, weight, how)) > 0
            and (
                _out(x, weight, how) < _SMALLEST and _seen(x, weight, how) < _MOST_SEEN
                if device == "cpu"
                else device == "cuda" and self._on_gpu
            )
            and not torch.is_autocast_enabled(device)
        )

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        return _product(x, weight, bias, how)


def _elsewhere() -> bool:
    """Whether something is at work that a function with derivatives of its own does not suit."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _bind(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _How | None]:
    """A call's tensors and settings; none where padding is not the same on both sides."""

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    dilations = each(dilation)
    if isinstance(padding, str):
        sides = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=False)]
        if padding == "valid":
            padding = 0
        elif padding == "same" and set(each(stride)) == {1} and not any(s % 2 for s in sides):
            padding = [side // 2 for side in sides]
        else:
            return input, weight, bias, None
    return input, weight, bias, _How(each(stride), each(padding), dilations, groups)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> bool:
    """Whether dtypes, devices and dimensions fit; where not, PyTorch has the words for it."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all((t.device, t.dtype) == (x.device, x.dtype) for t in tensors)
        and x.is_floating_point()
        and {x.dim() - 2, weight.dim() - 2} == set(map(len, how[:3]))
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _sizes(x: Tensor, weight: Tensor, how: _How) -> tuple[int, ...]:
    """A convolution's result: samples, channels, and the sizes of its images."""
    images = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], how.stride, how.padding, how.dilation, strict=True
        )
    )
    return len(x), len(weight), *images


def _out(x: Tensor, weight: Tensor, how: _How) -> int:
    """How many numbers a convolution has for a result."""
    return math.prod(_sizes(x, weight, how))


def _seen(x: Tensor, weight: Tensor, how: _How) -> int:
    """How many numbers kernels see, all places taken together."""
    samples, _, *images = _sizes(x, weight, how)
    return samples * math.prod(images) * math.prod(weight.shape[1:])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    """A convolution as the product of what each kernel sees and the kernels, channels-last."""
    kernel = weight.shape[2:]
    spatial = range(2, 2 + len(kernel))
    if any(how.padding):
        x = functional.pad(x, [side for p in reversed(how.padding) for side in (p, p)])
    if x.shape[2:] == kernel:  # each sees all
        seen = x.reshape(*x.shape[:2], *[1] * len(kernel), *kernel)
    else:
        seen = x
        for dim, k, step, d in zip(spatial, kernel, how.stride, how.dilation, strict=True):
            seen = seen.unfold(dim, d * (k - 1) + 1, step)[..., ::d]
    out = seen.shape[2 : 2 + len(kernel)]
    # With channels last where they are so in memory, little or nothing is copied.
    columns = seen.permute(0, *range(2, seen.dim()), 1).reshape(-1, weight[0].numel())
    rows = weight.permute(0, *spatial, 1).reshape(len(weight), -1)
    product = columns.mm(rows.t())  # under vmap faster than linear
    if bias is not None:
        product = product + bias
    return product.view(len(x), *out, len(weight)).movedim(-1, 1)


def _ordered(tensor: Tensor) -> Tensor:
    """Images or their kernels channels-last; of anything else PyTorch has no faster order."""
    if tensor.dim() != 4:
        return tensor
    n, channels, height, width = tensor.shape
    if channels == 1:
        # Both orders are the same in memory, and PyTorch takes it for the other one.
        return tensor.reshape(n, height, width, 1).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=torch.channels_last)


def _view(func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A view as a module asks for it that expects an order that ours is not."""
    try:
        return func(tensor, *args, **kwargs)
    except RuntimeError:
        return func(tensor.contiguous(), *args, **kwargs)


def _ordered_plainly(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A call with its input channels-first."""
    return func(input.contiguous(), *args, **kwargs)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        out: Tensor = torch.ops.aten.convolution(x, weight, bias, *how.rest)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *_backward(d_out, x, weight, ctx.how, ctx.needs_input_grad[:3]), None


class _Backward(torch.autograd.Function):
    """From an output's gradient to those in images, kernels and biases, linear in each argument."""

    @staticmethod
    def forward(
        ctx: Any, d_out: Tensor, x: Tensor, weight: Tensor, how: _How, wanted: Sequence[bool]
    ) -> _Grads:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_out, x, weight)
        ctx.how = how
        grads: _Grads = torch.ops.aten.convolution_backward(
            _ordered(d_out), x, weight, [len(weight)], *how.rest, wanted
        )
        return grads

    @staticmethod
    def backward(
        ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_out, x, weight = ctx.saved_tensors
        how, (need_out, need_x, need_weight) = ctx.how, ctx.needs_input_grad[:3]
        in_out = in_x = in_weight = None
        if need_out:
            parts = []
            if of_x is not None:
                parts.append(_Convolution.apply(of_x, weight, None, how))
            if of_weight is not None:
                parts.append(_Convolution.apply(x, of_weight, of_bias, how))
            elif of_bias is not None:
                parts.append(of_bias.view(-1, *[1] * len(how.stride)).expand_as(d_out))
            in_out = sum(parts[1:], parts[0]) if parts else None
        if need_x and of_weight is not None:
            in_x, _, _ = _backward(d_out, x, of_weight, how, (True, False, False))
        if need_weight and of_x is not None:
            _, in_weight, _ = _backward(d_out, of_x, weight, how, (False, True, False))
        return in_out, in_x, in_weight, None, None


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, how: _How, wanted: Sequence[bool]
) -> _Grads:
    grads: _Grads = _Backward.apply(d_out, x, weight, how, wanted)
    return grads
