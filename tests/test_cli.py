"""The command line, as a user runs it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from amalgam import Student

TINY = """
description = "seconds"
[task]
name = "digits-mlp"
batch_size = 64
[[teachers]]
kind = "adam"
[[teachers]]
kind = "sgd"
[student]
layers = 1
hidden = 4
warmup_steps = 3
[training]
unroll = 4
checkpoint_every = 3
validate_every = 10
validation_steps = 4
validation_seeds = 1
[[stages]]
episodes = 15
windows = 2
[evaluation]
tasks = ["digits-mlp"]
steps = 4
seeds = 2
every = 2
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "amalgam.cli", *map(str, arguments)]


def run(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def test_train_killed_at_random_moments_ends_in_the_same_bits(tiny, tmp_path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", tiny, "--out", whole, "--seed", 3)
    for expected in ("student", "adam", "sgd", "torch Adam(", "torch AdamW(", "final loss"):
        assert expected in done.stdout
    for name in (
        "recipe.json",
        "metrics.jsonl",
        "evaluation.json",
        "evaluation.md",
        "plots/training.png",
        "plots/digits-mlp.png",
    ):
        assert (whole / name).stat().st_size > 0

    kills = 0
    resume: list[str] = []
    for lines in (random.randrange(1, 8), random.randrange(9, 20), random.randrange(21, 29)):
        process = subprocess.Popen(
            command("train", tiny, "--out", cut, "--seed", 3, *resume),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log = cut / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                time.sleep(random.uniform(0, 0.05))
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        resume = ["--resume"]
    assert kills >= 2
    assert not (cut / "student.safetensors").exists()
    run("train", tiny, "--out", cut, "--seed", 3, "--resume")

    ours, theirs = (Student.load(d / "student.safetensors") for d in (whole, cut))
    assert all(map(torch.equal, ours.weights(), theirs.weights()))
    assert (whole / "student.safetensors").read_bytes() == (
        cut / "student.safetensors"
    ).read_bytes()
    assert metrics(whole) == metrics(cut)
    assert (whole / "evaluation.json").read_bytes() == (cut / "evaluation.json").read_bytes()

    about = ours.provenance
    assert about["seed"] == 3
    assert about["recipe"] == "tiny"
    assert about["resolved"]["training"]["unroll"] == 4
    assert about["amalgam_version"]
    assert "digits-mlp" in about["data"]

    refused = run("train", tiny, "--out", cut, "--seed", 3, fails=True)
    assert "holds a run already" in refused.stderr
    changed = ["--set", "training.unroll=5"]
    refused = run("train", tiny, "--out", cut, "--seed", 3, "--resume", *changed, fails=True)
    assert "recipe.training.unroll is 4 there and 5 here" in refused.stderr
    refused = run("train", tiny, "--out", cut, "--seed", 4, "--resume", fails=True)
    assert "seed is 3 there and 4 here" in refused.stderr

    done = run(
        *("evaluate", whole / "student.safetensors", "--task", "digits-cnn", "--steps", 5),
        *("--seeds", 1, "--teacher", "rmsprop", "--out", tmp_path / "compared"),
    )
    assert "rmsprop" in done.stdout
    assert (tmp_path / "compared" / "plots" / "digits-cnn.png").exists()


def test_errors_have_no_traceback(tiny, tmp_path) -> None:
    done = run("train", tiny, "--out", tmp_path / "x", "--set", "training.unrol=3", fails=True)
    assert done.stderr.strip().startswith("error:")
    assert "the nearest is 'training.unroll'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
    done = run("evaluate", tmp_path / "none.safetensors", fails=True)
    assert "none.safetensors" in done.stderr


def test_info() -> None:
    report = json.loads(run("info", "--json").stdout)
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert backends["reference"]["works"]
    for backend in backends.values():
        assert backend["works"] == (backend["reason"] is None)
    assert "digits" in report["recipes"]
    text = run("info").stdout
    assert "reference" in text
    assert "student_step" in text
