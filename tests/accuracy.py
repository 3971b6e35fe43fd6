"""The rule of all compiled code: its error is at most twice what plain PyTorch makes.

Both are compared to a truth of more digits. The largest error is that of one number, which PyTorch
may round exactly by luck. So a unit that rounding is bound to cost is added to either error, and
where a test draws several times, the ratio is the geometric mean over the draws. For one draw the
rule says ``ours <= 2 * plain + unit``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam.digest import digest_of

T = TypeVar("T")
Truth = Tensor | NDArray[np.longdouble]
Together = Callable[[Tensor], Tensor]

SAMPLES = 8  # whose root mean square is off by a quarter


class Errors(NamedTuple):
    """Of one result, in groups of elements that are judged together.

    Attributes:
        ours: The largest error of each group.
        plain: Plain PyTorch's.
        unit: What is added to either.
    """

    ours: Tensor
    plain: Tensor
    unit: Tensor


def of_a_tensor(values: Tensor) -> Tensor:
    """The largest of all elements: they are sums over the same units or coordinates."""
    return values.amax() if values.numel() else values.new_zeros(())


def of_a_row(values: Tensor) -> Tensor:
    """The largest of each row: one teacher's numbers, whose largest is their unit."""
    return values.amax(-1) if values.numel() else values.new_zeros(values.shape[:-1])


def of_a_coordinate(values: Tensor) -> Tensor:
    """The largest of each coordinate's cells, which share their gates; moments are alone."""
    return values.amax((0, 1)) if values.dim() == 3 and values.numel() else values


def errors_of(
    ours: Tensor,
    plain: Tensor,
    truth: Truth,
    unit: Tensor | float | None = None,
    together: Together = of_a_tensor,
) -> Errors:
    """The errors of one result of one draw.

    Args:
        ours: The result.
        plain: Plain PyTorch's, in the same dtype.
        truth: Float64, or the platform's long double.
        unit: What rounding is bound to cost an element, or all of them; ``None`` for a unit in the
            last place of the truth's largest.
        together: Takes the elements' errors to the groups' largest.

    Raises:
        AssertionError: Shapes or dtypes differ.
    """
    assert ours.shape == plain.shape == truth.shape
    assert ours.dtype == plain.dtype
    ours_off, plain_off = (_distance(each, truth) for each in (ours, plain))
    if unit is None:
        unit = torch.finfo(ours.dtype).eps * of_a_tensor(_magnitude(truth))
    units = torch.as_tensor(unit, dtype=torch.float64).cpu().expand(ours_off.shape)
    return Errors(*map(together, (ours_off, plain_off, units)))


def largest(draws: Sequence[Errors]) -> Errors:
    """Of each group the largest errors and units of all draws, as of one draw."""
    return Errors(*(torch.stack(column).amax(0) for column in zip(*draws, strict=True)))


def seeds_of_draws(device: str, few: int) -> range:
    """Seeds of as many draws as a mean of ratios is to be over.

    Args:
        device: On "cuda", where they take no time, they are so many that chance decides little.
        few: How many they are elsewhere.
    """
    return range(24 if device == "cuda" else few)


def assert_at_most_twice(name: str, draws: Sequence[Errors]) -> None:
    """Assert the rule of a result.

    Args:
        name: The result's, for the message.
        draws: Its errors, of the same groups in each draw.
    """
    logs = torch.stack([_ratio(each).log() for each in draws])
    ratios = logs.mean(0).exp().flatten()
    bad = ~(ratios <= 2)  # so is NaN
    if bad.any():
        worst = int(torch.where(ratios.isnan(), torch.inf, ratios).argmax())
        ours, plain, unit = (
            torch.stack(column).reshape(len(draws), -1)[:, worst].mean().item()
            for column in zip(*draws, strict=True)
        )
        raise AssertionError(
            f"{name}, group {worst} of {len(ratios)}: {ratios[worst].item():.2f} times plain "
            f"PyTorch's error; of {len(draws)} draws the mean error is {ours:.3g}, plain "
            f"PyTorch's {plain:.3g}, the unit {unit:.3g}"
        )


def assert_as_accurate(operation: Any, draws: Sequence[tuple[Any, ...]], backend: str) -> None:
    """Assert the rule of every result of an operation, each as a whole.

    In float64, where nothing more precise stands by, results agree to 1e-9, or to 1e-12 if small.

    Args:
        operation: Takes a draw's arguments and a backend's name.
        draws: Its arguments, drawn several times.
        backend: Whose errors.
    """
    errors: list[list[Errors]] = []
    yardsticks = kept(_yardsticks, operation, draws)
    for arguments, (truth, plain) in zip(draws, yardsticks, strict=True):
        ours = flat(operation(*arguments, backend))
        for one, other in zip(ours, truth, strict=True):
            if one.dtype == torch.float64:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        errors.append([errors_of(*each) for each in zip(ours, plain, truth, strict=True)])
    for index, column in enumerate(zip(*errors, strict=True)):
        if ours[index].dtype != torch.float64:
            assert_at_most_twice(f"result {index}", column)


