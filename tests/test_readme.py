"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_training_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if "AmalgamatedOptimizer" in block)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    assert names["loss"] < 1.0
    assert names["optimizer"].skipped_steps == 0


def test_meta_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in BLOCKS if "Trainer" in block)
    monkeypatch.chdir(tmp_path)
    small = block.replace("episodes=20, windows=2", "episodes=1, windows=2")
    small = small.replace("Stage(20, 5, 0.1)", "Stage(1, 1, 0.1)").replace("unroll=20", "unroll=3")
    assert small.count("1, ") > block.count("1, ")
    names: dict = {}
    exec(small, names)
    assert names["student"].provenance["meta_steps"] == 3
    assert (tmp_path / "runs" / "mine" / "student.safetensors").exists()


def test_commands_are_the_ones_that_ci_and_users_run() -> None:
    assert "\npip install -c constraints.txt . && amalgam train digits\n" in README
    assert "\npip install -c constraints.txt -e '.[test]' && python -m pytest -n 2\n" in README
