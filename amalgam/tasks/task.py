"""A task: an optimizee and the data it is trained on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from amalgam.digest import digest_of
from amalgam.layout import Layout
from amalgam.tasks import convolution

Batch = tuple[Tensor, ...]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of output and target, a mean over the batch."""

Gradient = Callable[[nn.Module, Loss, Batch, torch.Generator], Tensor]
"""Sets the ``grad`` of a module's parameters for a loss and a batch, and returns the loss."""

# Fewer optimizees run faster one after another.
_FEWEST = 3


class Batches(Sequence[Batch]):
    """Batches that are gathered when they are asked for, and not kept.

    Args:
        data: Tensors of one length.
        chosen: For each batch, the samples that are in it, shape (batch size,).
    """

    def __init__(self, data: Sequence[Tensor], chosen: Sequence[Tensor]) -> None:
        self._data = data
        self._chosen = chosen

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> Batch | Batches:
        """One batch, or several that are still to be gathered."""
        if isinstance(index, slice):
            return Batches(self._data, self._chosen[index])
        chosen = self._chosen[index]
        return tuple(tensor[chosen] for tensor in self._data)


@dataclass
class Task:
    """An optimizee (any ``nn.Module``) and its data (any tensors of equal length).

    The module is called with a batch's first tensors and its loss with the output and the last:
    ``loss(module(*batch[:-1]), batch[-1])``, a mean over the batch. Buffers (such as batch norm's
    running statistics) are constants of an unroll.

    A task is on the device that its data are on, modules included; see :meth:`to`. All that is
    random is drawn on the CPU and moved there, so that it is the same on every device.

    Attributes:
        name: For tables and files.
        build: Makes a freshly initialised module, on the CPU.
        train: Training data, each tensor (samples, ...).
        validation: Data to judge by, likewise; never trained on.
        loss: Loss of output and target.
        batch_size: Samples a step.
        fast_convolutions: Whether convolutions on a CPU are those of
            :mod:`amalgam.tasks.convolution`, whose last bits are others than PyTorch's; where
            ``None``, those in float32 that are large enough to be faster, if a training batch has
            any.
        gradient: How the gradients of a training run are taken, such as
            :class:`amalgam.tasks.PrivateGradient`; where ``None``, by back-propagation.
            Meta-training has no other way: a task with its own is for evaluation.
        stand_in: Whether the data stand in for published ones; the name is to say so, too.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Sequence[Tensor]
    validation: Sequence[Tensor]
    loss: Loss = functional.cross_entropy
    batch_size: int = 128
    fast_convolutions: bool | None = None
    gradient: Gradient | None = None
    stand_in: bool = False
    layout: Layout = field(init=False)
    _module: nn.Module = field(init=False, repr=False)
    _convolves: bool = field(init=False, repr=False)
    _large: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the data, and look at one module's parameters."""
        for name in ("train", "validation"):
            lengths = {len(tensor) for tensor in getattr(self, name)}
            if len(lengths) != 1 or 0 in lengths:
                raise ValueError(
                    f"{name} must hold tensors of one length, at least 1, not of {sorted(lengths)}"
                )
        devices = {tensor.device for tensor in (*self.train, *self.validation)}
        if len(devices) != 1:
            raise ValueError(
                f"train and validation must be on one device, not on {sorted(map(str, devices))}"
            )
        if not 1 <= self.batch_size <= len(self.train[0]):
            raise ValueError(
                f"batch_size must be between 1 and the {len(self.train[0])} training samples, "
                f"not {self.batch_size}"
            )
        self._module = self.init_module(torch.Generator().manual_seed(0))
        self.layout = Layout({n: p.shape for n, p in self._module.named_parameters()})
        # Whatever convolves, in a module of torch's or not, has kernels.
        self._convolves = any(len(shape) > 2 for shape in self.layout.shapes.values())
        # Found out now, so that no bits depend on what came first.
        self._large = self._convolves and self._has_large_convolutions()

    @property
    def device(self) -> torch.device:
        """Where its data are, and its modules."""
        return self.train[0].device

    def to(self, device: str | torch.device) -> Task:
        """The task on a device: itself where it is there, else one with copies of its data.

        A loss that is a module moves along.
        """
        train, validation = (
            tuple(tensor.to(device) for tensor in data) for data in (self.train, self.validation)
        )
        if train[0].device == self.device:
            return self
        loss = self.loss
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss).to(device)
        return replace(self, train=train, validation=validation, loss=loss)

    def describe(self) -> str:
        """Name, sizes and a fingerprint of the data, for provenance."""
        digest = digest_of((*self.train, *self.validation))
        return (
            f"{self.name}: {len(self.train[0])} training and {len(self.validation[0])} validation "
            f"samples, blake2b {digest}"
        )

    def init_module(self, generator: torch.Generator) -> nn.Module:
        """A module initialised from ``generator`` alone; torch's global state stays untouched."""
        return self._built(generator).to(self.device)

    def init_params(self, generator: torch.Generator) -> Tensor:
        """Initial parameters as one vector, shape (layout.numel,)."""
        module = self._built(generator)
        return self.layout.flatten(dict(module.named_parameters())).detach().to(self.device)

    def _built(self, generator: torch.Generator) -> nn.Module:
        """An initialised module where it is built."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed every GPU, too.
            torch.default_generator.manual_seed(seed)
            return self.build()

    def batches(self, generator: torch.Generator, steps: int) -> Batches:
        """Batches for so many steps: shuffled epochs, whole batches only."""
        samples = len(self.train[0])
        per_epoch = samples // self.batch_size
        chosen: list[Tensor] = []
        while len(chosen) < steps:
            order = torch.randperm(samples, generator=generator).to(self.device)
            whole = order[: per_epoch * self.batch_size].split(self.batch_size)
            chosen += whole[: steps - len(chosen)]
        return Batches(self.train, chosen)

    @property
    def stacks(self) -> bool:
        """Whether many optimizees of it run faster as one.

        Products of matrices do, from about three on. Convolutions with as many kernels take as long
        where they are small and up to three times as long where they are not, and modules with
        buffers can't.
        """
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        modules = list(self._module.modules())
        return not any(isinstance(module, convolutions) for module in modules) and not any(
            True for _ in self._module.buffers()
        )

    def objectives(self, flat: Tensor, batch: Batch, stack: bool | None = None) -> Tensor:
        """Losses of many optimizees, several of them on each of many batches.

        Args:
            flat: Their parameters, shape (R, M, layout.numel).
            batch: R batches, each tensor (R, samples, ...); M optimizees see each.
            stack: Whether all run as one; where ``None``, three or more that :attr:`stacks`.

        Returns:
            The losses, shape (R, M).
        """
        rows, each = flat.shape[:2]
        if stack is None:
            stack = rows * each >= _FEWEST and self.stacks
        if stack:
            of_batch = torch.func.vmap(self.objective, in_dims=(0, None))
            return torch.func.vmap(of_batch)(flat, batch)
        losses = [
            self.objective(one, tuple(tensor[row] for tensor in batch))
            for row, of_row in enumerate(flat.unbind())
            for one in of_row.unbind()
        ]
        return torch.stack(losses).view(rows, each)

    @functools.cached_property
    def _tied(self) -> bool:
        """Whether a parameter has several names, which costs every call a search for them."""
        named = self._module.named_parameters(remove_duplicate=False)
        return len(list(named)) > len(self.layout.shapes)

    def backward(self, module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Take the gradients of a batch's loss, by the task's own rule if it has one.

        Args:
            module: A module of the task's; its parameters' ``grad`` is ``None`` before.
            batch: A batch.
            generator: Draws what the rule draws.

        Returns:
            The batch's loss.
        """
        if self.gradient is not None:
            return self.gradient(module, self.loss, batch, generator)
        loss = self.loss(module(*batch[:-1]), batch[-1])
        loss.backward()
        return loss.detach()

    def objective(self, flat: Tensor, batch: Batch) -> Tensor:
        """The batch's loss at parameters given as one vector, shape (layout.numel,).

        Raises:
            ValueError: The task has gradients of its own, which are not this loss's.
        """
        if self.gradient is not None:
            raise ValueError(
                f"{self.name} can be evaluated, not meta-trained on: its gradients are "
                f"{self.gradient}, and unrolls take plain ones"
            )
        params = self.layout.unflatten(flat)
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        pays = self._large if self.fast_convolutions is None else self._convolves
        with convolution.fast(self.fast_convolutions if pays else False):
            output = torch.func.functional_call(
                self._module, (params, buffers), batch[:-1], tie_weights=self._tied
            )
        return self.loss(output, batch[-1])

    def _has_large_convolutions(self) -> bool:
        batch = tuple(tensor[: self.batch_size] for tensor in self.train)
        if any(tensor.device.type != "cpu" for tensor in batch):
            return False
        params = {name: p.detach() for name, p in self._module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        with torch.random.fork_rng(devices=[]):
            return convolution.pays(
                lambda: torch.func.functional_call(self._module, (params, buffers), batch[:-1])
            )
