"""The compiled tanh, sigmoid and exp: within 4 units in the last place wherever a float may lie."""

from collections.abc import Callable

import pytest
import torch
from accuracy import kept
from places import compiled
from torch import Tensor

from amalgam.backends import core

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": lambda x: torch.where(x < 0, x.exp() / (1 + x.exp()), 1 / (1 + (-x).exp())),
    "tanh_slope": lambda x: 1 / x.cosh().square(),
    "exp": torch.exp,
}


def inside(name: str, x: Tensor) -> Tensor:
    """Arguments that a function is made for: exp's callers have none above 0."""
    return -x.abs() if name == "exp" else x


def found(name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x := inside(name, x))
    getattr(core.core().cpu, name)(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def units(error: Tensor, exact: Tensor) -> Tensor:
    """Errors in units in the last place of the float nearest to the exact value."""
    exponent = exact.float().abs().clamp_min(torch.finfo(torch.float32).tiny).double().frexp()[1]
    return error.abs() / torch.ldexp(torch.ones_like(error), exponent - 24)


def exactly(name: str, x: Tensor) -> Tensor:
    return EXACT[name](inside(name, x).double())


@compiled
@pytest.mark.parametrize("name", EXACT)
def test_activation_is_within_four_units(backend: str, name: str) -> None:
    """Every 1009th of all floats."""
    bits = torch.arange(-(2**31), 2**31, 1009)
    x = bits.to(torch.int32).view(torch.float32)
    got, exact = found(name, x), kept(exactly, name, x)
    assert torch.equal(got.isnan(), x.isnan())
    known = ~x.isnan()
    worst = units(got.double() - exact, exact)[known].max().item()
    assert worst <= 4, worst
    assert name == "tanh_slope" or got[known].abs().max() <= 1


@compiled
@pytest.mark.parametrize("name", EXACT)
def test_activation_at_its_ends(backend: str, name: str) -> None:
    x = torch.tensor([-torch.inf, -1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.inf, torch.nan])
    expected = exactly(name, x).float()
    torch.testing.assert_close(found(name, x), expected, rtol=0, atol=0, equal_nan=True)
