"""Task families: distributions over tasks, of which each episode of meta-training draws one."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from amalgam.tasks import family_data
from amalgam.tasks.networks import glorot
from amalgam.tasks.task import Batch, Task

_T = TypeVar("_T")

_WIDEST = 2**12


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution over tasks.

    A family of one's own needs no more than this, and may be given wherever meta-training takes a
    task. The tasks that it draws should share their data: each episode draws one anew, and a
    resumed run draws it again.
    """

    @property
    def name(self) -> str:
        """For tables and files."""
        ...

    def draw(self, generator: torch.Generator) -> Task:
        """Draw a task, which depends on the family and on the generator's numbers alone.

        The task is on the CPU. Its ``name`` begins with the family's.
        """
        ...

    def describe(self) -> str:
        """All that draws depend on beside the generator, for provenance.

        A run resumes only where its families' descriptions are what they were.
        """
        ...


def draw(task: Task | TaskFamily, generator: torch.Generator) -> Task:
    """The task itself, or one that is drawn from a family.

    Raises:
        ValueError: What the family draws is no task.
    """
    if isinstance(task, Task):
        return task
    drawn = task.draw(generator)
    if not isinstance(drawn, Task):
        raise ValueError(
            f"draw of the family {task.name!r} must return an amalgam.tasks.Task, not {drawn!r}"
        )
    return drawn


class Draws:
    """Draws numbers and choices from one generator, one after another.

    Args:
        generator: Where they come from.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, ends: tuple[float, float]) -> float:
        """A number between two ends, uniform."""
        low, high = ends
        return low + (high - low) * self._next()

    def log_uniform(self, ends: tuple[float, float]) -> float:
        """A number between two positive ends, log-uniform."""
        low, high = ends
        return low * (high / low) ** self._next()

    def integer(self, ends: tuple[int, int]) -> int:
        """An integer from one end to the other, both included, log-uniform."""
        low, high = ends
        return min(int(self.log_uniform((low, high + 1))), high)

    def choice(self, options: Sequence[_T]) -> _T:
        """One of several, each as likely as the others."""
        return options[int(self._next() * len(options))]

    def _next(self) -> float:
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()


def between(low: float, high: float, *, least: float = 1, most: float = math.inf) -> Any:
    """A field of :class:`NetworkFamily` that holds the two ends of a range.

    Args:
        low: The lower end, by default.
        high: The upper end, by default; integers where both ends must be.
        least: The smallest lower end that works.
        most: The largest upper end that works.
    """
    return field(default=(low, high), metadata={"limits": (least, most)})


def some_of(*options: Any) -> Any:
    """A field of :class:`NetworkFamily` that holds some of these options, by default all."""
    return field(default=options, metadata={"options": options})


class Design(NamedTuple):
    """What a draw has settled on, but for the network's width.

    Attributes:
        network: Builds the network of a given width. A wider one has more parameters.
        train: Training data, each tensor (samples, ...).
        validation: Data held out, likewise.
        loss: Loss of output and target, a mean over the batch.
        label: What tells it from other draws.
        narrowest: The smallest width. A layer norm of very few units passes no gradient on.
    """

    network: Callable[[int], nn.Module]
    train: Batch
    validation: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    label: str
    narrowest: int = 2


@dataclass(frozen=True, kw_only=True)
class NetworkFamily(ABC):
    """Base of the families that come with the package: networks whose size is drawn.

    A draw chooses a batch size and a number of parameters, both log-uniform, then the rest of the
    design, then the width with which the network comes closest to that number. It initialises
    layers by torch's default or by Glorot's rule, and multiplies all weights but biases and norms
    by one factor.

    Attributes:
        batch_size: The largest batch size.
        smallest_batch: The smallest one.
        parameters: The ends of the range that the number of parameters is drawn from. A network has
            the nearest number that its design allows.
        initial_scale: The ends of the range of exponents of ten that the factor is drawn from,
            uniform.
    """

    batch_size: int = 128
    smallest_batch: int = 8
    parameters: tuple[int, int] = between(300, 5_000)
    initial_scale: tuple[float, float] = between(-0.5, 0.5, least=-math.inf)

    def __post_init__(self) -> None:
        """Take lists for tuples, and refuse what can't be drawn."""
        if not 1 <= self.smallest_batch <= self.batch_size <= family_data.SAMPLES:
            raise ValueError(
                f"smallest_batch and batch_size must be between 1 and {family_data.SAMPLES}, the "
                f"smaller one first, not {self.smallest_batch} and {self.batch_size}"
            )
        for one in fields(self):
            given = getattr(self, one.name)
            if not one.metadata:
                continue
            if not isinstance(given, list | tuple):
                raise ValueError(f"{one.name} must be a list, not {given!r}")
            object.__setattr__(self, one.name, tuple(given))
            if "options" in one.metadata:
                _check_options(one.name, given, one.metadata["options"])
            else:
                _check_range(one.name, given, one.default, one.metadata["limits"])

    @property
    @abstractmethod
    def name(self) -> str:
        """See :class:`TaskFamily`."""

    @abstractmethod
    def design(self, draws: Draws) -> Design:
        """Draw all but width, batch size and initial weights."""

    @abstractmethod
    def shared(self) -> Sequence[str]:
        """Names of the sets of :mod:`amalgam.tasks.family_data` that draws may use."""

    def draw(self, generator: torch.Generator) -> Task:
        """See :class:`TaskFamily`."""
        draws = Draws(generator)
        batch_size = draws.integer((self.smallest_batch, self.batch_size))
        wanted = draws.log_uniform(self.parameters)
        by_glorot, scale = draws.choice((True, False)), 10 ** draws.uniform(self.initial_scale)
        network, train, validation, loss, label, narrowest = self.design(draws)
        width = nearest_width(network, wanted, narrowest)

        def build() -> nn.Module:
            module = glorot(network(width)) if by_glorot else network(width)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(scale)
            return module

        return Task(
            f"{self.name}[{label}, width {width}, batch {batch_size}]",
            build,
            train,
            validation,
            loss=loss,
            batch_size=batch_size,
            fast_convolutions=False,
        )

    def describe(self) -> str:
        """See :class:`TaskFamily`."""
        settings = ", ".join(f"{one.name}={getattr(self, one.name)}" for one in fields(self))
        digests = ", ".join(f"{name} {family_data.fingerprint(name)}" for name in self.shared())
        return f"{self.name}({settings}), blake2b of {digests}"


