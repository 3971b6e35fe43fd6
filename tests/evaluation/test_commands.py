"""``amalgam evaluate`` and ``amalgam compare``, as a user runs them."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from amalgam import Student, StudentConfig
from amalgam.evaluation import commands
from amalgam.evaluation.runner import NamedTask
from amalgam.seeding import generator_for

SHORT = ("--short", "--horizon", 4, "--budgets", "0.5,1")
TASKS = "small:optimizee=regression,digits-mlp"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student") / "mine.safetensors"
    config = StudentConfig(layers=1, hidden=3, warmup_steps=1)
    Student(config, generator=generator_for(1)).save(path)
    return path


def environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "150", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "amalgam.cli", *map(str, arguments)]


def evaluated(student: Path, folder: Path, out: Path | None = None, **more: Any) -> None:
    """The same by a call, which takes no time to start."""
    given: dict[str, Any] = {
        "tasks": [TASKS],
        "short": True,
        "horizon": 4,
        "budgets": "0.5,1",
        "jobs": 1,
        "device": "cpu",
        "out": str(out or folder / "out"),
        "cache": folder / "cache",
    }
    commands.evaluate_command([str(student)], **(given | more))


def numbers(folder: Path) -> dict[str, Any]:
    """All of an evaluation but the time that its steps took."""
    content = json.loads((folder / "evaluation.json").read_text())
    for result in content["results"]:
        for curve in result["curves"]:
            assert float(curve.pop("seconds_a_step")) > 0
    return content


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(student: Path, tmp_path_factory) -> Path:
    """An evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    evaluated(student, folder)
    return folder


