"""What TensorBoard shows of a run, and of an optimizer's steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from amalgam.extras import MissingExtra
from amalgam.optimizers import StepStats
from amalgam.tensorboard import MetricsWriter, write_stats

Curves = dict[str, list[tuple[int, float]]]


def curves(folder: Path) -> Curves:
    """The curves that TensorBoard reads from a folder: of each, steps and values."""
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"meta_step": step, "loss": {"student": loss, "adam": 0.5}, "task": "a", **more}


def log(run: Path, *rows: dict[str, Any]) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_rows_are_curves_over_meta_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    rows = [row(1, 3.0, slots=[{"task": "b", "loss": 7.0}]), row(2, None), row(3, 1.0)]
    with MetricsWriter(tmp_path) as writer:
        for count in (1, 3, 3):
            log(tmp_path, *rows[:count])
            writer.follow()
    assert curves(tmp_path / "tensorboard") == {
        "loss/student": [(1, 3.0), (3, 1.0)],
        "loss/adam": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "slots/0/loss": [(1, 7.0)],
    }


def test_a_run_that_goes_on_shows_each_meta_step_once(tmp_path: Path) -> None:
    """The killed part had logged meta-steps after its checkpoint, and a curve that is gone."""
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    parts = [
        [row(1, 3.0), row(2, 2.0), row(3, 9.0, gone=1.0), row(4, 9.0)],
        [row(1, 3.0), row(2, 2.0), row(3, 1.0)],
    ]
    for rows in parts:
        log(tmp_path, *rows)
        with MetricsWriter(tmp_path) as writer:
            writer.follow()
    found = curves(tmp_path / "tensorboard")
    assert found.pop("loss/student") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found.pop("loss/adam") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert not any(found.values())


def test_replicates_are_runs_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not installed")
    log(tmp_path, row(1, 3.0, replicate=0), row(1, 4.0, replicate=1))
    with MetricsWriter(tmp_path) as writer:
        writer.follow()
    for index, loss in enumerate((3.0, 4.0)):
        found = curves(tmp_path / "tensorboard" / f"replicate-{index}")
        assert found == {"loss/student": [(1, loss)], "loss/adam": [(1, 0.5)]}


def test_without_tensorboard_the_call_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"'tensorboard'.*pip install 'amalgam-optim\[tensorbo"):
        MetricsWriter(tmp_path)


class Recorder:
    """In the place of a ``SummaryWriter``."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None:
        self.written.append((tag, scalar_value, global_step))


def test_what_steps_do_is_a_curve_a_parameter_and_kind() -> None:
    recorder = Recorder()
    stats = {
        "weight": StepStats(0.5, 0.25, {"sgd": 1.0, "adam": -1.0}),
        "bias": StepStats(math.nan, 0.125, {"sgd": math.nan, "adam": 0.0}),
    }
    write_stats(recorder, stats, 7)
    assert recorder.written == [
        ("update_over_parameter/weight", 0.5, 7),
        ("adam_lr/weight", 0.25, 7),
        ("agreement_sgd/weight", 1.0, 7),
        ("agreement_adam/weight", -1.0, 7),
        ("adam_lr/bias", 0.125, 7),
        ("agreement_adam/bias", 0.0, 7),
    ]
