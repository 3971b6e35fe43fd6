"""What a CUDA graph copies the table of tensors from: memory that its optimizer holds."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from amalgam.operations import table
from amalgam.operations.kept import Kept, owner

SIZE = 10


@pytest.fixture(autouse=True)
def spares(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two pieces of memory that stand for pinned ones."""
    pieces = [torch.zeros(SIZE, dtype=torch.int64) for _ in range(2)]
    monkeypatch.setattr(table, "_spares", {SIZE: pieces})
    monkeypatch.setattr(table, "_captured", [])
    return pieces


def test_memory_of_a_captured_step_goes_back_with_its_owner(spares: list[Tensor]) -> None:
    first, second = Kept(), Kept()
    assert owner() is None
    with first:
        assert owner() is first
        held = table._held_for_graph(torch.arange(SIZE))
        with second:
            other = table._held_for_graph(torch.arange(SIZE) + 1)
    assert spares == []
    assert torch.equal(held, torch.arange(SIZE))
    del second
    gc.collect()
    assert [each.data_ptr() for each in spares] == [other.data_ptr()]
    assert torch.equal(other, torch.arange(SIZE) + 1)  # as a replay may still read it
    with first:
        again = table._held_for_graph(torch.zeros(SIZE, dtype=torch.int64))
    assert again.data_ptr() == other.data_ptr()
    del first
    gc.collect()
    assert {each.data_ptr() for each in spares} == {held.data_ptr(), other.data_ptr()}
    assert table._captured == []


def test_memory_of_a_step_without_an_owner_stays(spares: list[Tensor]) -> None:
    held = table._held_for_graph(torch.arange(SIZE))
    gc.collect()
    assert len(spares) == 1
    assert [each.data_ptr() for each in table._captured] == [held.data_ptr()]
