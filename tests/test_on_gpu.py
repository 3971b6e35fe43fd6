"""bench/on_gpu.py keeps a phase's rows and runs the others, however the phase ends."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", BENCH / "on_gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "settle", lambda run: None)
    return module


def phase_of(driver: ModuleType, name: str, code: str, seconds: float = 20) -> Any:
    """A phase that runs this code, to which ``path`` is the file of rows."""
    begin = f"import json, os, sys, time; path = {{path!r}}\n{code}"
    return driver.Phase(
        name,
        seconds,
        lambda run: [[sys.executable, "-c", begin.replace("{path!r}", repr(str(run.rows)))]],
    )


WRITES = """
def write(**row):
    with open(path, "a") as file:
        file.write(json.dumps({"phase": NAME, **row}) + "\\n")
"""


def test_a_phase_killed_at_its_limit_loses_no_row(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = WRITES.replace("NAME", "'endless'") + (
        "write(case='one'); write(case='two'); print('begun', flush=True)\n"
        'open(path, \'a\').write(\'{"phase": "endless", "case": "cut o\')\n'
        "time.sleep(60)"
    )
    after = "open(path, 'a').write('\\n')\n" + WRITES.replace("NAME", "'after'") + "write(case='x')"
    phases = (phase_of(driver, "endless", endless, 2), phase_of(driver, "after", after))
    monkeypatch.setattr(driver, "PHASES", phases)
    run = driver.Run(tmp_path, None, {})
    text = driver.go(run, 30)
    assert [row["case"] for row in run.read()] == ["one", "two", "x"]
    assert "endless" in text
    assert "killed at its limit of 2 s: 2 rows" in text
    assert "after" in text
    assert "[endless] begun" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "summary.txt").read_text().strip() == text
    assert run.failed()


def test_what_is_left_of_all_time_is_a_phases_limit(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = (phase_of(driver, "long", "time.sleep(60)"), phase_of(driver, "none", "pass"))
    monkeypatch.setattr(driver, "PHASES", phases)
    text = driver.go(driver.Run(tmp_path, None, {}), 3)
    assert "killed at its limit of 3 s" in text
    assert "no time was left" in text


def test_a_lost_gpu_costs_the_case_that_lost_it(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own loop over cases, in which the second one loses the GPU."""
    code = (
        "from pathlib import Path\nfrom gpu.place import Place\n"
        "class Broken(Place):\n"
        "    lost = False\n"
        "    def wait(self):\n"
        "        if self.lost: raise RuntimeError('an illegal memory access')\n"
        "def bad():\n"
        "    place.lost = True\n"
        "    return {}\n"
        "place = Broken('cases', Path(path), 'keys', [])\n"
        "place.run_cases([('a', lambda: {'ok': True}), ('b', bad), ('c', lambda: {'ok': False})])"
    )
    pytest.importorskip("triton")
    monkeypatch.setattr(driver, "PHASES", (phase_of(driver, "cases", code, 60),))
    run = driver.Run(tmp_path, None, {})
    text = driver.go(run, 100)
    assert [row["case"] for row in run.read()] == ["a", "b", "c"]
    assert "2 processes" in text
    assert "! cases b:  RuntimeError: an illegal memory access" in text
    assert "! cases c" in text


def test_tests_that_ended_are_rows_at_once(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "print('tests/test_x.py::test_a[1 - b] PASSED [ 50%]')\n"
        "print('tests/test_x.py::test_b FAILED', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(driver, "PHASES", (phase_of(driver, "tests", code, 2),))
    run = driver.Run(tmp_path, None, {})
    text = driver.go(run, 30)
    assert [row["outcome"] for row in run.read()] == ["passed", "failed"]
    assert "1 failed, 1 passed" in text


def test_what_cannot_run_says_why(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = driver.Phase("ncu", 5, lambda run: "ncu is not on PATH")
    monkeypatch.setattr(driver, "PHASES", (phase,))
    run = driver.Run(tmp_path, "keys", {})
    assert "ncu is not on PATH" in driver.go(run, 30)
    assert json.loads(run.rows.read_text()) == {"phase": "ncu", "left_out": "ncu is not on PATH"}
    assert not run.failed()


def test_a_phase_that_is_not_there_is_refused(
    driver: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "run", "--only", "smok"])
    with pytest.raises(SystemExit):
        driver.main()
    assert (
        "--only names ['smok']; there are ['machine', 'arithmetic', 'smoke'"
        in capsys.readouterr().err
    )
