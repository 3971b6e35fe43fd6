"""Any ``torch.optim.Optimizer`` as a teacher: students learn from its parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from amalgam import dotted
from amalgam.layout import Layout
from amalgam.seeding import drawing

_TRIED = 3  # steps

TorchState = dict[str, Any]
"""What a torch optimizer carries: ``<tensor>/<name>`` -> tensor, number or ``None``.

``<tensor>`` is the index of a tensor in the layout. Entries of an optimizer's group, which few
optimizers have, are under ``group0`` for the first optimizer and ``group1`` for the one for others.
"""


@dataclass(frozen=True)
class _Made:
    """An optimizer class and its arguments, both hashable."""

    path: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def lr(self) -> float:
        return float(self.make([torch.zeros(1, 1)]).param_groups[0]["lr"])

    def make(self, params: Sequence[Tensor]) -> Optimizer:
        return find_optimizer(self.path)(list(params), **dict(self.arguments))

    def at(self, lr: float) -> _Made:
        return _Made(self.path, tuple(sorted({**dict(self.arguments), "lr": lr}.items())))

    def __str__(self) -> str:
        return f"{self.path}({', '.join(f'{key}={value!r}' for key, value in self.arguments)})"


def find_optimizer(path: str) -> type[Optimizer]:
    """The optimizer class of a dotted path, such as ``"torch.optim.Muon"``.

    Raises:
        ValueError: There is nothing of that name, or it is no optimizer.
    """
    found = dotted.find(path, "optimizer", "a class", "torch.optim.Muon")
    if not isinstance(found, type) or not issubclass(found, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, which {path!r} is not")
    return found


def _made(optimizer: str | type[Optimizer], arguments: Mapping[str, Any]) -> _Made:
    if isinstance(optimizer, str):
        path = optimizer
    elif getattr(torch.optim, optimizer.__name__, None) is optimizer:
        path = f"torch.optim.{optimizer.__name__}"
    else:
        path = f"{optimizer.__module__}.{optimizer.__qualname__}"
    find_optimizer(path)
    return _Made(path, tuple(sorted((key, _frozen(value)) for key, value in arguments.items())))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


class TorchTeacher:
    """A ``torch.optim`` optimizer, or any other of its interface, as a teacher.

    Two are equal, and hash alike, if their optimizers and arguments are, which ``repr`` shows. The
    optimizer is made anew in every step and given its ``state`` and what has changed in its group,
    so it may keep nothing elsewhere. Some steps on a tensor of one element try that out when the
    teacher is made.

    Args:
        optimizer: Its class, or that class's dotted path.
        arguments: Its arguments.
        others: Class or path, and arguments, of the optimizer for tensors that the first one
            refuses, as Muon does all but matrices.
        **more: Further arguments, as in ``TorchTeacher(torch.optim.Muon, lr=0.02)``.

    Raises:
        ValueError: Either is no optimizer that can be imported, its arguments do not fit, it has
            no learning rate, its step fails or needs a closure (LBFGS) or sparse gradients
            (SparseAdam), or it keeps what can't be given to it again.
    """

    policy: ClassVar[None] = None

    def __init__(
        self,
        optimizer: str | type[Optimizer],
        arguments: Mapping[str, Any] | None = None,
        *,
        others: tuple[str | type[Optimizer], Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> None:
        self._first = _made(optimizer, {**(arguments or {}), **more})
        self._others = None if others is None else _made(*others)
        for made in self._all():
            _try_out(made)

    def _all(self) -> tuple[_Made, ...]:
        return (self._first,) if self._others is None else (self._first, self._others)

    @property
    def kind(self) -> str:
        """The optimizer's name."""
        return self._first.path.rpartition(".")[2]

    @property
    def lr(self) -> float:
        """Its learning rate."""
        return self._first.lr

    @property
    def label(self) -> str:
        """Its learning rate."""
        return f"{self.lr:g}"

    def at(self, lr: float) -> TorchTeacher:
        """The same teacher at another learning rate; that for others changes in proportion."""
        other, factor = copy.copy(self), lr / self.lr
        other._first = self._first.at(lr)
        if self._others is not None:
            other._others = self._others.at(self._others.lr * factor)
        return other

    def initial_state(self, like: Tensor, layout: Layout | None = None) -> TorchState:
        """The state before the first step, ``{}``: the optimizer itself makes what it needs.

        Raises:
            ValueError: The optimizer refuses a tensor of ``layout``, and there is none for others.
        """
        if layout is not None:
            self.routes(layout, like)
        return {}

    def routes(self, layout: Layout, like: Tensor) -> tuple[tuple[int, ...], ...]:
        """Which of a layout's tensors, by index, each optimizer steps: the first, that for others.

        Args:
            layout: The tensors.
            like: Coordinates of their dtype and device.

        Raises:
            ValueError: The optimizer refuses a tensor, and there is none for others.
        """
        return _routes(self._all(), tuple(layout.shapes.values()), like.dtype, like.device)

    def step(
        self, params: Tensor, grad: Tensor, state: TorchState, layout: Layout, backend: str = "auto"
    ) -> tuple[Tensor, TorchState]:
        """One step.

        Args:
            params: Its parameters, shape (N,); not changed.
            grad: Their gradient, shape (N,).
            state: The carried state, ``{}`` at first, on any device; not changed.
            layout: Which tensors the coordinates are.
            backend: Not used: the optimizer computes it.

        Returns:
            The update (N,), to be subtracted, and the new state.

        Raises:
            ValueError: The optimizer refuses a tensor, and there is none for others.
        """
        params, grad = params.detach(), grad.detach()
        # Copies, because an optimizer changes parameters, and may change gradients, in place.
        scratch = [part.clone() for part in layout.unflatten(params).values()]
        for tensor, part in zip(scratch, layout.unflatten(grad).values(), strict=True):
            tensor.grad = part.clone()
        new_state: TorchState = {}
        pairs = zip(self._all(), self.routes(layout, params), strict=True)
        for number, (made, route) in enumerate(pairs):
            if not route:
                continue
            new_state |= _stepped(made, number, {index: scratch[index] for index in route}, state)
        after = torch.cat([tensor.reshape(-1) for tensor in scratch]) if scratch else params
        return params - after, new_state

    def warm_up(
        self, params: Tensor, grad: Tensor, state: TorchState, layout: Layout
    ) -> TorchState:
        """The state after a warm-up step: that after a step, whose update is not taken."""
        return self.step(params, grad, state, layout)[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchTeacher) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        others = "" if self._others is None else f", others={self._others}"
        return f"TorchTeacher({self._first}{others})"