def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(student, whole, tmp_path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    evaluate = (
        *("evaluate", student, "--tasks", TASKS, *SHORT, "--jobs", 2),
        *("--out", out, "--cache", cache),
    )
    runs = len(list((whole / "cache").rglob("*.json")))
    process = subprocess.Popen(
        command(*evaluate), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(cache.rglob("*.json"))) < runs // 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in cache.rglob("[!.]*.json")}
    assert runs // 3 <= len(kept) < runs
    assert not (out / "evaluation.json").exists()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))

    evaluated(student, tmp_path)
    assert numbers(out) == numbers(whole / "out")
    files = {path.name: path.stat().st_mtime_ns for path in cache.rglob("[!.]*.json")}
    assert {name: files[name] for name in kept} == kept
    assert set(files) == {path.name for path in (whole / "cache").rglob("*.json")}


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo, which this PyTorch lacks",
)
def test_the_processes_of_torchrun_share_the_runs(student, whole, tmp_path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["evaluate", student, "--tasks", TASKS, *SHORT, "--out", tmp_path / "out"]
    done = subprocess.run(
        [*launch, "-m", "amalgam.cli", *map(str, arguments), "--cache", tmp_path / "cache"],
        capture_output=True, text=True, env=environment(), timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report:") == 1
    assert numbers(tmp_path / "out") == numbers(whole / "out")


def test_a_folder_holds_one_evaluation_and_no_run(
    student, whole, tmp_path, monkeypatch, capsys
) -> None:
    out = whole / "out"
    before = (out / "evaluation.json").read_bytes()
    with pytest.raises(ValueError, match="an evaluation of other students, tasks or settings"):
        evaluated(student, whole, seeds=3)
    # What is all in the cache is not run again, times of steps included. And no terminal is so
    # narrow that it breaks a path.
    monkeypatch.setattr(commands, "_console", commands.Console(width=30))
    evaluated(student, whole)
    assert f"report: {out / 'report.html'}\n" in capsys.readouterr().out
    assert (out / "evaluation.json").read_bytes() == before
    assert (out / "report.html").stat().st_size > 10_000

    trained = tmp_path / "run"
    trained.mkdir()
    (trained / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="must not be a meta-training run's folder"):
        evaluated(student, whole, trained)
    assert [path.name for path in trained.iterdir()] == ["recipe.json"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder that can be written to"):
        evaluated(student, whole, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_compare(whole, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    out = whole / "out"
    commands.compare_command([out])
    shown = capsys.readouterr().out
    assert "mine, linear over mine" in shown
    assert "all tasks" in shown
    commands.compare_command([out], reference="Adam, linear", contender=["mine"], steps=2)
    shown = capsys.readouterr().out
    assert "mine over Adam, linear" in shown
    assert "small-regression" in shown
    with pytest.raises(ValueError, match="contender must be one of .* did you mean 'mine'"):
        commands.compare_command([out], contender=["min"])
    # Nobody is compared with himself.
    commands.compare_command([out], contender=["mine"], steps=2)
    assert "mine over mine, linear" in capsys.readouterr().out
    with pytest.raises(ValueError, match="contender must be another than the reference"):
        commands.compare_command([out], contender=["mine"], reference="mine")
    with pytest.raises(ValueError, match="reference must be given.*no other student"):
        commands.compare_command([out], contender=["mine", "mine, linear"])
    with pytest.raises(ValueError, match=r"steps must be one of \[2, 4\], not 3"):
        commands.compare_command([out], steps=3)
    with pytest.raises(FileNotFoundError, match="it is no evaluation's folder"):
        commands.compare_command([whole])


def test_tables_are_shown_when_writing_fails(student, tmp_path, monkeypatch, capsys) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(commands.report, "record", full)
    monkeypatch.setattr(commands.report, "record_papers", full)
    monkeypatch.setenv("COLUMNS", "150")
    for protocol in (
        {"short": True, "horizon": 2, "budgets": "1", "seeds": 1},
        {"protocol": "paper", "seeds": 1, "short": True, "teacher": ["adam"]},
    ):
        monkeypatch.setattr(commands, "_Paper", lambda *given, **more: Papers(1, 1))
        with pytest.raises(OSError, match="No space left"):
            commands.evaluate_command(
                [str(student)],
                tasks=["digits-mlp:batch_size=1000"],
                out=str(tmp_path / "out"),
                cache=tmp_path / "cache",
                jobs=1,
                device="cpu",
                **protocol,
            )
        assert "mine" in capsys.readouterr().out


def test_the_papers_protocol_writes_its_runs_and_is_not_compared(
    student, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(commands, "_Paper", lambda *given, **more: Papers(1, 2))
    out = tmp_path / "out"
    asked = {"tasks": ["digits-mlp:batch_size=1000"], "protocol": "paper", "teacher": ["adam"]}
    evaluated(student, tmp_path, horizon=None, budgets=None, **asked)
    assert str(out / "report.html") in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "by the paper's protocol: 1 epoch, 2 runs each" in html.unescape(page)
    assert page.count("<svg") == 1
    assert "optimization stability" in page
    assert not re.search(r"(src|href)=.?http", page)
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [(row["optimizer"], row["seed"]) for row in rows] == [
        *(("mine", "0"), ("mine", "1"), ("adam", "0"), ("adam", "1"))
    ]
    results = json.loads((out / "evaluation.json").read_text())["results"]
    best = [loss for result in results for loss in result["best_log_losses"]]
    assert [float(row["best_log_validation_loss"]) for row in rows] == best
    read = [curve["full"][1] for result in results for curve in result["curves"]]
    assert [float(row["best_accuracy"]) for row in rows] == [
        pytest.approx(reading["accuracy"]) for reading in read
    ]
    assert {(row["task"], row["epochs"], row["diverged"]) for row in rows} == {
        ("digits-mlp", "1", "0")
    }
    with pytest.raises(ValueError, match="by the paper's protocol, and only those by"):
        commands.compare_command([out])
    evaluated(student, tmp_path, horizon=None, budgets=None, **asked)  # the same may go on


Papers = commands._Paper


def test_tasks_by_name() -> None:
    found = commands._tasks(["digits, small:optimizee=deep", "my.module.task"])
    assert found == [
        NamedTask("digits-mlp"),
        NamedTask("digits-cnn"),
        NamedTask("small", (("optimizee", "deep"),)),
        NamedTask("my.module.task"),
    ]
    assert len(commands._tasks(["small"])) == 14
    with pytest.raises(ValueError, match=r"tasks must be .* not 'digit'; did you mean 'digits'"):
        commands._tasks(["digit"])
    with pytest.raises(ValueError, match="must be given as NAME:KEY=VALUE, not as 'small:deep'"):
        commands._tasks(["small:deep"])


def test_wrong_options_are_refused_before_any_work(student, tmp_path) -> None:
    for wrong, message in (
        ({"protocol": "papers"}, "protocol must be 'tuned' or 'paper', not 'papers'"),
        ({"protocol": "paper", "horizon": 3}, "horizon, budgets and decays are of the protocol"),
        ({"protocol": "paper", "decays": "linear"}, "horizon, budgets and decays are of the"),
        ({"decays": "linear,cosine"}, "decays must be some of .*'cosine'"),
        ({"budgets": "1,x"}, "budgets must be numbers .* not '1,x'"),
        ({"budgets": "2"}, "budgets must ascend and have 1 among them"),
        ({"tasks": [""]}, "tasks must be some of .*, not ''"),
        ({"out": ""}, "out must be the path of a folder, not ''"),
        ({"device": "tpu"}, "device must be"),
        ({"teacher": ["adum"]}, "adum"),
    ):
        given: dict[str, Any] = {"tasks": ["digits-mlp"], "cache": tmp_path, "device": "cpu"}
        with pytest.raises(ValueError, match=message):
            commands.evaluate_command([str(student)], **(given | wrong))
    assert not list(tmp_path.iterdir())


def test_a_task_that_there_is_not_leaves_no_folder(student, tmp_path) -> None:
    for name in ("absent", "absent_module.make", "small:optimizee=absent"):
        with pytest.raises(ValueError, match="absent"):
            evaluated(student, tmp_path, tasks=[name])
        assert not (tmp_path / "out").exists()