def nearest_width(
    network: Callable[[int], nn.Module], parameters: float, narrowest: int = 2
) -> int:
    """The width with which a network comes closest to so many parameters.

    Args:
        network: Builds it; a wider one has more parameters.
        parameters: How many it is to have.
        narrowest: The smallest width.
    """

    @functools.cache
    def count(width: int) -> int:
        return sum(parameter.numel() for parameter in network(width).parameters())

    # Networks initialise themselves by torch's global generator.
    with torch.random.fork_rng(devices=[]):
        low, high = narrowest, narrowest + 1
        while count(high) < parameters and high < _WIDEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) < parameters else (low, middle)
        return min(low, high, key=lambda width: abs(count(width) - parameters))


def random_network(draws: Draws, inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """A random network with one hidden layer: features (samples, inputs) -> (samples, outputs).

    Its outputs of normal features have mean 0 and standard deviation 1, or nearly so.
    """
    units, steepness = draws.integer((4, 32)), draws.log_uniform((0.5, 4.0))
    act = draws.choice((torch.tanh, torch.relu, torch.sin))
    first = steepness * torch.randn((inputs, units), generator=draws.generator) / inputs**0.5
    shift = torch.randn(units, generator=draws.generator)
    second = torch.randn((units, outputs), generator=draws.generator)

    def raw(x: Tensor) -> Tensor:
        return act(torch.addmm(shift, x, first)) @ second

    some = raw(family_data.features()[: family_data.VALIDATION, :inputs])
    mean, deviation = some.mean(0), some.std(0) + 1e-6
    return lambda x: (raw(x) - mean) / deviation


def _check_range(
    name: str,
    given: Sequence[Any],
    default: Any,
    limits: tuple[float, float],
) -> None:
    whole = all(isinstance(end, int) for end in default)
    if (
        len(given) != 2
        or not all(isinstance(end, int if whole else int | float) for end in given)
        or not all(map(math.isfinite, given))
        or not limits[0] <= given[0] <= given[1] <= limits[1]
    ):
        within = "" if limits[0] == -math.inf else f" from {limits[0]:g} to {limits[1]:g}"
        raise ValueError(
            f"{name} must be two {'integers' if whole else 'numbers'}{within}, the smaller one "
            f"first, not {list(given)}"
        )


def _check_options(name: str, given: Sequence[Any], options: Sequence[Any]) -> None:
    if not given or not all(one in options for one in given):
        raise ValueError(f"{name} must be one or more of {list(options)}, not {list(given)}")