def _stepped(
    made: _Made, number: int, tensors: Mapping[int, Tensor], state: TorchState
) -> TorchState:
    """Have an optimizer, made anew, step tensors in place by their gradients.

    Args:
        made: The optimizer.
        number: Its place among a teacher's optimizers.
        tensors: The tensors that it steps, by their index in the layout; at least one.
        state: The carried state.

    Returns:
        The new state, of these tensors and this optimizer.
    """
    optimizer = made.make(list(tensors.values()))
    (group,) = optimizer.param_groups
    fresh = {key: value for key, value in group.items() if key != "params"}
    group.update(_under(state, f"group{number}"))
    for index, tensor in tensors.items():
        stored = _under(state, str(index))
        if stored:
            optimizer.state[tensor] = {
                key: value.to(_device_of(group, key, value, tensor.device), copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in stored.items()
            }
    optimizer.step()
    new_state: TorchState = {}
    for index, tensor in tensors.items():
        for key, value in optimizer.state[tensor].items():
            new_state[f"{index}/{key}"] = _storable(made, key, value)
    for key, value in group.items():
        if key != "params" and value is not fresh.get(key) and value != fresh.get(key):
            new_state[f"group{number}/{key}"] = _storable(made, key, value)
    return new_state


def _try_out(made: _Made) -> None:
    """Take some steps with an optimizer, and the same ones as a teacher takes them.

    Raises:
        ValueError: It can't be made, or can't be a teacher; the message says why.
    """

    def refused(need: str) -> ValueError:
        return ValueError(f"{made.path} can't be a teacher: {need}")

    direct, again = torch.ones(1, 1), torch.ones(1, 1)
    try:
        optimizer = made.make([direct])
    except Exception as error:
        raise ValueError(f"{made} can't be made: {error}") from error
    if len(optimizer.param_groups) != 1:
        raise refused(
            f"it must keep the tensors that it is given in one group, not in "
            f"{len(optimizer.param_groups)}"
        )
    try:
        float(optimizer.param_groups[0]["lr"])
    except (KeyError, TypeError, ValueError) as error:
        raise refused("its group must have a number 'lr', its learning rate") from error
    state: TorchState = {}
    for number in range(_TRIED):
        for tensor in (direct, again):
            tensor.grad = torch.full((1, 1), 1.0 - 0.3 * number)
        try:
            with drawing(number, direct.device):
                optimizer.step()
            with drawing(number, direct.device):
                state = _stepped(made, 0, {0: again}, state)
        except _NotStorable as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            raise refused(
                f"its step() must take dense gradients and no closure, but failed with "
                f"{type(error).__name__}: {error}"
            ) from error
    if not torch.allclose(direct, again, rtol=0, atol=0, equal_nan=True):
        raise refused(
            "made anew and given its state and its group's numbers it takes other steps, so it "
            "must keep no numbers elsewhere"
        )


def _under(state: TorchState, head: str) -> TorchState:
    """The entries of a state whose names begin with ``<head>/``, by the rest of their names."""
    return {
        key.removeprefix(f"{head}/"): value
        for key, value in state.items()
        if key.startswith(f"{head}/")
    }


def _device_of(
    group: Mapping[str, Any], key: str, value: Tensor, device: torch.device
) -> torch.device:
    """The device of a tensor of an optimizer's state, by Optimizer.load_state_dict's rule."""
    on_host = key == "step" and not group.get("capturable") and not group.get("fused")
    return value.device if on_host else device


class _NotStorable(TypeError):
    """An optimizer's state holds what can't be kept."""


def _storable(made: _Made, key: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Tensor | int | float):
        raise _NotStorable(
            f"{made.path} can't be a teacher: its state's {key!r} is a {type(value).__name__}, and "
            f"only tensors and numbers can be kept"
        )
    return value


@lru_cache(maxsize=64)
def _routes(
    optimizers: tuple[_Made, ...],
    shapes: tuple[torch.Size, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[int, ...], ...]:
    """Which tensors, by index, each optimizer steps: the first that takes a tensor steps it."""
    routes: list[list[int]] = [[] for _ in optimizers]
    for index, shape in enumerate(shapes):
        for made, route in zip(optimizers, routes, strict=True):
            try:
                made.make([torch.zeros(shape, dtype=dtype, device=device)])
            except ValueError as error:
                refusal = error
            else:
                route.append(index)
                break
        else:
            raise ValueError(
                f"{optimizers[-1].path} refuses a tensor of shape {tuple(shape)} ({refusal}); "
                f"others=(class, arguments) names an optimizer for such"
            )
    return tuple(map(tuple, routes))
