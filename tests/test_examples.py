"""The examples run, and what they train moves."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from amalgam import AmalgamatedOptimizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("image_classifier", 6, ["--data", "digits"]), ("character_transformer", 2, [])],
)
def test_a_comparison_trains_all_on_the_same(
    name: str, steps: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name, monkeypatch)
    monkeypatch.setattr("comparison.RATES", (1e-3,))
    module.main([*options, "--steps", str(steps), "--seeds", "1", "--out", str(tmp_path)])
    stem = name.replace("_", "-")
    assert (tmp_path / f"{stem}.png").stat().st_size > 10_000
    table = (tmp_path / f"{stem}.md").read_text(encoding="utf-8")
    assert table.count("| AmalgamatedOptimizer() |") == table.count("| AdamW(lr=0.001) |") == 2
    with (tmp_path / f"{stem}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (steps + 1)
    # One model, one batch: before the first step all have the same loss.
    first = {row["training_loss"] for row in rows if row["step"] == "0"}
    assert len(first) == 1
    validated = [float(row["validation"]) for row in rows if row["validation"]]
    assert len(set(validated)) > 4


@pytest.mark.parametrize("steps", ["0", "few"])
def test_a_count_of_steps_is_refused(
    steps: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("image_classifier", monkeypatch)
    with pytest.raises(SystemExit):
        module.main(["--data", "digits", "--steps", steps])
    assert f"whole number of 1 or more, not '{steps}'" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_compiled_model_in_mixed_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = load("loops/compiled_mixed_precision", monkeypatch).train(60, precision, "aot_eager")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    train = load("loops/accelerate_loop", monkeypatch).train
    losses = train(60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert train(60, str(tmp_path)) == losses


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    train = load("loops/hugging_face_trainer", monkeypatch).train
    whole = train(str(tmp_path), 20)
    assert isinstance(whole.optimizer.optimizer, AmalgamatedOptimizer)
    assert whole.optimizer.param_groups[0]["lr"] == 0
    last = tmp_path / "checkpoint-20"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = train(str(tmp_path), 20, resume=True)
    assert resumed.state.global_step == 20
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    train = load("loops/lightning_module", monkeypatch).train
    (own,) = train(str(tmp_path), 45).optimizers
    assert isinstance(own, AmalgamatedOptimizer)
    assert own.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    (half,) = train(str(tmp_path), 45, 90).optimizers
    checkpoint = f"{tmp_path}/last.ckpt"
    (loaded,) = train(str(tmp_path), 45, 90, checkpoint).optimizers
    assert len(loaded.state) == 4
    for ours, theirs in zip(loaded.state.values(), half.state.values(), strict=True):
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)
    (resumed,) = train(str(tmp_path), 90, 90, checkpoint).optimizers
    assert {int(entry["step"]) for entry in resumed.state.values()} == {90}


def test_sharded_pretraining(tmp_path: Path) -> None:
    """Two processes, straight on and stopped; then one goes on from what two saved."""

    def run(folder: str, processes: int, until: int = 12) -> dict[str, Any]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = str(EXAMPLES / "loops" / "sharded_pretraining.py")
        given = ["--folder", str(tmp_path / folder), "--until", str(until)]
        done = subprocess.run(
            [*launch, f"--nproc-per-node={processes}", script, *given],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        whole = tmp_path / f"{folder}.pt"
        dcp_to_torch_save(tmp_path / folder / str(until), whole)
        state: dict[str, Any] = torch.load(whole)
        return state

    straight = run("straight", 2)
    run("stopped", 2, 6)
    shutil.copytree(tmp_path / "stopped", tmp_path / "fewer")
    resumed, fewer = run("stopped", 2), run("fewer", 1)
    assert straight["scheduler"]["last_epoch"] == fewer["scheduler"]["last_epoch"] == 12
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name])
        torch.testing.assert_close(weight, fewer["model"][name], rtol=0.02, atol=0.002)
