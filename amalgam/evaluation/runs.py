"""One training run of an optimizee, and what is read from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amalgam.lr_decays import check_decay, factor_at
from amalgam.seeding import drawing, generator_for
from amalgam.tasks import SeededBatch, Task
from amalgam.tasks.task import judging

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]

# Samples read at once: on a CPU so few that images stay in cache from one layer to the next.
_CHUNK, _CHUNK_ON_GPU = 128, 2000


@dataclass(frozen=True)
class Readings:
    """What is read from a run, when, and on how much data.

    Attributes:
        curve: Steps after which the validation loss is read for the curve. The first and the last
            step of a run always are.
        full: Steps after which training and validation loss and accuracy are read.
        curve_samples: Validation samples of a reading for the curve, the same in all runs; all of
            them where ``None``.
        training_samples: Training samples of a full reading, likewise.
        validation_samples: Validation samples of a full reading, likewise.
    """

    curve: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    curve_samples: int | None = None
    training_samples: int | None = None
    validation_samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be read."""
        for name in ("curve_samples", "training_samples", "validation_samples"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be 1 or more, or None, not {count}")


class Reading(NamedTuple):
    """A full reading.

    Attributes:
        step: Steps taken before it.
        loss: Validation loss.
        accuracy: Validation accuracy in [0, 1]; NaN where targets are not classes.
        training_loss: Loss on training data.
        training_accuracy: Accuracy on training data.
    """

    step: int
    loss: float
    accuracy: float
    training_loss: float
    training_accuracy: float

    @property
    def finite(self) -> bool:
        """Whether both losses are."""
        return math.isfinite(self.loss) and math.isfinite(self.training_loss)


@dataclass(frozen=True)
class Curve:
    """One training run.

    Attributes:
        steps: Steps taken when the curve was read, ascending, from 0.
        losses: Validation losses at those steps.
        accuracies: Validation accuracies in [0, 1] at those steps; NaN where targets are not
            classes.
        full: The full readings, ascending; the first is that of step 0.
        seconds: Seconds a step took on average, without readings; of runs side by side, what it
            takes alone, or NaN.
        state_bytes: Bytes of the tensors in the optimizer's state after the run.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    full: tuple[Reading, ...] = ()
    seconds: float = math.nan
    state_bytes: int = 0

    @property
    def final(self) -> float:
        """The last validation loss, of a full reading where there is one."""
        return self.full[-1].loss if self.full else self.losses[-1]

    @property
    def accuracy(self) -> float:
        """The last validation accuracy, likewise."""
        return self.full[-1].accuracy if self.full else self.accuracies[-1]

    @property
    def best(self) -> float:
        """The smallest validation loss of the curve; NaN where there is none."""
        return min((x for x in self.losses if not math.isnan(x)), default=math.nan)

    @property
    def training(self) -> float:
        """The last training loss; NaN where none was read."""
        return self.full[-1].training_loss if self.full else math.nan

    @property
    def diverged(self) -> bool:
        """Whether a last loss is not finite, or the last training loss is above the first."""
        if not self.full:
            return not math.isfinite(self.losses[-1])
        first, last = self.full[0], self.full[-1]
        return not last.finite or last.training_loss > first.training_loss

    def until(self, step: int) -> Curve:
        """What of the run was read in its first steps."""
        kept = sum(at <= step for at in self.steps)
        return replace(
            self,
            steps=self.steps[:kept],
            losses=self.losses[:kept],
            accuracies=self.accuracies[:kept],
            full=tuple(reading for reading in self.full if reading.step <= step),
        )

    def untimed(self) -> Curve:
        """The same without the time of a step."""
        return replace(self, seconds=math.nan)

    def first_at_most(self, loss: float) -> int | None:
        """The fewest steps after which the curve was at a loss or below; ``None`` if it never was.

        Args:
            loss: A validation loss, read as the curve's are.
        """
        return next((at for at, x in zip(self.steps, self.losses, strict=True) if x <= loss), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable; numbers that JSON does not know become strings, such as ``"nan"``."""
        return {
            "steps": list(self.steps),
            "validation_losses": [to_json(x) for x in self.losses],
            "accuracies": [to_json(x) for x in self.accuracies],
            "full": [
                {name: to_json(value) for name, value in reading._asdict().items()}
                for reading in self.full
            ],
            "seconds_a_step": to_json(self.seconds),
            "state_bytes": self.state_bytes,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Curve:
        """What :meth:`as_dict` gave.

        Raises:
            KeyError: Something is missing.
            ValueError: Something is no number.
            TypeError: Something is of another type.
        """
        return cls(
            tuple(int(x) for x in content["steps"]),
            tuple(float(x) for x in content["validation_losses"]),
            tuple(float(x) for x in content["accuracies"]),
            tuple(
                Reading(int(one.pop("step")), **{name: float(x) for name, x in one.items()})
                for one in map(dict, content["full"])
            ),
            float(content["seconds_a_step"]),
            int(content["state_bytes"]),
        )


def to_json(number: float) -> float | str:
    """A number, or, where JSON does not know it, its name, such as ``"nan"``."""
    return number if math.isfinite(number) else str(number)


def train(
    task: Task,
    make: MakeOptimizer,
    *,
    steps: int,
    seed: int,
    readings: Readings,
    decay: str = "constant",
) -> Curve:
    """Train a fresh optimizee and read its losses.

    What is random depends on ``seed`` alone; PyTorch's global generators stay untouched. A run
    whose parameters are no longer finite ends there: what is left to read of it is NaN.

    Args:
        task: Optimizee and data, on the device to train on.
        make: Makes the optimizer for its parameters.
        steps: Steps to take.
        seed: Seed of the initial parameters, of the batches, of what the optimizee draws on them
            (dropout), and of what an optimizer draws.
        readings: What to read.
        decay: How rates go on over the steps: one of :data:`amalgam.lr_decays.LR_DECAYS`.

    Raises:
        ValueError: There is no such decay.
    """
    check_decay(decay)
    # Optimizees draw by their batches' seeds; this is for optimizers that draw.
    with drawing(generator_for(seed, "optimizers").initial_seed(), task.device):
        return _train(task, make, steps, seed, readings, decay)


def _train(
    task: Task, make: MakeOptimizer, steps: int, seed: int, readings: Readings, decay: str
) -> Curve:
    module = task.init_module(generator_for(seed, "optimizee"))
    optimizer = make(module.parameters())
    rates = Rates(optimizer, decay, steps)
    log = Log(task, module, steps, readings)
    batches = iter(task.batches(generator_for(seed, "batches"), steps))
    noise = generator_for(seed, "gradients")
    seconds = 0.0
    taken = 0
    for stop in log.stops:
        began = time.perf_counter()
        while taken < stop:
            rates.set(taken)
            optimizer.zero_grad()
            task.backward(module, next(batches), noise)
            optimizer.step()
            taken += 1
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        seconds += time.perf_counter() - began
        log.read(stop)
        if log.ended:
            break
    return log.curve(seconds / taken if taken else math.nan, optimizer)


class Rates:
    """An optimizer's rates over a run.

    Args:
        optimizer: The optimizer, its rates as a run begins.
        decay: One of :data:`amalgam.lr_decays.LR_DECAYS`.
        steps: Steps of the run.
    """

    def __init__(self, optimizer: Optimizer, decay: str, steps: int) -> None:
        self._groups = optimizer.param_groups
        self._first = [group["lr"] for group in self._groups]
        self._decay, self._steps = decay, steps

    def set(self, taken: int) -> None:
        """Set them for the step after so many."""
        if self._decay != "constant":
            for group, rate in zip(self._groups, self._first, strict=True):
                group["lr"] = rate * factor_at(self._decay, taken, self._steps)


class Log:
    """What is read from one run.

    Args:
        task: Its optimizee and data.
        module: The module that is trained.
        steps: Steps of the run.
        readings: What to read.
        like: Another run of the task whose curve is read on the same samples.

    Attributes:
        stops: The steps after which something is read, ascending.
        ended: Whether parameters were no longer finite when they were read last: what is left to
            read is NaN.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        steps: int,
        readings: Readings,
        like: Log | None = None,
    ) -> None:
        self._task, self._module, self._readings = task, module, readings
        self._curve_data: tuple[Tensor, ...] = (
            _some(task.validation, readings.curve_samples) if like is None else like._curve_data
        )
        self._read_at = sorted({0, steps, *(at for at in readings.curve if 0 < at < steps)})
        full_at = {0, *readings.full} if readings.full else set()
        self._full_at = sorted(at for at in full_at if at <= steps)
        self._losses: list[float] = []
        self._accuracies: list[float] = []
        self._full: list[Reading] = []
        self.stops = sorted({*self._read_at, *self._full_at})
        self.ended = False

    def read(self, stop: int) -> None:
        """Read what is read after so many steps."""
        if self.ended:
            return
        task, module, readings = self._task, self._module, self._readings
        if stop in self._read_at:
            loss, accuracy = _measure(task, module, self._curve_data)
            self._losses.append(loss)
            self._accuracies.append(accuracy)
        if stop in self._full_at:
            self._full.append(
                Reading(
                    stop,
                    *_measure(task, module, _some(task.validation, readings.validation_samples)),
                    *_measure(task, module, _some(task.train, readings.training_samples)),
                )
            )
        self.ended = not all(bool(p.isfinite().all()) for p in module.parameters())

    def curve(self, seconds: float, optimizer: Optimizer) -> Curve:
        """The run as a whole.

        Args:
            seconds: Of a step on average.
            optimizer: Its optimizer.
        """
        missing = [math.nan] * (len(self._read_at) - len(self._losses))
        unread = [Reading(at, *[math.nan] * 4) for at in self._full_at[len(self._full) :]]
        return Curve(
            tuple(self._read_at),
            (*self._losses, *missing),
            (*self._accuracies, *missing),
            (*self._full, *unread),
            seconds,
            _state_bytes(optimizer),
        )


def _some(data: Sequence[Tensor], samples: int | None) -> tuple[Tensor, ...]:
    """So many samples, the same ones whenever it is called."""
    available = len(data[0])
    if samples is None or samples >= available:
        return tuple(data)
    chosen = torch.randperm(available, generator=generator_for(0, "readings"))[:samples]
    return tuple(tensor[chosen.to(tensor.device)] for tensor in data)


def _dimension_of_classes(output: Any, target: Tensor) -> int | None:
    """Where an output has its classes: the second dimension, or, as language models, the last.

    Returns:
        The dimension; ``None`` where targets are no classes of it, or it may be either.
    """
    if not isinstance(output, Tensor) or target.is_floating_point():
        return None
    found = [
        at
        for at in sorted({1, output.dim() - 1})
        if output.dim() > at > 0
        and output.shape[at] > 1
        and (*output.shape[:at], *output.shape[at + 1 :]) == target.shape
    ]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def _measure(task: Task, module: nn.Module, data: Sequence[Tensor]) -> tuple[float, float]:
    """Loss and accuracy of a module on data; accuracy is NaN where targets are not classes.

    What draws without regard to the module's mode draws alike in every call.
    """
    loss, right, judged, samples = 0.0, 0.0, 0, len(data[0])
    chunk = _CHUNK if task.device.type == "cpu" else _CHUNK_ON_GPU
    with judging(module):
        for start in range(0, samples, chunk):
            *inputs, target = (tensor[start : start + chunk] for tensor in data)
            with task.drawing(SeededBatch((*inputs, target), [start])), task.convolving():
                output = module(*inputs)
                loss += task.loss(output, target).item() * (len(target) / samples)
            classes = _dimension_of_classes(output, target)
            if classes is not None:
                right += (output.argmax(classes) == target).sum().item()
                judged += target.numel()
    return loss, right / judged if judged else math.nan


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
