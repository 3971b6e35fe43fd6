"""Stochastic rounding: its bits are MurmurHash3's, and what it rounds is right on average."""

import math

import pytest
import torch

from amalgam.operations.rounding import key_of, mix, random_bits, rounded_stochastically


def test_mix_is_murmurs_finalizer() -> None:
    given = torch.tensor([0, 1, 2, 0xFFFFFFFF])
    assert mix(given).tolist() == [0, 0x514E28B7, 0x30F4C306, 0x81F16F39]


def test_bits_depend_on_all_they_are_keyed_by() -> None:
    def bits(seed: int = 3, step: float = 5, row: int = 7, place: int = 2**33 + 11) -> int:
        key = key_of(seed, torch.tensor(float(step)))
        return int(random_bits(key, range(row, row + 1), range(place, place + 1)))

    assert bits() == bits()
    others = [bits(seed=4), bits(step=6), bits(row=8), bits(place=2**33 + 12), bits(place=11)]
    assert len({bits(), *others}) == 6


def test_bits_are_uniform() -> None:
    """Every bit is set half the time, along a row, along a column and from step to step."""
    count = 40_000
    row = random_bits(key_of(0, torch.tensor(1.0)), range(1), range(count)).view(-1)
    column = random_bits(key_of(0, torch.tensor(1.0)), range(count), range(1)).view(-1)
    steps = random_bits(key_of(0, torch.arange(float(count))), range(1), range(1)).view(-1)
    for bits in (row, column, steps):
        ones = torch.stack([(bits >> bit) & 1 for bit in range(32)]).double()
        assert (ones.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)
        assert bits.unique().numel() > 0.99 * count


@pytest.mark.parametrize("value", [1.001, -3.1415, 1e-20, -2.5e-39, 65504.3])
def test_rounding_is_right_on_average_and_off_by_one_at_most(value: float) -> None:
    values = torch.full((100_000,), value)
    bits = random_bits(key_of(1, torch.tensor(0.0)), range(1), range(len(values)))[0] & 0xFFFF
    rounded = rounded_stochastically(values, bits).double()
    exact = values[0].double()
    found = rounded.unique()
    assert len(found) == 2
    below, above = found.min(), found.max()
    assert below < exact < above
    spread = (above - below) / 2
    assert (rounded.mean() - exact).abs() < 5 * spread / math.sqrt(len(values))


def test_rounding_keeps_what_is_exact_and_what_is_no_number() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan])
    for bits in (0, 0xFFFF):
        rounded = rounded_stochastically(values, torch.full(values.shape, bits))
        assert torch.equal(rounded[:-1].float(), values[:-1])
        assert rounded[-1].isnan()
