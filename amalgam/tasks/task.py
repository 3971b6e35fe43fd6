"""A task: an optimizee and the data it is trained on."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from amalgam.device import put
from amalgam.digest import digest_of
from amalgam.layout import Layout
from amalgam.seeding import drawing, global_states
from amalgam.tasks import convolution, weight_norm

Batch = tuple[Tensor, ...]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of output and target, a mean over the batch."""

Gradient = Callable[[nn.Module, Loss, Batch, torch.Generator], Tensor]
"""Sets the ``grad`` of a module's parameters for a loss and a batch, and returns the loss."""

# What is called around an optimizee's passes to choose PyTorch's kernels.
Kernels = Callable[[], AbstractContextManager[Any]]

# Fewer optimizees run faster one after another; those that convolve do so on a CPU up to more.
_FEWEST, _FEWEST_CONVOLVING = 3, 8

# Samples on which an optimizee is tried out: a batch of images may take seconds.
_TRIED = 8


class SeededBatch(tuple[Tensor, ...]):
    """A batch, and the seeds by which optimizees draw on it: all that dropout draws, for one.

    All that train on a row of it draw alike, the student and its teachers: their losses then differ
    by their parameters and not by their masks.

    Attributes:
        seeds: A seed for each row. A batch that is not stacked is a single row.
    """

    seeds: tuple[int, ...]

    def __new__(cls, tensors: Iterable[Tensor], seeds: Iterable[int]) -> SeededBatch:
        """A batch of these tensors, each (rows, samples, ...), or (samples, ...) for one row."""
        batch = super().__new__(cls, tensors)
        batch.seeds = tuple(seeds)
        return batch


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a stacked batch, with their seeds if it has any."""
    parts = tuple(tensor[rows] for tensor in batch)
    return SeededBatch(parts, batch.seeds[rows]) if isinstance(batch, SeededBatch) else parts


def row_of(batch: Batch, row: int) -> Batch:
    """One row of a stacked batch, not stacked, with its seed if it has any."""
    parts = tuple(tensor[row] for tensor in batch)
    return SeededBatch(parts, (batch.seeds[row],)) if isinstance(batch, SeededBatch) else parts


class Batches(Sequence[Batch]):
    """Batches that are gathered when they are asked for, and not kept.

    Args:
        data: Tensors of one length.
        chosen: For each batch, the numbers of the samples that are in it, shape (batches, batch
            size), on the data's device; or (batches, rows, batch size) for stacked batches.
        seeds: For each batch, the seed by which an optimizee draws on it; or one a row.

    Attributes:
        data: As above.
        chosen: As above.
    """

    def __init__(
        self, data: Sequence[Tensor], chosen: Tensor, seeds: Sequence[int | Sequence[int]]
    ) -> None:
        self.data = data
        self.chosen = chosen
        self._seeds = seeds

    def of(self, chosen: Tensor) -> Batches:
        """Batches of other samples, as many and as large, drawn on by the same seeds."""
        return Batches(self.data, chosen, self._seeds)

    @classmethod
    def stack(cls, by_row: Sequence[Batches]) -> Batches:
        """Batches of several rows, each tensor (rows, batch size, ...), of those of each row.

        Raises:
            ValueError: They are not of the same data, or not as many and as large.
        """
        first = by_row[0]
        for each in by_row:
            if each.data is not first.data or each.chosen.shape != first.chosen.shape:
                raise ValueError(
                    f"by_row must be batches of one task, as many and as large, "
                    f"{tuple(first.chosen.shape)}, not {tuple(each.chosen.shape)}"
                )
        chosen = torch.stack([each.chosen for each in by_row], 1)
        return cls(first.data, chosen, list(zip(*(each._seeds for each in by_row), strict=True)))

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> Batch | Batches:
        """One batch, or several that are still to be gathered."""
        if isinstance(index, slice):
            return Batches(self.data, self.chosen[index], self._seeds[index])
        chosen, seeds = self.chosen[index], self._seeds[index]
        return SeededBatch(
            (tensor[chosen] for tensor in self.data),
            (seeds,) if isinstance(seeds, int) else seeds,
        )


class SecondOrder(NamedTuple):
    """How an optimizee's gradients are differentiated.

    Attributes:
        kernels: PyTorch's kernels by which they can be.
        failure: Why they can't be by any; ``None`` where they can.
    """

    kernels: Kernels
    failure: str | None


@dataclass
class Task:
    """An optimizee (any ``nn.Module``) and its data (any tensors of equal length).

    The module is called with a batch's first tensors and its loss with the output and the last:
    ``loss(module(*batch[:-1]), batch[-1])``, a mean over the batch. Parameters that require no
    gradient, and buffers, are constants of the task: all its optimizees begin with the same ones,
    and in an unroll they stay (batch norm's running statistics, too).

    A task is on the device that its data are on, modules included; see :meth:`to`. Parameters and
    batches are drawn on the CPU and moved there, so that they are the same on every device. What a
    module or loss draws while it runs (dropout) is drawn where it runs, by the batch's seed.

    An optimizee is built and run on a few samples when the task is made. docs/optimizees.md says
    what an optimizee may be.

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
            any, and small ones of many optimizees that run as one. True also makes those of many
            optimizees on a GPU products of matrices, as :func:`convolution.products` says.
        draws: Whether module or loss draw random numbers while they run. Where ``None``, what they
            do on the first samples; say so where they draw in some steps only.
        gradient: How the gradients of a training run are taken, such as
            :class:`amalgam.tasks.PrivateGradient`; where ``None``, by back-propagation.
            Meta-training has no other way: a task with its own is for evaluation.
        stand_in: Whether the data stand in for published ones; the name is to say so, too.

    Raises:
        ValueError: Data, module or loss can't be trained as they are; the message says why.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Sequence[Tensor]
    validation: Sequence[Tensor]
    loss: Loss = functional.cross_entropy
    batch_size: int = 128
    fast_convolutions: bool | None = None
    draws: bool | None = None
    gradient: Gradient | None = None
    stand_in: bool = False
    layout: Layout = field(init=False)
    _module: nn.Module = field(init=False, repr=False)
    _dtypes: dict[str, torch.dtype] = field(init=False, repr=False)
    _shares_constants: bool = field(init=False, repr=False, default=False)
    _shapes: dict[str, torch.Size] = field(init=False, repr=False, default_factory=dict)
    _drew: bool = field(init=False, repr=False)
    _trial: Batch = field(init=False, repr=False)
    _without_cudnn: bool = field(init=False, repr=False)
    _convolves: bool = field(init=False, repr=False)
    _large: bool = field(init=False, repr=False)
    _are_products: bool | None = field(init=False, repr=False)

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
        self._module = self._first_module().to(self.device)
        trained = _trained(self._module)
        self.layout = Layout({name: p.shape for name, p in trained.items()})
        self._dtypes = {name: p.dtype for name, p in trained.items()}
        # Whatever convolves, in a module of torch's or not, has kernels.
        self._convolves = any(p.dim() > 2 for p in self._module.parameters())
        # cuDNN's dropout between recurrent layers goes on from a state of its own.
        self._without_cudnn = self.device.type == "cuda" and any(
            isinstance(module, nn.RNNBase) and module.dropout for module in self._module.modules()
        )
        # Found out now, so that no bits depend on what came first.
        self._large = (
            self._convolves and self.device.type == "cpu" and convolution.pays(self._first_forward)
        )
        self._are_products = self._find_products() if self._convolves else None
        self._drew = self.device.type != "meta" and self._draws_on_trial()
        if self.device.type != "meta":
            self._try_validation()

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
        module = self._built(generator).to(self.device)
        ours = _constants(self._module)
        with torch.no_grad():
            for name, constant in _constants(module).items():
                constant.copy_(ours[name])
        return module

    def init_params(self, generator: torch.Generator) -> Tensor:
        """Initial parameters as one vector, shape (layout.numel,)."""
        module = self._built(generator)
        return self.layout.flatten(dict(module.named_parameters())).detach().to(self.device)

    def _built(self, generator: torch.Generator) -> nn.Module:
        """An initialised module where it is built.

        Raises:
            ValueError: ``build`` does not return a module, or one of other shapes than before.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        with drawing(seed, torch.device("cpu")):
            module = self.build()
        if not isinstance(module, nn.Module):
            raise ValueError(f"build must return an nn.Module, not {module!r}")
        if self._shapes and self._shapes != (found := _shapes(module)):
            name = next(n for n in self._shapes | found if self._shapes.get(n) != found.get(n))
            before, now = (
                f"has the shape {tuple(shapes[name])}" if name in shapes else "is absent"
                for shapes in (self._shapes, found)
            )
            raise ValueError(
                f"build must return a module of the same shapes each time, but {name!r} of task "
                f"{self.name!r} {before} in one and {now} in another"
            )
        return copy.deepcopy(module) if self._shares_constants else module

    def _first_module(self) -> nn.Module:
        """The module whose constants are the task's; refuses what can't be an optimizee.

        Raises:
            ValueError: ``build`` does not return a module, there is nothing to train, parameters
                do not fit, or ``build`` returns the same ones again, or others.
        """
        generator = torch.Generator().manual_seed(0)
        module = self._built(generator)
        if any(map(is_lazy, module.parameters())):
            raise ValueError(
                f"build must return a module whose parameters have shapes, which the lazy ones of "
                f"task {self.name!r} get in their first call; call it on a sample in build"
            )
        trained = _trained(module)
        if not trained:
            raise ValueError(
                f"build must return a module with parameters that require gradients; that of task "
                f"{self.name!r} has none to train"
            )
        for name, param in trained.items():
            if not param.is_floating_point():
                raise ValueError(
                    f"build must return a module of floating-point parameters, but {name!r} of "
                    f"task {self.name!r} is {param.dtype}"
                )
        self._shapes = _shapes(module)
        other = self._built(generator)
        again = _storages(_trained(other).values())
        for name, param in trained.items():
            if not again.isdisjoint(_storages([param])):
                raise ValueError(
                    f"build must return a new module each time, but two of task {self.name!r} "
                    f"share {name!r}, so that each optimizer would go on where the last one "
                    f"ended; copy.deepcopy(model) is a new one"
                )
        constants = [_storages(_constants(made).values()) for made in (module, other)]
        self._shares_constants = not constants[0].isdisjoint(constants[1])
        return copy.deepcopy(module) if self._shares_constants else module

    def split(self, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor]:
        """Draw which training samples are held out.

        Args:
            generator: Decides.
            share: The share of them, in (0, 1); in any case at least one sample, and not all.

        Returns:
            The numbers of the samples to train on, and of those that are held out, on the CPU.

        Raises:
            ValueError: There is only one training sample.
        """
        samples = len(self.train[0])
        if samples < 2:
            raise ValueError(
                f"held_out must be 0 for task {self.name!r}, which has one training sample, not "
                f"{share:g}"
            )
        held_out = min(max(round(share * samples), 1), samples - 1)
        order = torch.randperm(samples, generator=generator)
        return order[held_out:], order[:held_out]

    def batches(
        self, generator: torch.Generator, steps: int, among: Tensor | None = None
    ) -> Batches:
        """Batches for so many steps: shuffled epochs, whole batches only.

        Each has a seed by which an optimizee draws on it, which ``generator`` decides, too.

        Args:
            generator: Decides.
            steps: How many.
            among: The numbers of the training samples to draw from, shape (samples,), on the CPU;
                all where ``None``. Batches hold all of them where they are fewer than a batch.
        """
        samples = len(self.train[0]) if among is None else len(among)
        size = min(self.batch_size, samples)
        per_epoch = samples // size
        epochs = []
        for _ in range(0, steps, per_epoch):
            order = torch.randperm(samples, generator=generator)
            order = order if among is None else among[order]
            epochs.append(order[: per_epoch * size].view(per_epoch, size))
        chosen = torch.cat(epochs)[:steps] if epochs else torch.empty((0, size), dtype=torch.long)
        first = int(torch.randint(2**62, (), generator=generator))
        return Batches(self.train, put(chosen, self.device), range(first, first + steps))

    def drawing(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, an optimizee draws by the batch's seed; outside, torch's state is untouched.

        Args:
            batch: A batch that is not stacked, as :meth:`batches` makes them; of a stacked one,
                the first row's seed counts.

        Raises:
            ValueError: The optimizee draws, and the batch has no seed.
        """
        if not self.draws_random_numbers:
            return nullcontext()
        if not isinstance(batch, SeededBatch):
            raise ValueError(
                f"batch must have a seed, as those of Task.batches do, because optimizees of task "
                f"{self.name!r} draw random numbers; amalgam.tasks.SeededBatch(batch, [seed]) has "
                f"one"
            )
        return self._drawing(batch.seeds[0])

    @property
    def draws_random_numbers(self) -> bool:
        """Whether module or loss draw random numbers while they run."""
        return self._drew if self.draws is None else self.draws

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """Inside, all that an optimizee may draw by comes from a seed."""
        kernels: AbstractContextManager[Any] = nullcontext()
        if self._without_cudnn:
            kernels = torch.backends.cudnn.flags(enabled=False)
        with drawing(seed, self.device), kernels:
            yield

    def stacks(self, optimizees: int) -> bool:
        """Whether so many optimizees of it run faster as one.

        Products of matrices do, from about three on. On a GPU so do convolutions, which there are
        so many launches each; on a CPU, if all are small and may be products of matrices
        (:func:`amalgam.tasks.convolution.products`), from about eight on. Some modules and losses
        can't, see :attr:`unstackable`.
        """
        fewest = _FEWEST
        if self.device.type != "cuda" and self._are_products is not None:
            fewest = _FEWEST_CONVOLVING
            if not self._are_products or torch.is_autocast_enabled("cpu"):
                return False
        return optimizees >= fewest and self.unstackable is None

    def _find_products(self) -> bool | None:
        """Whether its convolutions may be products of matrices; ``None`` where it has none."""
        if self.device.type != "cpu" or self._large:
            return False
        try:
            products = convolution.are_products(self._first_forward)
        except Exception:  # of a module that counts on the order of a convolution's result
            return False
        return products and self.fast_convolutions is not False

    @functools.cached_property
    def unstackable(self) -> str | None:
        """Why many optimizees of it can't run as one, found out by two on two batches.

        ``None`` where they can. What draws can't: as one, optimizees would draw other numbers than
        each alone.
        """
        if self.draws_random_numbers:
            return "its optimizees draw random numbers"
        if self.device.type == "meta":
            return None
        batch = tuple(torch.stack((tensor, tensor)) for tensor in self._trial)
        flat = self._flat_of(self._module).expand(2, 2, -1)
        kernels, failure = self.second_order
        try:
            with kernels():
                _differentiate(
                    lambda leaf: self.objectives(leaf, batch, True).sum(), flat, failure is None
                )
        except Exception as error:
            return _said(error)
        return None

    @functools.cached_property
    def second_order(self) -> SecondOrder:
        """How its gradients are differentiated, found out on a few samples.

        Fused attention and cuDNN's recurrent layers have no second derivatives; PyTorch has other
        kernels in their place that do. That of fused weight norm is wrong
        (:mod:`amalgam.tasks.weight_norm`).
        """
        if self.device.type == "meta":
            return SecondOrder(nullcontext, None)
        batch, flat = self._trial, self._flat_of(self._module)
        failure: str | None = None
        for kernels in (nullcontext, _math_attention, _plain_kernels):
            try:
                with kernels(), weight_norm.Plain() as mode:
                    _differentiate(lambda leaf: self.objective(leaf, batch), flat, True)
            except Exception as error:
                failure = failure or _said(error)
            else:
                normed = mode.taken > 0
                plain = functools.partial(weight_norm.plain, kernels) if normed else kernels
                return SecondOrder(plain, None)
        return SecondOrder(nullcontext, failure)

    def objectives(self, flat: Tensor, batch: Batch, stack: bool | None = None) -> Tensor:
        """Losses of many optimizees, several of them on each of many batches.

        Args:
            flat: Their parameters, shape (R, M, layout.numel).
            batch: R batches, each tensor (R, samples, ...); M optimizees see each.
            stack: Whether all run as one; where ``None``, what :meth:`stacks` says.

        Returns:
            The losses, shape (R, M), in ``flat``'s dtype.
        """
        rows, each = flat.shape[:2]
        if stack is None:
            stack = self.stacks(rows * each)
        if stack:
            # PyTorch's mse_loss and others fail where, in the inner of two vmaps, only the output
            # is batched.
            *inputs, target = batch
            target = target[:, None].expand(rows, each, *target.shape[1:])
            axes = (*[None] * len(inputs), 0)
            of_batch = torch.func.vmap(self.objective, in_dims=(0, axes))
            with self._convolving_as_one():
                return torch.func.vmap(of_batch)(flat, (*inputs, target))
        losses = [
            self.objective(one, row_of(batch, row))
            for row, of_row in enumerate(flat.unbind())
            for one in of_row.unbind()
        ]
        return torch.stack(losses).view(rows, each)

    @functools.cached_property
    def _tied(self) -> bool:
        """Whether a parameter has several names, which costs every call a search for them."""
        named = [p for _, p in self._module.named_parameters(remove_duplicate=False)]
        return len(named) > len(set(named))

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """The parameters' dtype, where it is one."""
        dtypes = set(self._dtypes.values())
        return dtypes.pop() if len(dtypes) == 1 else None

    def backward(self, module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Take the gradients of a batch's loss, by the task's own rule if it has one.

        Args:
            module: A module of the task's; its parameters' ``grad`` is ``None`` before.
            batch: A batch.
            generator: Draws what the rule draws.

        Returns:
            The batch's loss.
        """
        with self.drawing(batch), self.convolving():
            if self.gradient is not None:
                return self.gradient(module, self.loss, tuple(batch), generator)
            loss = self.loss(module(*batch[:-1]), batch[-1])
            loss.backward()
            return loss.detach()

    def objective(self, flat: Tensor, batch: Batch) -> Tensor:
        """The batch's loss at parameters given as one vector, shape (layout.numel,).

        Module and loss compute in their own dtypes, to which parameters are rounded; the loss comes
        in ``flat``'s.

        Raises:
            ValueError: The task has gradients of its own, which are not this loss's; or the
                optimizee draws, and the batch has no seed.
        """
        if self.gradient is not None:
            raise ValueError(
                f"{self.name} can be evaluated, not meta-trained on: its gradients are "
                f"{self.gradient}, and unrolls take plain ones"
            )
        return self._loss_at(flat, batch)

    def _loss_at(self, flat: Tensor, batch: Batch) -> Tensor:
        params = self.layout.unflatten(flat)
        if flat.dtype != self.dtype:
            params = {name: param.to(self._dtypes[name]) for name, param in params.items()}
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        with self.drawing(batch), self.convolving():
            output = torch.func.functional_call(
                self._module, (params, buffers), tuple(batch[:-1]), tie_weights=self._tied
            )
            return self.loss(output, batch[-1]).to(flat.dtype)

    def convolving(self) -> AbstractContextManager[Any]:
        """Inside, convolutions are those that ``fast_convolutions`` says."""
        pays = self._large if self.fast_convolutions is None else self._convolves
        return convolution.fast(self.fast_convolutions if pays else False)

    def _convolving_as_one(self) -> AbstractContextManager[Any]:
        """Inside, where many run as one, convolutions are products if they may be."""
        if self._convolves and self.fast_convolutions is not False:
            return convolution.products(on_gpu=self.fast_convolutions is True)
        return nullcontext()

    def _first(self, samples: int) -> Batch:
        """The first training samples, as a batch, with a seed."""
        return SeededBatch((tensor[:samples] for tensor in self.train), (0,))

    def _flat_of(self, module: nn.Module) -> Tensor:
        """A module's parameters as one vector, shape (layout.numel,)."""
        return self.layout.flatten(dict(module.named_parameters())).detach()

    def _first_forward(self) -> Tensor:
        """Run an optimizee on a batch, there alone."""
        params = {name: p.detach() for name, p in self._module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        inputs = tuple(self._first(self.batch_size)[:-1])
        with drawing(0, self.device):
            output: Tensor = torch.func.functional_call(self._module, (params, buffers), inputs)
        return output

    def _draws_on_trial(self) -> bool:
        """Whether an optimizee draws random numbers on some samples, there and back.

        They become ``_trial``: a few, or, where a few can't be run, a whole batch.

        Raises:
            ValueError: It can't be run, or can't be run again alike.
        """
        self._trial = self._first(min(_TRIED, self.batch_size))
        try:
            return self._drew_on_trial()
        except ValueError:
            if self.batch_size <= _TRIED:
                raise
        self._trial = self._first(self.batch_size)
        return self._drew_on_trial()

    def _drew_on_trial(self) -> bool:
        self._drew = False
        flat = self._flat_of(self._module)
        losses: list[Tensor] = []

        def objective(leaf: Tensor) -> Tensor:
            loss = self._loss_at(leaf, self._trial)
            if loss.dim():
                raise ValueError(
                    f"loss must return a scalar, such as a mean over the batch, not the shape "
                    f"{tuple(loss.shape)}"
                )
            losses.append(loss.detach())
            return loss

        for _ in range(2):
            with self._drawing(0):
                before, elsewhere = global_states(self.device), _states_elsewhere()
                try:
                    _differentiate(objective, flat, False)
                except Exception as error:
                    raise ValueError(
                        f"task {self.name!r} can't be trained on its first samples: {_said(error)}"
                    ) from error
                if _states_elsewhere() != elsewhere:
                    raise ValueError(
                        f"task {self.name!r} draws by NumPy's or Python's global generator, which "
                        f"can't be drawn again alike; draw by torch's"
                    )
                drew = not all(map(torch.equal, global_states(self.device), before))
        # Sums on a GPU may differ in their last bits.
        first, second = losses
        if not torch.allclose(first, second, rtol=1e-3, equal_nan=True):
            raise ValueError(
                f"task {self.name!r} has another loss when it is computed again, "
                f"{second.item():g} and not {first.item():g}: module and loss must keep "
                f"nothing from call to call but the module's buffers"
            )
        return drew

    @torch.no_grad()
    def _try_validation(self) -> None:
        """Run an optimizee on some validation samples, as readings of a run do.

        Raises:
            ValueError: It can't be run.
        """
        *inputs, target = (tensor[:_TRIED] for tensor in self.validation)
        batch = SeededBatch((*inputs, target), [0])
        try:
            with judging(self._module), self.drawing(batch), self.convolving():
                self.loss(self._module(*inputs), target).item()
        except Exception as error:
            raise ValueError(
                f"task {self.name!r} can't be validated on its first validation samples: "
                f"{_said(error)}"
            ) from error


@contextmanager
def judging(module: nn.Module) -> Iterator[None]:
    """Inside, a module and its parts are in evaluation mode; afterwards each as it was before."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that require no gradients, and the buffers, by name."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of its parameters and buffers, by name."""
    return {name: tensor.shape for name, tensor in (_trained(module) | _constants(module)).items()}


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    """Where the tensors' numbers lie in memory."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()} - {0}


def _differentiate(
    objective: Callable[[Tensor], Tensor], params: Tensor, second_order: bool
) -> None:
    """Compute an objective's gradient and, if wanted, the Hessian's product with it."""
    leaf = params.clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(objective(leaf), leaf, create_graph=second_order)
    if second_order and grad.requires_grad:
        torch.autograd.grad(grad, leaf, grad.detach(), allow_unused=True)


def _said(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _states_elsewhere() -> bytes:
    """The states of NumPy's and Python's global generators."""
    return pickle.dumps((np.random.get_state(), random.getstate()))  # noqa: NPY002


def _math_attention() -> AbstractContextManager[Any]:
    """Attention by products of matrices, which has second derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def _plain_kernels() -> AbstractContextManager[Any]:
    """As :func:`_math_attention`, and recurrent layers without cuDNN."""
    contexts = ExitStack()
    contexts.enter_context(_math_attention())
    contexts.enter_context(torch.backends.cudnn.flags(enabled=False))
    return contexts
