"""A short run of tests/soak_optimizer.py, and that it notices what it looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soak_optimizer
import torch
from soak_optimizer import FaultyRun, Run, soak

from amalgam import AmalgamatedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of skipped steps


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_faults_and_a_kill_change_nothing(tmp_path: Path) -> None:
    said = soak("standard, bfloat16", steps=100, kills=1, seed=0, folder=tmp_path)
    assert "100 steps, killed 1 times, the same bits" in said


@pytest.mark.parametrize("name", ["standard", "paper's"])
def test_faults_change_nothing(name: str, tmp_path: Path) -> None:
    plain, faulty = Run(name, 1, 150), FaultyRun(name, 1, 150, tmp_path)
    plain.go()
    faulty.go()
    assert faulty.digests == plain.digests
    ours, theirs = faulty.numbers(), plain.numbers()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(faulty.happened[fault] for fault in soak_optimizer.FAULTS)
    assert len(set(plain.digests)) == 150


def test_a_step_that_lets_a_fault_in_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amalgam.optimizers.base.finite", lambda largest, _: largest == largest)
    with pytest.raises(AssertionError, match="gradient changed"):
        FaultyRun("standard", 1, 150, tmp_path).go()


def test_a_load_that_loses_something_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AmalgamatedOptimizer.load_state_dict

    def lossy(self: AmalgamatedOptimizer, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for entry in self.state.values():
            entry["h"].zero_()

    monkeypatch.setattr(AmalgamatedOptimizer, "load_state_dict", lossy)
    plain, faulty = Run("standard", 1, 150), FaultyRun("standard", 1, 150, tmp_path)
    plain.go()
    faulty.go()
    assert faulty.digests != plain.digests
