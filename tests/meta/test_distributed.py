"""Processes that meta-train as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed
from runs import metrics

from amalgam import distributed
from amalgam.policies import Student

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo, which this PyTorch lacks",
)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, HERE / "processes.py", folder],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", ["plain", "adversarial", "curriculum", "families"])
def test_two_processes_are_one_with_two_optimizees(name, together, tmp_path) -> None:
    getattr(processes, name)(tmp_path / name, 2)
    theirs = Student.load(together / name / "student.safetensors").weights()
    ours = Student.load(tmp_path / name / "student.safetensors").weights()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-5)
    for row, other in zip(metrics(tmp_path / name), metrics(together / name), strict=True):
        for key in ("meta_loss", "imitation_loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4)
        for key in ("validation", "meta_validation"):
            assert (key in row) == (key in other)
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["meta_batch", "fewer_slots_than_processes", "family_slots"])
def test_slots_are_spread_over_processes(name, together, tmp_path) -> None:
    """Every slot gives the bits that it gives in one process; their mean is rounded elsewhere."""
    getattr(processes, name)(tmp_path / name)
    theirs = Student.load(together / name / "student.safetensors").weights()
    ours = Student.load(tmp_path / name / "student.safetensors").weights()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-5)
    rows, others = metrics(tmp_path / name), metrics(together / name)
    assert rows[0]["slots"] == others[0]["slots"]
    for row, other in zip(rows, others, strict=True):
        for slot, its in zip(row["slots"], other["slots"], strict=True):
            for key in ("slot", "task", "episode", "step", "horizon", "skipped_steps"):
                assert slot[key] == its[key]
            assert slot["last_loss"] == pytest.approx(its["last_loss"], rel=1e-4)
            assert slot["grad_norm"] == pytest.approx(its["grad_norm"], rel=2e-3)
        for key in ("meta_loss", "imitation_loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4)
        assert ("validation" in row) == ("validation" in other)
        assert row.get("validation", 0) == pytest.approx(other.get("validation", 0), rel=1e-4)


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        ("curriculum", "cut"),
        ("meta_batch", "meta_batch_cut"),
        ("family_slots", "family_slots_cut"),
    ],
)
def test_two_processes_resume_to_the_same_bits(whole, cut, together) -> None:
    students = [together / name / "student.safetensors" for name in (whole, cut)]
    assert students[0].read_bytes() == students[1].read_bytes()
    assert metrics(together / whole) == metrics(together / cut)


def test_what_each_process_waits_for_is_told(together) -> None:
    first, second = json.loads((together / "late.json").read_text())
    assert first > 0.25 > second
    rows = (together / "curriculum" / "metrics.jsonl").read_text().splitlines()
    told = [row["waited"] for row in map(json.loads, rows) if "waited" in row]
    assert told
    for of_ranks in told:
        assert len(of_ranks) == 2
        assert min(of_ranks) > 0


def test_alone_nothing_is_asked_of_anybody() -> None:
    assert (distributed.rank(), distributed.world()) == (0, 1)
    (mean,) = distributed.average([torch.arange(3.0)])
    assert mean.tolist() == [0, 1, 2]
    assert distributed.gather("here") == ["here"]
    assert distributed.from_first("here") == "here"
    with pytest.raises(KeyError):
        distributed.by_first(lambda: {}["nothing"])