def _yardsticks(operation: Any, draws: Sequence[tuple[Any, ...]]) -> list[list[list[Tensor]]]:
    """Of each draw the truth and plain PyTorch's results."""
    return [[flat(operation(*each, "reference")) for each in (doubled(d), d)] for d in draws]


_kept: dict[Any, Any] = {}


def kept(compute: Callable[..., T], *arguments: Any) -> T:
    """What a function returns of arguments; results of the last two calls are kept.

    The truth and plain PyTorch take most of a test's time, and instruction sets are tested with the
    same draws one after another.
    """
    key = compute, _fingerprint(arguments)
    if key not in _kept:
        if len(_kept) == 2:
            del _kept[next(iter(_kept))]
        _kept[key] = compute(*arguments)
    result: T = _kept[key]
    return result


def _fingerprint(values: Any) -> Any:
    """Equal for nests of the same numbers on the same device."""
    if isinstance(values, Tensor):
        return values.dtype, values.shape, values.device, digest_of([values])
    return tuple(map(_fingerprint, values)) if isinstance(values, (list, tuple)) else values


class RandomRounding(TorchDispatchMode):
    """Inside, float64 arithmetic rounds at random to a dtype's digits: Monte Carlo arithmetic.

    What an operation takes and what it makes is moved by up to a unit in the last place. Where
    terms cancel, in a formula or in a sum, the result moves by units of the terms. Numbers are
    taken for normal ones. In float64 plain PyTorch is the truth itself, so there a sum also moves
    as much as one of another order may: each of its partial sums rounds. Source: D. S. Parker,
    "Monte Carlo Arithmetic" (UCLA CSD-970002, 1997).
    """

    EXACT = frozenset(
        ("neg", "abs", "sign", "where", "clamp", "clamp_min", "clamp_max", "maximum", "minimum")
        + ("relu", "ge", "gt", "le", "lt", "eq", "ne", "isnan", "isfinite", "round", "copy_")
        + ("fill_", "zero_", "masked_fill", "logical_and", "logical_not", "clone")
    )
    SUMS = frozenset(("mm", "bmm", "addmm", "mv", "dot", "sum", "mean", "cumsum", "_softmax"))

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        rounds = name in self.SUMS or (torch.Tag.pointwise in func.tags and name not in self.EXACT)
        if not rounds:
            return func(*args, **(kwargs or {}))
        written = [bool(a.alias_info and a.alias_info.is_write) for a in func._schema.arguments]
        moved = (
            value if write else self._moved(value)
            for value, write in zip(args, written, strict=False)
        )
        out = func(*moved, **(kwargs or {}))
        partial_sums = 1.0
        if name in self.SUMS and self.unit == torch.finfo(torch.float64).eps:
            partial_sums = max(1.0, self._terms(name, args, out)) ** 0.5
        if any(written):
            return out.copy_(self._moved(out, partial_sums))
        return self._moved(out, partial_sums)

    @staticmethod
    def _terms(name: str, args: Any, out: Tensor) -> float:
        """How many terms an element of a sum has."""
        if name in ("sum", "mean"):
            return args[0].numel() / max(1, out.numel())
        return float(args[1 if name == "addmm" else 0].shape[-1])

    def _moved(self, value: Any, units: float = 1.0) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        draws = torch.empty_like(value).uniform_(-1, 1, generator=self.generator)
        return torch.addcmul(value, value, draws, value=units * self.unit)


def what_rounding_costs(
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """How far the exact results move where every operation's rounding is drawn at random.

    Args:
        reference: Plain PyTorch's kernel.
        arguments: Its arguments.
        truth: Its exact results of them.
        dtype: To whose digits arithmetic rounds.

    Returns:
        The root mean square of the changes in SAMPLES draws, for each result's elements.
    """
    generator = torch.Generator().manual_seed(0)
    exact = doubled(arguments)
    squares = [torch.zeros_like(each) for each in truth]
    for _ in range(SAMPLES):
        with RandomRounding(dtype, generator):
            moved = flat(reference(*exact))
        for total, new, old in zip(squares, moved, truth, strict=True):
            total += (new - old).square()
    return [(total / SAMPLES).sqrt() for total in squares]


def flat(results: Any) -> list[Tensor]:
    """Tensors of a nest of tuples and lists."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for each in results for tensor in flat(each)]


def doubled(values: Any) -> Any:
    """A nest of values with its floating-point tensors in float64."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    return [doubled(value) for value in values] if isinstance(values, (list, tuple)) else values


def _distance(found: Tensor, truth: Truth) -> Tensor:
    if isinstance(truth, Tensor):
        return (found.double() - truth).abs().cpu()
    return torch.from_numpy(np.abs(found.cpu().numpy() - truth).astype(np.float64))


def _magnitude(truth: Truth) -> Tensor:
    if isinstance(truth, Tensor):
        return truth.abs().cpu()
    return torch.from_numpy(np.abs(truth).astype(np.float64))


def _ratio(errors: Errors) -> Tensor:
    ours, plain = errors.ours + errors.unit, errors.plain + errors.unit
    return torch.where((ours == 0) & (plain == 0), torch.ones_like(ours), ours / plain)
